"""Workloads from files: requests one by one, or invocations per function and minute. Read line by line, errors by line."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from random import Random
from typing import IO

from schema.errors import InvalidInput
from sllmctl.simulate.parts import Arrival

__all__ = ["LONGEST_S", "Counts", "find", "is_shipped", "read_counts", "read_trace", "synthetic_counts"]

_TRACE = ["time", "model", "input_tokens", "output_tokens"]
_FUNCTION = ["HashOwner", "HashApp", "HashFunction", "Trigger"]
LONGEST_S = 366 * 86400.0
"""Requests come for so long at most: while nothing else happens, the control loop still looks around every few seconds."""
_MOST_IN_A_MINUTE = 10_000_000
"""More invocations of one function than this in a minute are taken for a broken file."""


def is_shipped(name: str) -> bool:
    """There is a file of this name among those that come with the simulator."""
    return "/" not in name and resources.files("sllmctl.simulate").joinpath("traces", name).is_file()


def find(name: str, beside: Path) -> str | None:
    """What to read for a name in a scenario: a path beside it, else the name of a shipped file; None if neither is there."""
    if (path := beside / name).is_file():
        return str(path.resolve())
    return name if is_shipped(name) else None


@contextmanager
def _opened(name: str) -> Iterator[IO[str]]:
    try:
        path = Path(name)
        source = (
            path if path.is_file() or not is_shipped(name) else resources.files("sllmctl.simulate").joinpath("traces", name)
        )
        with source.open("r", encoding="utf-8-sig") as stream:
            yield stream
    except OSError as error:
        raise InvalidInput(f"{name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_trace(name: str, contexts: Mapping[str, int] | None = None) -> Iterator[Arrival]:
    """The requests of a file with the columns time (seconds), model, input_tokens, output_tokens, in order of time.

    ``contexts``: the models there may be, with how many tokens a prompt and reply of each may have in all; None for any.
    Raises InvalidInput with file and line, when it comes to the line.
    """
    with _opened(name) as stream:
        rows = _rows(name, stream)
        header = next(rows, (0, []))[1]
        if header != _TRACE:
            raise InvalidInput(f"{name}:1: the columns must be {','.join(_TRACE)}, not {','.join(header) or 'none'}")
        before, count = 0.0, 0
        for line, row in rows:
            place = f"{name}:{line}"
            if len(row) != len(_TRACE):
                raise InvalidInput(f"{place}: {len(row)} values for {len(_TRACE)} columns")
            at = _time(place, row[0])
            if at < before:
                raise InvalidInput(f"{place}: time {row[0]} is before the line above it ({before:g}); sort the file by time")
            arrival = Arrival(at, row[1], _tokens(place, _TRACE[2], row[2]), _tokens(place, _TRACE[3], row[3]))
            if contexts is not None:
                _check(place, arrival, contexts)
            yield arrival
            before = at
            count += 1
        if not count:
            raise InvalidInput(f"{name}: no requests in it")


def _rows(name: str, stream: IO[str]) -> Iterator[tuple[int, list[str]]]:
    """Numbered rows, empty lines left out."""
    reader = csv.reader(stream, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InvalidInput(f"{name}:{reader.line_num}: {error}") from error
        if row:
            yield reader.line_num, [value.strip() for value in row]


def _time(place: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidInput(f"{place}: time {text!r} is no number of seconds") from None
    if not math.isfinite(value) or value < 0:
        raise InvalidInput(f"{place}: time {text} is not a time from 0 on")
    if value > LONGEST_S:
        days = f"{LONGEST_S / 86400:.0f} days"
        raise InvalidInput(f"{place}: time {text} is more than {days}; times are seconds since the trace began")
    return value


def _tokens(place: str, column: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and int(text) > 0):
        raise InvalidInput(f"{place}: {column} {text!r} is no count from 1 on")
    return int(text)


def _check(place: str, arrival: Arrival, contexts: Mapping[str, int]) -> None:
    context = contexts.get(arrival.model)
    if context is None:
        raise InvalidInput(f"{place}: the scenario has no model {arrival.model!r}; its models are named {_some(contexts)}")
    tokens = arrival.prompt_tokens + arrival.output_tokens
    if tokens > context:
        raise InvalidInput(f"{place}: {tokens} tokens in and out, but {arrival.model} has a context of {context}")


def _some(names: Collection[str]) -> str:
    some = list(names)
    return ", ".join(some) if len(some) <= 3 else f"{some[0]}, {some[1]}, ... {some[-1]}"


class Counts:
    """Invocations per function and minute: ``by_function[f][m]``, all functions over the same minutes."""

    def __init__(self, by_function: list[array[int]], minutes: int) -> None:
        self.by_function = by_function
        self.minutes = minutes
        self.total = sum(map(sum, by_function))


def read_counts(name: str) -> Counts:
    """A file in the form of Azure's functions trace of 2019: HashOwner, HashApp, HashFunction, Trigger, then a column a minute.

    The form: github.com/Azure/AzurePublicDataset, AzureFunctionsDataset2019.md. A whole day of 10,000 functions takes 60 MB.
    """
    with _opened(name) as stream:
        rows = _rows(name, stream)
        header = next(rows, (0, []))[1]
        minutes = len(header) - len(_FUNCTION)
        if (
            minutes < 1
            or header[: len(_FUNCTION)] != _FUNCTION
            or header[len(_FUNCTION) :] != [str(n + 1) for n in range(minutes)]
        ):
            raise InvalidInput(f"{name}:1: the columns must be {','.join(_FUNCTION)} and then 1,2,... for the minutes")
        functions: list[array[int]] = []
        for line, row in rows:
            if len(row) != len(header):
                raise InvalidInput(f"{name}:{line}: {len(row)} values for {len(header)} columns")
            functions.append(array("I", (_invocations(f"{name}:{line}", text) for text in row[len(_FUNCTION) :])))
    counts = Counts(functions, minutes)
    if not counts.total:
        raise InvalidInput(f"{name}: no invocations in it")
    return counts


def _invocations(place: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:12]) <= _MOST_IN_A_MINUTE):
        raise InvalidInput(f"{place}: {text!r} is no number of invocations from 0 to {_MOST_IN_A_MINUTE}")
    return int(text)


def synthetic_counts(functions: int, minutes: int, rate: float, zipf: float, cv: float, seed: int) -> str:
    """The text of a file in that form, of ``rate`` invocations per second in the mean.

    Function r of the file has a share in proportion to ``1 / r**zipf``. In each minute it is called as a Poisson process
    whose own rate is Gamma with coefficient of variation ``cv``, drawn anew: few busy functions, most of them seldom called
    and then in bursts, as Shahrad et al. (USENIX ATC 2020) describe Azure's. Time of day is left out.
    """
    random = Random(seed)  # noqa: S311 - a reproducible workload, no secret
    shares = [1 / (rank + 1) ** zipf for rank in range(functions)]
    lines = [",".join([*_FUNCTION, *(str(minute + 1) for minute in range(minutes))])]
    for number, share in enumerate(shares):
        mean = 60 * rate * share / sum(shares)
        counts = []
        for _ in range(minutes):
            left, count = random.gammavariate(1 / cv**2, cv**2) * mean, -1
            while left > 0:
                left -= random.expovariate(1.0)
                count += 1
            counts.append(str(max(count, 0)))
        lines.append(",".join([f"owner{number:04d}", f"app{number:04d}", f"function{number:04d}", "http", *counts]))
    return "\n".join(lines) + "\n"
