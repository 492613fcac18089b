"""The reader for machines without io_uring: a few plain threads over preadv, each with a unit of its own.

A file's blocks that lie in the page cache are copied from there; the rest is read past the cache (O_DIRECT), which spares
the machine a copy and its cache. Where a file system does not know that, reads are ordinary ones.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from agent.native.files import DIRECT_ALIGN_BYTES, OpenFile, stalled, wrong_checksum
from agent.native.jobs import JobQueue, ReadJob, Unit, Work, cancelled
from schema.errors import SllmError

__all__ = ["BLOCK_BYTES", "ThreadReader"]

BLOCK_BYTES: Final = 4 << 20
"""The longest single read, unless told otherwise; a cancel waits for at most one per thread."""
_TICK_S: Final = 1.0
"""How often reads are looked at that do not come back."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Reading:
    """What a thread is at: the last read it began, or without an offset an opening. ``overdue``: it is counted out, and another
    thread is in its place."""

    job: ReadJob
    path: Path
    offset: int | None
    began: float
    overdue: bool = False


@dataclass(slots=True)
class _Files:
    """What is open for one job."""

    opening: threading.Lock = field(default_factory=threading.Lock)
    open: dict[Path, OpenFile] = field(default_factory=dict)


class ThreadReader:
    """A `Reader` of ``threads`` threads.

    A read that has not come back for ``stall_s`` ends its job, and another thread takes the place of the one that is stuck;
    the memory is the kernel's until the read does come back.
    """

    name: Final = "threads"

    def __init__(self, threads: int, *, block_bytes: int = BLOCK_BYTES, stall_s: float) -> None:
        self.queue = JobQueue(self._ended)
        self._block_bytes = block_bytes
        self._stall_s = stall_s
        self._closed = False
        self._files: dict[ReadJob, _Files] = {}
        self._reading: dict[threading.Thread, _Reading] = {}
        self._threads: list[threading.Thread] = []
        for _ in range(threads):
            self._start(self._serve, f"read-{len(self._threads)}")
        self._start(self._watch, "read-watch")

    def wake(self) -> None:
        """Nothing: the queue's condition wakes the threads."""

    def tune(self, block_bytes: int, depth: int) -> None:
        self._block_bytes = block_bytes

    def close(self) -> None:
        """End the threads once the queue is empty."""
        with self.queue.condition:
            self._closed = True
            self.queue.condition.notify_all()
        end = time.monotonic() + self._stall_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        for reading in list(self._reading.values()):
            _log.error("a read of %s does not come back; it is left behind", reading.path)

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)  # one that is stuck must not keep the process
        self._threads.append(thread)
        thread.start()

    def _watch(self) -> None:
        while True:
            with self.queue.condition:
                if self._closed:
                    return
                self.queue.condition.wait(_TICK_S if self.queue.jobs else None)
            due = time.monotonic() - self._stall_s
            for reading in [each for each in list(self._reading.values()) if each.began <= due and not each.overdue]:
                reading.overdue = True
                error = stalled(reading.path, reading.offset, self._stall_s)
                _log.error("%s", error)
                self.queue.stall(reading.job, error)
                self._start(self._serve, f"read-{len(self._threads)}")

    def _serve(self) -> None:
        while True:
            with self.queue.condition:
                while (work := self.queue.take()) is None:
                    if self._closed:
                        return
                    self.queue.condition.wait()
                files = self._files.setdefault(work.job, _Files())
            if not self._read(work, files):
                return  # another thread has this one's place

    def _read(self, work: Work, files: _Files) -> bool:
        unit = work.unit
        if unit is None:
            self.queue.settle(work, None)
            return True
        error: SllmError | None = None
        corrupt = False
        self._reading[threading.current_thread()] = _Reading(work.job, unit.file, None, time.monotonic())
        try:
            with files.opening:
                file = files.open.get(unit.file)
                if file is None:
                    file = files.open[unit.file] = OpenFile(unit.file, unit.file_bytes)
            found = self._read_unit(file, work.job, unit)
            if unit.xxh3 is not None and found != unit.xxh3:
                error, corrupt = wrong_checksum(unit, found), True
        except SllmError as raised:
            error = raised
        except Exception as raised:  # a reader thread has no caller: whatever it is, it is the job's end
            error = SllmError(f"reading {unit.file} failed: {type(raised).__name__}: {raised}")
        reading = self._reading.pop(threading.current_thread(), None)
        self.queue.settle(work, error, corrupt=corrupt)
        return reading is None or not reading.overdue

    def _read_unit(self, file: OpenFile, job: ReadJob, unit: Unit) -> int:
        """Fill the unit's memory; its checksum if one is expected. Raises InvalidCheckpoint for a short file."""
        offset = unit.offset_bytes
        digest = xxhash.xxh3_64()
        for target in unit.targets:
            for start in range(0, len(target), self._block_bytes):
                if job.error is not None:
                    raise cancelled()
                block = target[start : start + self._block_bytes]
                self._reading[threading.current_thread()] = _Reading(job, file.path, offset, time.monotonic())
                _fill(file, block, offset)
                if unit.xxh3 is not None:
                    digest.update(block)
                offset += len(block)
        return digest.intdigest()

    def _ended(self, job: ReadJob) -> None:
        files = self._files.pop(job, None)
        for file in files.open.values() if files is not None else ():
            file.close()


def _fill(file: OpenFile, block: memoryview, offset: int) -> None:
    while block:
        try:
            count = _read_some(file, block, offset)
        except OSError as error:
            raise file.failed(offset, error.strerror) from error
        if not count:
            raise file.short(offset)
        block = block[count:]
        offset += count


def _read_some(file: OpenFile, block: memoryview, offset: int) -> int:
    cached = file.in_cache(offset, len(block))
    if cached is None:
        try:
            return os.preadv(file.cached, [block], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                file.try_cache = False
            elif error.errno != errno.EAGAIN:
                raise
    if not cached and file.use_direct and not offset % DIRECT_ALIGN_BYTES and not len(block) % DIRECT_ALIGN_BYTES:
        try:
            return os.preadv(file.direct, [block], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file.use_direct = False  # the file system opens for direct reads and then wants another alignment
    return os.preadv(file.cached, [block], offset)
