"""The logs of a node's processes: where each writes, which files are kept, and pages of them for the manager."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.config import NodeConfig
from schema.errors import Fault, InvalidInput, NotFound, SllmError
from schema.link import LogChunk, LogLine, ReadLog, StartInstance
from schema.logs import stamp, stamp_of, time_of

__all__ = ["NodeLogs"]

PROCESSES: Final = ("agent", "store", "zygote", "ingest", "publish")
_KEPT: Final = 64
"""So many logs of instances that are gone are kept, the latest."""
_PAGE_BYTES: Final = 256 << 10
_LINE_BYTES: Final = 16 << 10
"""A longer line is cut."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A file of a log as it was when it was opened."""

    inode: int
    data: bytes


class NodeLogs:
    """Blocking: for a thread."""

    def __init__(self, config: NodeConfig) -> None:
        self._directory = config.log_path
        self._instances = config.log_path / "instances"

    def of_instance(self, start: StartInstance) -> Path:
        """The log of an instance, over all its lives."""
        return self._instances / f"{start.model}@{start.instance}.log"

    def tidy(self, running: Collection[str] = (), ended: Collection[str] = ()) -> None:
        """Remove the oldest logs of instances beyond those kept, but none of the ``running`` ones, which may say little. Those
        of what has just ``ended`` are the latest, however long ago it said something."""
        with contextlib.suppress(OSError):
            gone = [path for path in self._instances.glob("*.log") if _instance_of(path) not in running]
            for path in gone:
                if _instance_of(path) in ended:
                    os.utime(path)
            for path in sorted(gone, key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT:]:
                path.unlink(missing_ok=True)
                _aside(path).unlink(missing_ok=True)

    def read(self, message: ReadLog) -> LogChunk:
        """The answer, a fault included."""
        try:
            return self._page(message)
        except SllmError as error:
            return LogChunk(op=message.op, fault=Fault.of(error))
        except OSError as error:
            return LogChunk(op=message.op, fault=Fault.of(SllmError(f"the log cannot be read: {error}")))

    def _page(self, message: ReadLog) -> LogChunk:
        lines: list[LogLine] = []
        cursors = dict(message.cursors or {})
        room, more = _PAGE_BYTES, False
        for source, path in self._sources(message):
            if source in cursors and _is_at_end(path, cursors[source]):
                continue
            parts = list(_parts(path))
            if source in cursors:
                at = _resumed(parts, cursors[source])
            elif message.cursors is None:
                at = _begin(parts, message.tail, max(0.0, time.time() - message.newer_s) if message.newer_s else None)
            else:
                at = (0, 0)
            page, at = _lines(parts, at, room)
            room -= sum(len(line) for line in page)
            lines += _told(source, page)
            if parts:
                cursors[source] = f"{parts[at[0]].inode}-{at[1]}"
                more = more or (at[0], at[1]) < (len(parts) - 1, parts[-1].data.rfind(b"\n") + 1)
        return LogChunk(op=message.op, lines=tuple(lines), cursors=cursors, more=more)

    def _sources(self, message: ReadLog) -> Iterator[tuple[str, Path]]:
        if message.process:
            if message.process not in PROCESSES:
                raise InvalidInput(f"a node has no log of {message.process!r}; it has {', '.join(PROCESSES)}", "process")
            yield message.process, self._directory / f"{message.process}.log"
            return
        found = False
        for path in sorted(self._instances.glob("*.log")):
            model, instance = path.name.partition("@")[0], _instance_of(path)
            if message.instance in ("", instance) and message.model in ("", model):
                found = True
                yield instance, path
        if not found and message.instance:
            raise NotFound(f"this node has no log of instance {message.instance}")


def _instance_of(path: Path) -> str:
    return path.name.removesuffix(".log").partition("@")[2]


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def _parts(path: Path) -> Iterator[_Part]:
    """The file put aside, and the one written to."""
    for each in (_aside(path), path):
        with contextlib.suppress(FileNotFoundError), each.open("rb") as file:
            yield _Part(os.fstat(file.fileno()).st_ino, file.read())


def _is_at_end(path: Path, cursor: str) -> bool:
    """Nothing was written since, as far as can be told without reading."""
    with contextlib.suppress(FileNotFoundError):
        now = path.stat()
        return cursor == f"{now.st_ino}-{now.st_size}"
    return False


def _resumed(parts: list[_Part], cursor: str) -> tuple[int, int]:
    """Where a cursor stands: the part, and how far in it."""
    inode, _, offset = cursor.partition("-")
    for index, part in enumerate(parts):
        if str(part.inode) == inode and offset.isdecimal() and int(offset) <= len(part.data):
            return index, int(offset)
    return 0, 0


def _begin(parts: list[_Part], tail: int, since: float | None) -> tuple[int, int]:
    """Where the last ``tail`` lines begin, or the first that is not older than ``since`` if that is later."""
    left, place = tail, (max(0, len(parts) - 1), len(parts[-1].data) if parts else 0)
    oldest = stamp(since) if since is not None else ""
    for index in range(len(parts) - 1, -1, -1):
        data = parts[index].data
        end = data.rfind(b"\n") + 1
        while end > 0 and left > 0:
            start = data.rfind(b"\n", 0, end - 1) + 1
            if oldest and (written := stamp_of(data[start : start + 64].decode(errors="replace"))) and written < oldest:
                return place
            place, end, left = (index, start), start, left - 1
    return place


def _lines(parts: list[_Part], at: tuple[int, int], room: int) -> tuple[list[bytes], tuple[int, int]]:
    """Whole lines from a place on, as many as have room, and the place behind them."""
    found: list[bytes] = []
    index, offset = at
    while index < len(parts) and room > 0:
        data = parts[index].data
        end = data.find(b"\n", offset)
        if end < 0:
            if index == len(parts) - 1:
                break
            if offset < len(data):  # it was put aside in the middle of a line
                found.append(data[offset:][:_LINE_BYTES])
            index, offset = index + 1, 0
            continue
        line = data[offset:end][:_LINE_BYTES]
        found.append(line)
        room -= len(line)
        offset = end + 1
    return found, (min(index, max(0, len(parts) - 1)), offset)


def _told(source: str, lines: list[bytes]) -> Iterator[LogLine]:
    for line in lines:
        text = line.decode(errors="replace").rstrip("\r")
        yield LogLine(source, time_of(text), text)
