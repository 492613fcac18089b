"""The reader for machines without io_uring: a few plain threads over preadv, each with a unit of its own.

A file's blocks that lie in the page cache are copied from there; the rest is read past the cache (O_DIRECT), which spares
the machine a copy and its cache. Where a file system does not know that, reads are ordinary ones.
"""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from agent.native.files import DIRECT_ALIGN_BYTES, OpenFile, wrong_checksum
from agent.native.jobs import JobQueue, ReadJob, Unit, Work, cancelled
from schema.errors import SllmError

__all__ = ["BLOCK_BYTES", "ThreadReader"]

BLOCK_BYTES: Final = 4 << 20
"""The longest single read; a cancel waits for at most one per thread."""


@dataclass(slots=True)
class _Files:
    """What is open for one job."""

    opening: threading.Lock = field(default_factory=threading.Lock)
    open: dict[Path, OpenFile] = field(default_factory=dict)


class ThreadReader:
    """A `Reader` of ``threads`` threads."""

    name: Final = "threads"

    def __init__(self, threads: int) -> None:
        self.queue = JobQueue(self._ended)
        self._closed = False
        self._files: dict[ReadJob, _Files] = {}
        self._threads = [threading.Thread(target=self._serve, name=f"read-{number}") for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Nothing: the queue's condition wakes the threads."""

    def close(self) -> None:
        """End the threads once the queue is empty."""
        with self.queue.condition:
            self._closed = True
            self.queue.condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self.queue.condition:
                while (work := self.queue.take()) is None:
                    if self._closed:
                        return
                    self.queue.condition.wait()
                files = self._files.setdefault(work.job, _Files())
            self._read(work, files)

    def _read(self, work: Work, files: _Files) -> None:
        unit = work.unit
        if unit is None:
            self.queue.settle(work, None)
            return
        error: SllmError | None = None
        corrupt = False
        try:
            with files.opening:
                file = files.open.get(unit.file)
                if file is None:
                    file = files.open[unit.file] = OpenFile(unit.file, unit.file_bytes)
            found = _read_unit(file, work.job, unit)
            if unit.xxh3 is not None and found != unit.xxh3:
                error, corrupt = wrong_checksum(unit, found), True
        except SllmError as raised:
            error = raised
        except Exception as raised:  # a reader thread has no caller: whatever it is, it is the job's end
            error = SllmError(f"reading {unit.file} failed: {type(raised).__name__}: {raised}")
        self.queue.settle(work, error, corrupt=corrupt)

    def _ended(self, job: ReadJob) -> None:
        with self.queue.condition:
            files = self._files.pop(job, None)
        for file in files.open.values() if files is not None else ():
            file.close()


def _read_unit(file: OpenFile, job: ReadJob, unit: Unit) -> int:
    """Fill the unit's memory; its checksum if one is expected. Raises InvalidCheckpoint for a short file."""
    offset = unit.offset_bytes
    digest = xxhash.xxh3_64()
    for target in unit.targets:
        for start in range(0, len(target), BLOCK_BYTES):
            if job.error is not None:
                raise cancelled()
            block = target[start : start + BLOCK_BYTES]
            _fill(file, block, offset)
            if unit.xxh3 is not None:
                digest.update(block)
            offset += len(block)
    return digest.intdigest()


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
    if file.try_cache:
        try:
            return os.preadv(file.cached, [block], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                file.try_cache = False
            elif error.errno != errno.EAGAIN:
                raise
    if file.use_direct and not offset % DIRECT_ALIGN_BYTES and not len(block) % DIRECT_ALIGN_BYTES:
        try:
            return os.preadv(file.direct, [block], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file.use_direct = False  # the file system opens for direct reads and then wants another alignment
    return os.preadv(file.cached, [block], offset)
