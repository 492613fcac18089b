"""Files of model specs: several to a file, in YAML documents or lists, or in JSON; every error names file, line and key."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from schema.errors import InvalidInput
from schema.spec import ModelSpec, parse_spec
from sllmctl.specs import foreign
from sllmctl.specs.nodes import MOST_BYTES, Document, Problem, read_documents

__all__ = ["Entry", "InvalidSpecs", "read_specs"]

_ENDINGS: Final = (".yaml", ".yml", ".json")


class InvalidSpecs(InvalidInput):
    """What is wrong with the files, a line each."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A spec and where it stands. ``notes`` say what of it does not apply here, and why.

    ``keys`` are the keys of the document that those of the spec come from, where they are others.
    """

    spec: ModelSpec
    file: str
    document: Document
    notes: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)

    def place(self, key: str = "") -> str:
        """``FILE:LINE`` of a key of the spec, else of where the spec begins."""
        return f"{self.file}:{self.document.line_of(self.keys.get(key, key))}"


def read_specs(names: Iterable[str]) -> list[Entry]:
    """The specs of files, of the files of directories, and ("-") of standard input, in their order.

    Raises InvalidSpecs that tells all that is wrong, each with its file, line and key: then nothing of it is to be used.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    for name, content in _contents(names, problems):
        before = len(entries) + len(problems)
        _read(name, content, entries, problems)
        if len(entries) + len(problems) == before:
            problems.append(f"{name}: there is no model spec in it")
    first: dict[str, Entry] = {}
    problems += [
        f"{entry.place('name')}: name: model {entry.spec.name!r} stands in {other.place('name')} already"
        for entry in entries
        if (other := first.setdefault(entry.spec.name, entry)) is not entry
    ]
    if problems:
        raise InvalidSpecs("\n".join(problems))
    return entries


def _contents(names: Iterable[str], problems: list[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        try:
            if name == "-":
                yield "<stdin>", sys.stdin.buffer.read(MOST_BYTES + 1)
            elif Path(name).is_dir():
                found = sorted(path for path in Path(name).iterdir() if path.suffix in _ENDINGS and path.is_file())
                if not found:
                    problems.append(f"{name}: no file in it ends with {', '.join(_ENDINGS)}")
                for path in found:
                    yield str(path), _beginning(path)
            else:
                yield name, _beginning(Path(name))
        except OSError as error:
            problems.append(f"{error.filename or name}: {error.strerror}")


def _beginning(path: Path) -> bytes:
    """All of a file, or enough of one that is too long, or never ends, to see that."""
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


def _read(name: str, content: bytes, entries: list[Entry], problems: list[str]) -> None:
    try:
        for document in read_documents(content, as_json=name.endswith(".json")):
            try:
                entries.append(_entry(name, document))
            except Problem as problem:
                problems.append(f"{name}:{problem.line}: {problem}")
    except Problem as problem:
        problems.append(f"{name}:{problem.line}: {problem}")


def _entry(name: str, document: Document) -> Entry:
    value = document.value
    if not isinstance(value, dict):
        raise Problem(document.line, f"expected a model spec, got {_kind(value)}")
    if "spec" in value and "state" in value:
        raise Problem(document.line, "this is what `model show` prints; `sllmctl model spec NAME` prints what can be applied")
    notes: list[str] = []
    keys: dict[str, str] = {}
    try:
        if foreign.is_serverlessllm(value):
            translated = foreign.from_serverlessllm(value)
            notes = [f"{name}:{document.line_of(key)}: {key}: {why}" for key, why in translated.unused]
            value, keys = translated.spec, translated.keys
        return Entry(parse_spec(value), name, document, tuple(notes), keys)
    except InvalidInput as error:
        key = error.param or ""
        raise Problem(document.line_of(keys.get(key, key)), str(error).removeprefix("model spec: ")) from error


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "nothing" if value is None else f"the value {str(value)[:80]!r}"
