"""What travels between the processes, written down: those of an older build live on when one of them is upgraded."""

from __future__ import annotations

import enum
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import inspect

from schema import link
from schema.link import PROTOCOL, Message

WRITTEN = Path(__file__).with_name("wire.txt")
_WRITE = "`python -m tests.schema.test_wire`"


def messages(base: type[Message] = Message) -> Iterator[type[Message]]:
    for each in base.__subclasses__():
        if each.__module__.startswith("schema."):
            yield each
        yield from messages(each)


def parts(node: object) -> Iterator[inspect.StructType | inspect.EnumType]:
    """All structs and enums in a type, itself first."""
    if isinstance(node, inspect.StructType | inspect.EnumType):
        yield node
    if isinstance(node, tuple):
        for each in node:
            yield from parts(each)
    elif isinstance(node, inspect.Type | inspect.Field):
        for name in node.__struct_fields__:
            yield from parts(getattr(node, name))


def named(node: Any) -> str:
    """A type as one writes it, with its bounds."""
    if isinstance(node, inspect.StructType | inspect.EnumType):
        return str(node.cls.__name__)
    inner = []
    for name in node.__struct_fields__:
        value = getattr(node, name)
        if value is None or value is False or value is ...:
            continue
        if isinstance(value, tuple):
            inner.append(" | ".join(named(each) if isinstance(each, inspect.Type) else repr(each) for each in value))
        else:
            inner.append(named(value) if isinstance(value, inspect.Type) else f"{name}={value!r}")
    kind = type(node).__name__.removesuffix("Type")
    return f"{kind}[{', '.join(inner)}]" if inner else kind


def described(node: inspect.StructType | inspect.EnumType) -> str:
    if isinstance(node, inspect.EnumType):
        members: list[enum.Enum] = list(node.cls)
        return f"{node.cls.__name__} = {' | '.join(repr(member.value) for member in members)}"
    how = [f"tag {node.tag}"] if node.tag is not None else []
    how += ["an array"] if node.array_like else []
    how += ["of these fields alone"] if node.forbid_unknown_fields else []
    fields = [f"  {field.encode_name}{'' if field.required else '?'}: {named(field.type)}" for field in node.fields]
    return "\n".join([f"{node.cls.__name__} ({', '.join(how)})", *fields])


def shape() -> str:
    found = {part.cls.__name__: described(part) for each in messages() for part in parts(inspect.type_info(each))}
    return "\n".join(found[name] for name in sorted(found)) + "\n"


def written(old: str, protocol: int, shape: str) -> str:
    """The file once it has this shape: below a line for each version of the protocol, which says what its shape's digest is and
    stays for ever. Raises ValueError, which says what to do, for a shape that is not the one its version has there."""
    known = [line for line in old.splitlines() if line.startswith("protocol ")]
    line = f"protocol {protocol}: {hashlib.sha256(shape.encode()).hexdigest()}"
    newest = max((int(each.split()[1].rstrip(":")) for each in known), default=0)
    if protocol > newest:
        known.append(line)
    elif not known or known[-1] != line:
        raise ValueError(
            f"the messages are not those of protocol {newest}, which processes that live on may speak: raise PROTOCOL in "
            f"schema/link/base.py to {newest + 1}, and PROTOCOL_OLDEST too unless both versions are understood; then {_WRITE}"
        )
    return "\n".join(known) + "\n" + shape


def test_messages_are_those_of_this_version_of_the_protocol() -> None:
    """A process that meets a field it does not know cuts the link and dials again; one of another version hears so."""
    old = WRITTEN.read_text()
    assert old == written(old, PROTOCOL, shape()), f"write the new protocol down: {_WRITE}"


def test_other_messages_need_another_version() -> None:
    first = written("", 1, "A\n")
    assert written(first, 1, "A\n") == first
    for protocol in (0, 1):
        with pytest.raises(ValueError, match=r"not those of protocol 1.*raise PROTOCOL in schema/link/base\.py to 2"):
            written(first, protocol, "B\n")
    second = written(first, 2, "B\n")
    assert [line.split()[:2] for line in second.splitlines()] == [["protocol", "1:"], ["protocol", "2:"], ["B"]]
    with pytest.raises(ValueError, match="not those of protocol 2"):
        written(second, 1, "A\n")


def test_every_message_has_its_own_tag() -> None:
    assert issubclass(link.Progress, Message)
    tags = [each.__struct_config__.tag for each in messages()]
    assert len(set(tags)) == len(tags) > 50


if __name__ == "__main__":
    try:
        WRITTEN.write_text(written(WRITTEN.read_text(), PROTOCOL, shape()))
    except ValueError as error:
        sys.exit(str(error))
