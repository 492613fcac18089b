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
from sllmctl.specs.faults import STAND_INS, faults_of
from sllmctl.specs.nodes import MOST_BYTES, Document, Problem, read_documents
from sllmctl.specs.words import source_in_word

__all__ = ["Entry", "InvalidSpecs", "read_specs"]

_ENDINGS: Final = (".yaml", ".yml", ".json")
_STDIN: Final = "<stdin>"


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
                yield _STDIN, sys.stdin.buffer.read(MOST_BYTES + 1)
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
            except _Problems as several:
                problems.extend(f"{name}:{problem.line}: {problem}" for problem in several.problems)
            except Problem as problem:
                problems.append(f"{name}:{problem.line}: {problem}")
    except Problem as problem:
        problems.append(f"{name}:{problem.line}: {problem}")


class _Problems(InvalidInput):
    """What is wrong in a document, in the order of its lines."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        super().__init__("it is no model spec")
        self.problems = sorted(problems, key=lambda problem: problem.line)


def _entry(name: str, document: Document) -> Entry:
    """What a document says. Raises Problem for what is no spec at all, _Problems for what is wrong in one."""
    value = document.value
    if not isinstance(value, dict):
        raise Problem(document.line, f"expected a model spec, got {_kind(value)}")
    if "spec" in value and "state" in value:
        raise Problem(document.line, "this is what `model show` prints; `sllmctl model spec NAME` prints what can be applied")
    if len(value) == 1 and isinstance(next(iter(value.values())), list):
        raise Problem(document.line, f"leave out '{next(iter(value))}:' above the list; a list of models stands by itself")
    notes: list[str] = []
    keys: dict[str, str] = {}
    if foreign.is_serverlessllm(value):
        try:
            translated = foreign.from_serverlessllm(value)
        except InvalidInput as error:
            raise _problem(document, error, keys) from error
        notes = [f"{name}:{document.line_of(key)}: {key}: {why}" for key, why in translated.unused]
        value, keys = translated.spec, translated.keys
    wrong: list[InvalidInput] = []
    if isinstance(word := value.get("source"), str):
        try:
            value = value | {"source": source_in_word(word, Path() if name == _STDIN else Path(name).parent)}
        except InvalidInput as error:
            wrong.append(error)
            value = value | {"source": STAND_INS["source"]}
    wrong += faults_of(value)
    if wrong:
        raise _Problems(_problem(document, error, keys) for error in wrong)
    return Entry(parse_spec(value), name, document, tuple(notes), keys)


def _problem(document: Document, error: InvalidInput, keys: Mapping[str, str]) -> Problem:
    """The error at its line, under the key that the file has for it."""
    key, text = error.param or "", str(error).removeprefix("model spec: ")
    if (there := keys.get(key, key)) != key:
        text = f"{there} ({key} here){text.removeprefix(key)}"
    return Problem(document.line_of(there), text)


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "nothing" if value is None else f"the value {str(value)[:80]!r}"
