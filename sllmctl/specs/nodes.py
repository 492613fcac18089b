"""YAML and JSON as plain values, each with the lines it was written on; what readers disagree on is refused, not guessed.

Of YAML it is the core of 1.2: only ``true`` and ``false`` are booleans (``NO`` is a word), ``010`` is refused as octal to some
and decimal to others, a key stands once, and there are no tags beyond the plain ones and no merge keys. Aliases may repeat
what is anchored, within bounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from schema.errors import InvalidInput

__all__ = ["MOST_BYTES", "Document", "Problem", "is_plain_text", "read_documents"]

MOST_BYTES: Final = 1 << 20
"""A file is no longer."""
_MOST_VALUES: Final = 100_000
_DEEPEST: Final = 32

_PLAIN: Final = "plain"
_TEXT: Final = "tag:yaml.org,2002:str"
_WORDS: Final = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    word: value for value in (True, False) for word in (str(value), str(value).lower(), str(value).upper())
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
_OCTAL = re.compile(r"[-+]?0[0-9]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


class Problem(InvalidInput):
    """What is wrong in a file, and on which line (from 1)."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Document:
    """A mapping, or whatever else stands at the top of a document or of its list; ``lines`` is by dotted key."""

    value: Any
    line: int
    lines: dict[str, int]

    def line_of(self, key: str) -> int:
        """The line of a key, or of what it would stand in."""
        while key:
            if key in self.lines:
                return self.lines[key]
            key = key.rpartition(".")[0]
        return self.line


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)


# What has neither quotes nor a tag is told from what has: its text is read here, not by the rules of YAML 1.1.
_Loader.add_implicit_resolver(_PLAIN, re.compile(""), None)


def read_documents(content: bytes, *, as_json: bool = False) -> Iterator[Document]:
    """The documents of a file, the items of a list one by one. Raises Problem at the first that cannot be read.

    ``as_json``: it says of itself that it is JSON, so that an error in it is told as one.
    """
    if len(content) > MOST_BYTES:
        raise Problem(1, f"it is longer than {MOST_BYTES} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem(content[: error.start].count(b"\n") + 1, "it is not UTF-8 text") from error
    if as_json or text.lstrip()[:1] in ("{", "["):
        text = _json_as_yaml(text, as_json)
    try:
        yield from _composed(_Loader(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise Problem(mark.line + 1 if mark is not None else 1, f"it is not valid YAML: {what}") from error
    except ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise Problem(line, f"it is not valid YAML: character U+{error.character:04X} stands in it") from error
    except RecursionError:
        raise Problem(1, "it is nested too deeply") from None


def is_plain_text(text: str) -> bool:
    """Whether it is read as text without quotes."""
    return text not in _WORDS and not any(each.fullmatch(text) for each in (_INTEGER, _OCTAL, _REAL))


def _json_as_yaml(text: str, certain: bool) -> str:
    """JSON as YAML of the same lines: it may have tabs between its tokens, and in texts what YAML takes for no letter."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if certain:
            raise Problem(error.lineno, f"it is not valid JSON: {error.msg}") from error
        return text
    except (RecursionError, ValueError):
        raise Problem(1, "it is nested too deeply, or a number in it is too long") from None
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found.group()):04x}", text.replace("\t", " "))


def _composed(loader: _Loader) -> Iterator[Document]:
    while loader.check_node():
        node = loader.get_node()
        if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _PLAIN and node.value == ""):
            continue
        for each in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            reading = _Reading()
            value = reading.value(each, "", 0)
            yield Document(value, _line(each), reading.lines)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _Reading:
    """One document's value, and the lines of its keys."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self._count = 0

    def value(self, node: yaml.Node, key: str, depth: int) -> Any:
        self._count += 1
        if depth > _DEEPEST or self._count > _MOST_VALUES:
            raise Problem(_line(node), "it is nested too deeply, or its aliases make too much of it")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", _PLAIN):
            raise _tagged(node)
        if isinstance(node, yaml.SequenceNode):
            return [self._kept(each, f"{key}.{index}", each, depth) for index, each in enumerate(node.value)]
        found: dict[str, Any] = {}
        for name_node, each in node.value:
            name = self._name(name_node)
            place = f"{key}.{name}" if key else name
            if name in found:
                raise Problem(_line(name_node), f"{place}: it is given twice, first on line {self.lines[place]}")
            found[name] = self._kept(each, place, name_node, depth)
        return found

    def _kept(self, node: yaml.Node, place: str, at: yaml.Node, depth: int) -> Any:
        self.lines[place] = _line(at)
        return self.value(node, place, depth + 1)

    def _name(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag not in (_PLAIN, _TEXT):
            raise Problem(_line(node), "a key is a plain word")
        if node.tag == _PLAIN and node.value == "<<":
            raise Problem(_line(node), "merge keys (<<) are not taken; repeat the keys, or anchor the value of one")
        return _sound(node)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag == _TEXT:
            return _sound(node)
        if node.tag != _PLAIN:
            raise _tagged(node)
        text: str = node.value
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            return int(text)
        if _OCTAL.fullmatch(text):
            raise Problem(_line(node), f"{text} is octal to some and decimal to others; write no leading zero, or quote it")
        return float(text) if _REAL.fullmatch(text) else _sound(node)


def _sound(node: yaml.ScalarNode) -> str:
    """The text; escapes of JSON in pairs are one character."""
    text: str = node.value
    if not _SURROGATE.search(text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise Problem(_line(node), "half a character stands in a text") from error


def _tagged(node: yaml.Node) -> Problem:
    return Problem(_line(node), f"the tag {str(node.tag)[:80]} is not taken; leave it out")
