"""The only module that writes to stdout: tables for people, JSON, YAML and names for programs."""

from __future__ import annotations

import codecs
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sllmctl.cli.diagnostics import writing_stdout
from sllmctl.cli.format import cells, padded, printable

__all__ = [
    "FORMATS",
    "REPORT_FORMATS",
    "Column",
    "Format",
    "ReportFormat",
    "Watch",
    "now",
    "read_line",
    "show_documents",
    "show_item",
    "show_items",
    "stream",
    "write",
]

Format = Literal["table", "wide", "json", "yaml", "name"]
FORMATS: tuple[Format, ...] = ("table", "wide", "json", "yaml", "name")
ReportFormat = Literal["table", "wide", "json", "yaml"]
REPORT_FORMATS: tuple[ReportFormat, ...] = ("table", "wide", "json", "yaml")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """One column: its header, the text of an item's cell, whether only ``wide`` shows it, whether it is set to the right."""

    header: str
    cell: Callable[[T], str]
    wide: bool = False
    right: bool = False


def now() -> float:
    """The clock that ages are reckoned from (Unix seconds)."""
    return time.time()


def write(text: str) -> None:
    """A line, or several."""
    _put(text + "\n")


def stream(text: str) -> None:
    """A piece of text as it comes; on a terminal without the control characters that could steer it."""
    _put(printable(text, keep="\n\t") if sys.stdout.isatty() else text)


def _put(text: str) -> None:
    with writing_stdout():
        sys.stdout.write(text if _takes(text) else text.encode(sys.stdout.encoding, _ESCAPE).decode(sys.stdout.encoding))
        sys.stdout.flush()


def _takes(text: str) -> bool:
    """Whether stdout's encoding, which the locale or PYTHONIOENCODING says, has all its letters."""
    try:
        text.encode(sys.stdout.encoding, sys.stdout.errors or "strict")
    except UnicodeEncodeError:
        return False
    return True


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """The letters that an encoding lacks as JSON writes them, ``\\u00e9``: what is JSON stays it, and people can tell them."""
    import json

    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


_ESCAPE = "sllmctl.escape"
codecs.register_error(_ESCAPE, _escaped)


def read_line(prompt: str) -> str:
    """A line that the user types, with the terminal's editing and history. Raises EOFError at the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    return input(prompt)


def show_items(form: Format, items: Sequence[T], columns: Sequence[Column[T]], name: Callable[[T], str]) -> None:
    """A list of things, one a line; JSON and YAML are the admin API's structs, whole."""
    if form in ("json", "yaml"):
        _write_struct(form, items)
    elif form == "name":
        for item in items:
            write(name(item))
    elif items:
        _write_table([column for column in columns if form == "wide" or not column.wide], items)


def show_item(form: Format, item: T, fields: Callable[[T], Sequence[tuple[str, str]]], name: Callable[[T], str]) -> None:
    """One thing, a field a line. A field whose text has several lines is set below one another."""
    if form in ("json", "yaml"):
        _write_struct(form, item)
    elif form == "name":
        write(name(item))
    else:
        pairs = fields(item)
        width = max(len(label) for label, _ in pairs) + 2
        for label, text in pairs:
            first, *rest = text.split("\n")
            write(f"{label + ':':<{width}}{printable(first)}".rstrip())
            for line in rest:
                write(f"{'':<{width}}{printable(line)}")


def show_documents(form: Literal["json", "yaml"], items: Sequence[object]) -> None:
    """Things as a file has them: YAML documents; in JSON one as it is, or a list."""
    if form == "json":
        _write_struct(form, items[0] if len(items) == 1 else items)
        return
    for number, item in enumerate(items):
        if number:
            write("---")
        _write_struct(form, item)


class Watch(Generic[T]):
    """A list that goes on. ``columns`` are asked for anew each time, since ages are reckoned from when they are made.

    A table's columns only become wider; JSON is an object a line, YAML a document each.
    """

    def __init__(self, form: Format, columns: Callable[[], Sequence[Column[T]]], name: Callable[[T], str]) -> None:
        self._form, self._columns, self._name = form, columns, name
        self._widths: list[int] | None = None

    def show(self, items: Sequence[T]) -> None:
        """Items that are new, or have changed."""
        if self._form in ("json", "yaml"):
            for item in items:
                self._document(item)
        elif self._form == "name":
            for item in items:
                write(printable(self._name(item)))
        else:
            columns = [column for column in self._columns() if self._form == "wide" or not column.wide]
            rows = [[printable(column.cell(item)) for column in columns] for item in items]
            if self._widths is None and rows:
                rows.insert(0, [column.header for column in columns])
                self._widths = [0] * len(columns)
            widths = [max([width, *(cells(row[index]) for row in rows)]) for index, width in enumerate(self._widths or [])]
            for row in rows:
                write(_line(columns, row, widths))
            self._widths = widths or None

    def gone(self, name: str) -> None:
        """Something is there no more."""
        if self._form in ("json", "yaml"):
            self._document({"gone": name})
        elif self._form != "name":
            write(f"{printable(name)} is gone")

    def _document(self, value: Any) -> None:
        import msgspec

        if self._form == "json":
            write(msgspec.json.encode(value).decode())
        else:
            write("---")
            _write_struct(self._form, value)


def _line(columns: Sequence[Column[T]], row: Sequence[str], widths: Sequence[int]) -> str:
    texts = [padded(text, width, right=column.right) for column, text, width in zip(columns, row, widths, strict=True)]
    return "  ".join(texts).rstrip()


def _write_table(columns: Sequence[Column[T]], items: Sequence[T]) -> None:
    rows = [[column.header for column in columns], *([printable(column.cell(item)) for column in columns] for item in items)]
    widths = [max(cells(row[index]) for row in rows) for index in range(len(columns))]
    for row in rows:
        write(_line(columns, row, widths))


def _write_struct(form: Format, value: Any) -> None:
    import msgspec

    if form == "json":
        write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
        return
    import yaml

    from sllmctl.specs.nodes import is_plain_text

    class Dumper(yaml.SafeDumper):
        """Quotes what some readers of YAML take for a number, though PyYAML does not: 1e5, 089."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if is_plain_text(value) else "'")

    def dumped(any_letter: bool) -> str:
        return yaml.dump(msgspec.to_builtins(value), Dumper=Dumper, sort_keys=False, allow_unicode=any_letter).rstrip("\n")

    Dumper.add_representer(str, text)
    written = dumped(True)
    write(written if _takes(written) else dumped(False))
