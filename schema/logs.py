"""How log lines look, in every process: one line each, for people or as JSON, with what they are about as fields.

``log.info("placed", extra=about(request=request.id))``: a request has one id from the gateway to the worker, so that a search
for it over all logs tells its whole story. No line ever has a prompt's or a reply's text.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Literal

import msgspec

__all__ = ["LineFormatter", "LogFormat", "LogLevel", "Throttle", "about", "install", "stamp", "stamp_of", "time_of"]

LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_MESSAGE_CHARS: Final = 4096
_TRACE_CHARS: Final = 16384
_BEGIN: Final = re.compile(r'(?:\{"at":")?(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z)')


def about(**fields: object) -> dict[str, dict[str, object]]:
    """What a line is about, for ``extra``; a field that is None is left out."""
    return {"about": {name: value for name, value in fields.items() if value is not None}}


class LineFormatter(logging.Formatter):
    """Lines of the process called ``process``. ``fields`` are on each of them. A record that cannot be told is told of."""

    def __init__(self, process: str, form: LogFormat, fields: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self._process, self._json, self._fields = process, form == "json", dict(fields or {})

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except Exception:
            message = f"{record.msg!r} (a line whose arguments do not fit)"
        if len(message) > _MESSAGE_CHARS:
            message = f"{message[:_MESSAGE_CHARS]}... ({len(message) - _MESSAGE_CHARS} more)"
        trace = self.formatException(record.exc_info)[-_TRACE_CHARS:] if record.exc_info else ""
        fields = {**self._fields, **getattr(record, "about", {})}
        at = stamp(record.created)
        if self._json:
            line: dict[str, Any] = {"at": at, "level": record.levelname.lower(), "process": self._process}
            line |= {"pid": record.process, "logger": record.name, "message": message}
            line |= {name: _plain(value) for name, value in fields.items() if name not in line}
            return _encode(line | {"trace": trace} if trace else line)
        told = "".join([f" {name}={_quoted(value)}" for name, value in fields.items()])
        head = f"{at} {record.levelname} {self._process} {record.name}: {_one_line(message)}{told}"
        return "\n".join([head, *map(_one_line, trace.split("\n"))]) if trace else head


class Throttle(logging.Filter):
    """Lets ``burst`` lines of a logger through at once and ``per_s`` a second, warnings counted apart; the first line after
    some were left out says how many. Time is the records' own."""

    def __init__(self, per_s: float = 1000.0, burst: int = 4000) -> None:
        super().__init__()
        self._per_s, self._burst = per_s, burst
        self._buckets: dict[tuple[str, bool], list[float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        bucket = self._buckets.setdefault((record.name, record.levelno >= logging.WARNING), [self._burst, record.created, 0])
        room, before, dropped = bucket
        room = min(self._burst, room + max(0.0, record.created - before) * self._per_s)
        passed = room >= 1
        bucket[:] = (room - 1, record.created, 0) if passed else (room, record.created, dropped + 1)
        if passed and dropped:
            record.about = {**getattr(record, "about", {}), "lines_left_out": int(dropped)}
        return passed


def install(handler: logging.Handler, formatter: LineFormatter, level: str, libraries: str | None = None) -> None:
    """Make ``handler`` the one place where this process's lines go, from ``level`` up. ``libraries``: the level of everything
    but sllmctl's own. A handler that fails is passed over: a log never ends its process.

    Records are made without what no line of ours tells (the place in the source, threads, tasks), which is a quarter of a
    line's cost; as the logging module's documentation has it, under "Optimization".
    """
    logging.raiseExceptions = False
    for unused, off in (("_srcfile", None), ("logThreads", False), ("logMultiprocessing", False), ("logAsyncioTasks", False)):
        setattr(logging, unused, off)
    handler.setFormatter(formatter)
    handler.addFilter(Throttle())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    known = level.upper() if level.upper() in logging.getLevelNamesMapping() else "INFO"
    root.setLevel(known if libraries is None else libraries)
    if libraries is not None:
        logging.getLogger("sllmctl").setLevel(known)


def stamp(at: float) -> str:
    """Unix seconds as lines have them; texts of it sort by time."""
    whole, thousandths = divmod(round(at * 1_000_000) // 1000, 1000)
    return f"{_second(whole)}.{thousandths:03d}Z"


@lru_cache(maxsize=16)
def _second(whole: int) -> str:
    return datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def stamp_of(line: str) -> str | None:
    """What a line says of when it was written; None for one that does not: output of a library, a part of a trace."""
    begin = _BEGIN.match(line)
    return None if begin is None else begin[1]


def time_of(line: str) -> float | None:
    """The same in Unix seconds."""
    written = stamp_of(line)
    try:
        return None if written is None else datetime.fromisoformat(written).timestamp()
    except ValueError:
        return None


def _encode(line: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(line).decode()
    except (UnicodeEncodeError, OverflowError):  # a name whose bytes are no UTF-8, a number of more than 64 bits
        return json.dumps(line, separators=(",", ":"))


def _plain(value: object) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    return value if isinstance(value, str | int | bool) or value is None else str(value)


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _one_line(str(value))
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text


def _one_line(text: str) -> str:
    """A line that nobody can make look like two, nor steer a terminal with."""
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in text])
