"""Reads files into memory with a few plain threads: large blocks, oldest job first, checked on the way, cancelled at once.

A file's blocks that lie in the page cache are copied from there; the rest is read past the cache (O_DIRECT), which spares
the machine a copy and its cache. Where a file system does not know that, reads are ordinary ones.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from schema.errors import Cancelled, InvalidCheckpoint, SllmError

__all__ = ["ReadJob", "ReadPool", "Unit"]

BLOCK_BYTES: Final = 4 << 20
"""The longest single read; a cancel waits for at most one per thread."""
_DIRECT_ALIGN: Final = 4096


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of a file and the memory it goes to, in pieces. ``xxh3`` is its expected checksum, None to trust it."""

    file: Path
    file_bytes: int
    offset_bytes: int
    targets: tuple[memoryview, ...]
    xxh3: int | None = None


class ReadJob:
    """Units to be read, for one asker. Made by `ReadPool.submit`; ``done_bytes`` may be read at any time."""

    def __init__(self, units: Sequence[Unit], changed: Callable[[ReadJob], None]) -> None:
        self.done_bytes = 0
        self.error: SllmError | None = None
        self.corrupt = False
        """The error is a wrong checksum: the copy on disk is bad, whoever reads it."""
        self.finished = False
        """No thread touches the job's memory any more; ``error`` says how it ended. Set once, then ``changed`` is called."""
        self._changed = changed
        self._pending = deque(units)
        self._running = 0
        self._opening = threading.Lock()
        self._files: dict[Path, _File] = {}


class ReadPool:
    """``threads`` threads that serve the jobs, the oldest first.

    ``changed`` of a job is called from one of them after every unit, the last time when it is ``finished``.
    """

    def __init__(self, threads: int) -> None:
        self._condition = threading.Condition()
        self._jobs: list[ReadJob] = []
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, name=f"read-{number}") for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, units: Sequence[Unit], changed: Callable[[ReadJob], None]) -> ReadJob:
        """Read all units (at least one) in the background, in their order as far as threads allow."""
        job = ReadJob(units, changed)
        with self._condition:
            self._jobs.append(job)
            self._condition.notify_all()
        return job

    def cancel(self, job: ReadJob) -> None:
        """End a job as Cancelled as soon as its running reads are over; without effect on a finished one."""
        with self._condition:
            if not job.finished and job.error is None:
                job.error = Cancelled("the read was cancelled")
                job._pending.clear()
            self._condition.notify_all()

    def close(self) -> None:
        """Cancel all jobs and end the threads; each job is ``finished`` when this returns."""
        for job in list(self._jobs):
            self.cancel(job)
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._condition:
                job = self._next()
                while job is None:
                    if self._closed:
                        return
                    self._condition.wait()
                    job = self._next()
                unit = job._pending.popleft() if job._pending else None
                job._running += 1
            error = None if unit is None else self._read(job, unit)
            self._settle(job, error, 0 if unit is None or error else sum(len(target) for target in unit.targets))

    def _next(self) -> ReadJob | None:
        """The job to serve: one with units, or a cancelled one that nobody is serving and that must be ended."""
        return next((job for job in self._jobs if job._pending or not job._running), None)

    def _read(self, job: ReadJob, unit: Unit) -> SllmError | None:
        try:
            with job._opening:
                file = job._files.get(unit.file)
                if file is None:
                    file = job._files[unit.file] = _File(unit.file, unit.file_bytes)
            found = file.read(unit, lambda: job.error is not None)
            if unit.xxh3 is not None and found != unit.xxh3:
                job.corrupt = True
                return InvalidCheckpoint(
                    f"{unit.file}: the {sum(map(len, unit.targets))} bytes at offset {unit.offset_bytes} are not what was "
                    f"ingested (xxh3 {found:016x}, expected {unit.xxh3:016x}); ingest the model again"
                )
        except SllmError as error:
            return error
        except Exception as error:  # a reader thread has no caller: whatever it is, it is the job's end
            return SllmError(f"reading {unit.file} failed: {type(error).__name__}: {error}")
        return None

    def _settle(self, job: ReadJob, error: SllmError | None, read_bytes: int) -> None:
        with self._condition:
            job._running -= 1
            job.done_bytes += read_bytes
            if error is not None and job.error is None:
                job.error = error
                job._pending.clear()
            if not job._pending and not job._running:
                self._jobs.remove(job)
                for file in job._files.values():
                    file.close()
                job.finished = True
            changed = job.finished or job.error is None
        if changed:
            job._changed(job)


class _File:
    """One file of a job, opened twice: through the page cache, and past it where that is possible."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._cached = self._open(os.O_NONBLOCK)
        self._direct = -1
        status = os.fstat(self._cached)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
            os.close(self._cached)
            raise InvalidCheckpoint(f"{path} has {status.st_size} bytes; its manifest says {size_bytes}")
        with contextlib.suppress(SllmError):  # a file system that knows no direct reads says so when it opens
            self._direct = self._open(os.O_DIRECT)
        self._use_direct = self._try_cache = self._direct >= 0

    def _open(self, flags: int) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                raise InvalidCheckpoint(f"cannot open {self._path}: {error.strerror}") from error
            raise SllmError(f"cannot open {self._path}: {error.strerror}") from error

    def read(self, unit: Unit, cancelled: Callable[[], bool]) -> int:
        """Fill the unit's memory; its checksum if one is expected. Raises InvalidCheckpoint for a short file."""
        offset = unit.offset_bytes
        digest = xxhash.xxh3_64()
        for target in unit.targets:
            for start in range(0, len(target), BLOCK_BYTES):
                if cancelled():
                    raise Cancelled(f"reading {self._path} was cancelled at byte {offset}")
                block = target[start : start + BLOCK_BYTES]
                self._fill(block, offset)
                if unit.xxh3 is not None:
                    digest.update(block)
                offset += len(block)
        return digest.intdigest()

    def _fill(self, block: memoryview, offset: int) -> None:
        while block:
            try:
                count = self._read_some(block, offset)
            except OSError as error:
                raise SllmError(f"cannot read {self._path} at byte {offset}: {error.strerror}") from error
            if not count:
                raise InvalidCheckpoint(f"{self._path} ends at byte {offset}; its manifest says {self._size_bytes}")
            block = block[count:]
            offset += count

    def _read_some(self, block: memoryview, offset: int) -> int:
        if self._try_cache:
            try:
                return os.preadv(self._cached, [block], offset, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    self._try_cache = False
                elif error.errno != errno.EAGAIN:
                    raise
        if self._use_direct and not offset % _DIRECT_ALIGN and not len(block) % _DIRECT_ALIGN:
            try:
                return os.preadv(self._direct, [block], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._use_direct = False  # the file system opens for direct reads and then wants another alignment
        return os.preadv(self._cached, [block], offset)

    def close(self) -> None:
        os.close(self._cached)
        if self._direct >= 0:
            os.close(self._direct)
