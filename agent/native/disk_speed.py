"""How fast a directory's disk reads: a short look past the page cache, with as many threads and as long reads as loads have.

Where a file system refuses direct I/O (some overlays and network file systems), loads read through the page cache, and so
does the look, after the kernel was asked to forget the pages (POSIX_FADV_DONTNEED). The figure then includes the copy out
of the cache. As the kernel may keep pages that others use, and a network's server or a hypervisor has a cache of its own,
it is an upper bound there. On tmpfs it is the memory's, as a load's is.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from agent.native.blocks import block_memory
from agent.native.reader import BLOCK_BYTES

__all__ = ["SCRATCH_BYTES", "measure_read_bps"]

READ_BYTES: Final = 256 << 20
"""No more is read, however fast the disk."""
SCRATCH_BYTES: Final = 64 << 20
"""What is written where there is no file of that size to read; a file system takes it back at once, also after a crash."""
LEAST_BYTES: Final = 8 << 20
"""A shorter file says more of latency than of bandwidth."""


def measure_read_bps(
    directory: Path, file: Path | None, *, huge: bool, threads: int, limit_s: float, stop: threading.Event
) -> float:
    """Bytes per second of reads of ``file``, or of a nameless one made in ``directory`` and gone afterwards.

    ``huge``: into huge pages, as into an arena that has them. Writing and reading take at most ``limit_s`` each, and a block's
    time. 0 if ``stop`` was set meanwhile, or nothing could be read in that time. Raises OSError, also for a file that is none
    or too short, and for a disk with too little room.
    """
    with ExitStack() as stack:
        if file is not None:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            stack.callback(os.close, descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.ENOTSUP, "is not a file to read from", str(file))
        else:
            descriptor = stack.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0)).fileno()
        try:
            return _look(descriptor, file is None, True, huge, threads, limit_s, stop)
        except OSError as error:
            if error.errno != errno.EINVAL:  # how a file system refuses direct I/O, or its alignment
                raise
        return _look(descriptor, file is None, False, huge, threads, limit_s, stop)


def _look(
    descriptor: int, scratch: bool, direct: bool, huge: bool, threads: int, limit_s: float, stop: threading.Event
) -> float:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
    if scratch:
        _write(descriptor, direct, limit_s, stop)
    size_bytes = min(os.fstat(descriptor).st_size, READ_BYTES)
    if stop.is_set():
        return 0.0
    if size_bytes < LEAST_BYTES:
        raise OSError(errno.ENODATA, f"there are only {size_bytes} bytes to read, and {LEAST_BYTES} are the least")
    if not direct:
        os.posix_fadvise(descriptor, 0, size_bytes, os.POSIX_FADV_DONTNEED)
    return _Race(descriptor, size_bytes, huge, limit_s, stop).run(threads)


def _write(descriptor: int, direct: bool, limit_s: float, stop: threading.Event) -> None:
    """Fill a file with what no disk compresses, as far as there is time, and in no more than half of the room."""
    end = time.monotonic() + limit_s
    disk = os.fstatvfs(descriptor)
    size_bytes = min(SCRATCH_BYTES, disk.f_bavail * disk.f_frsize // 2)
    if size_bytes < LEAST_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    flags = 0 if direct else os.RWF_DSYNC  # pages that are not written yet would not be forgotten
    with mmap.mmap(-1, BLOCK_BYTES) as block:
        block[:] = os.urandom(BLOCK_BYTES)
        for offset in range(0, size_bytes - BLOCK_BYTES + 1, BLOCK_BYTES):
            if time.monotonic() >= end or stop.is_set():
                return
            os.pwritev(descriptor, [block], offset, flags)


class _Race:
    """Threads that read a file's whole blocks, each the next that nobody has taken."""

    def __init__(self, descriptor: int, size_bytes: int, huge: bool, limit_s: float, stop: threading.Event) -> None:
        self._descriptor = descriptor
        self._huge = huge
        self._blocks = iter(range(0, size_bytes - size_bytes % BLOCK_BYTES, BLOCK_BYTES))
        self._limit_s = limit_s
        self._stop = stop
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._error: OSError | None = None

    def run(self, threads: int) -> float:
        """Bytes per second, or 0 if that cannot be said. Raises OSError."""
        began = time.monotonic()
        readers = [threading.Thread(target=self._read, args=(began + self._limit_s,)) for _ in range(threads)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        elapsed_s = time.monotonic() - began
        if self._error is not None:
            raise self._error
        return 0.0 if self._stop.is_set() else self._read_bytes / elapsed_s

    def _read(self, end: float) -> None:
        block = block_memory(BLOCK_BYTES, huge=self._huge)
        while time.monotonic() < end and not self._stop.is_set() and self._error is None:
            with self._lock:
                offset = next(self._blocks, None)
            if offset is None:
                return
            try:
                count = os.preadv(self._descriptor, [block], offset)
            except OSError as error:
                self._error = error
                return
            with self._lock:
                self._read_bytes += count
