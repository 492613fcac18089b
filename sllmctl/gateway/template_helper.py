"""The process that renders chat templates: untrusted Jinja, in a sandbox, under limits, with nothing else in it to reach.

It reads frames (4-byte big-endian length, msgpack of `Render`) from stdin and answers each with one of `Rendered` on stdout.
Whoever started it kills it when an answer takes too long. Limits of its own: address space, processor time for each
rendering (should its starter be dead by then), no files, no processes.

The environment is that of transformers' ``apply_chat_template``, so that templates mean what their authors tested.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.debug  # Jinja would import it at the first error, when no file can be opened any more
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
import msgspec
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["HEADER", "Render", "Rendered", "main"]

HEADER = struct.Struct(">I")
_TEMPLATES_KEPT = 32


class Render(msgspec.Struct, frozen=True, array_like=True):
    """One rendering: ``variables`` (messages, special tokens, ...) into ``template``, in ``cpu_s`` seconds at most."""

    template: str
    variables: dict[str, Any]
    cpu_s: int
    output_bytes: int


class Rendered(msgspec.Struct, frozen=True, array_like=True):
    """The text, or why there is none; exactly one of the two is not empty unless the text is."""

    text: str = ""
    error: str = ""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks replies for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own it escapes no HTML: the reader is a model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **values: Any) -> dict[Any, Any]:
    """``dict`` as a function: the type itself would be a step towards the interpreter's insides."""
    return dict(*args, **values)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without underscored names: setting those has been a way out of the sandbox."""

    def __init__(*args: Any, **values: Any) -> None:
        attributes = dict(*args[1:], **values)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no underscored name, such as {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], cache_size=0
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_dict, namespace=_Namespace)
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name)
    return environment


_environment_of_all = _environment()


@lru_cache(_TEMPLATES_KEPT)
def _compiled(template: str) -> jinja2.Template:
    return _environment_of_all.from_string(template)


def _render(job: Render) -> Rendered:
    """Render one job; whatever goes wrong in the template is an answer, not an exception."""
    try:
        text = _compiled(job.template).render(job.variables)
    except SecurityError as error:
        return Rendered(error=f"it tries what the sandbox forbids: {error}")
    except TemplateError as error:
        return Rendered(error=str(error) or type(error).__name__)
    except MemoryError:
        return Rendered(error="it needs more memory than it may have")
    except RecursionError:
        return Rendered(error="it recurses without end")
    except Exception as error:  # a template can raise what it likes: it is code
        return Rendered(error=f"{type(error).__name__}: {error}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return Rendered(error="it makes text that is not Unicode")
    if size > job.output_bytes:
        return Rendered(error=f"it makes {size} bytes of text; {job.output_bytes} are allowed")
    return Rendered(text=text)


def _limit_processor_time(seconds: int) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + seconds + 1)


def _lower(limit: int, value: int) -> None:
    """Set a soft limit, as far as the hard one allows."""
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _serve(read: Callable[[int], bytes], write: Callable[[bytes], None]) -> None:
    decode = msgspec.msgpack.Decoder(Render).decode
    encode = msgspec.msgpack.Encoder().encode
    while header := read(HEADER.size):
        job = decode(read(HEADER.unpack(header)[0]))
        _limit_processor_time(job.cpu_s)
        try:
            body = encode(_render(job))
        except MemoryError:
            body = encode(Rendered(error="it needs more memory than it may have"))
        write(HEADER.pack(len(body)) + body)


def _warm() -> None:
    """Go through what a rendering and an error need, while files can still be opened."""
    for template in ("{{ strftime_now('%c') }}{{ {} | tojson }}", "{{ raise_exception('') }}", "{% for %}"):
        _render(Render(template, {}, 0, 1024))
    _compiled.cache_clear()


def main(memory_bytes: int) -> int:
    """Serve until stdin ends. The limits come after the imports, which need files and more room than a template does."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _warm()
    _lower(resource.RLIMIT_AS, memory_bytes)
    _lower(resource.RLIMIT_NPROC, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_NOFILE, 0)
    _lower(resource.RLIMIT_CORE, 0)

    def write(data: bytes) -> None:
        sink.write(data)
        sink.flush()

    write(HEADER.pack(0))
    _serve(source.read, write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1])))
