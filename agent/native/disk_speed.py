"""How fast a directory's disk reads: a short look past the page cache, with as many threads as loads use."""

from __future__ import annotations

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

from agent.native.reader import BLOCK_BYTES

__all__ = ["measure_read_bps"]

READ_BYTES: Final = 256 << 20
"""No more is read, however fast the disk."""
SCRATCH_BYTES: Final = 64 << 20
"""What is written where there is no file of that size to read; a file system takes it back at once, also after a crash."""
LEAST_BYTES: Final = 8 << 20
"""Less says more of latency than of bandwidth."""


def measure_read_bps(directory: Path, file: Path | None, *, threads: int, limit_s: float, stop: threading.Event) -> float:
    """Bytes per second of direct reads of ``file``, or of a nameless one made in ``directory`` and gone afterwards.

    Writing and reading take at most ``limit_s`` each, and a block's time. 0 if ``stop`` was set meanwhile, if the file system
    knows no direct I/O, or if it was too slow or too full for a figure. Raises OSError for a directory that cannot be used.
    """
    with ExitStack() as stack:
        if file is not None:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            stack.callback(os.close, descriptor)
        else:
            descriptor = stack.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0)).fileno()
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not _make_direct(descriptor):
            return 0.0
        size_bytes = status.st_size if file is not None else _write(descriptor, limit_s, stop)
        return _Race(descriptor, min(size_bytes, READ_BYTES), limit_s, stop).run(threads)


def _make_direct(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


def _write(descriptor: int, limit_s: float, stop: threading.Event) -> int:
    """Fill a file with what no disk compresses; how many bytes there was time and room for."""
    end = time.monotonic() + limit_s
    with mmap.mmap(-1, BLOCK_BYTES) as block:
        block[:] = os.urandom(BLOCK_BYTES)
        written = 0
        while written < SCRATCH_BYTES and time.monotonic() < end and not stop.is_set():
            try:
                count = os.pwrite(descriptor, block, written)
            except OSError:  # no room, or another alignment than a page's: then that is all
                break
            written += count
            if count < BLOCK_BYTES:
                break
    return written


class _Race:
    """Threads that read a file's whole blocks, each the next that nobody has taken."""

    def __init__(self, descriptor: int, size_bytes: int, limit_s: float, stop: threading.Event) -> None:
        self._descriptor = descriptor
        self._blocks = iter(range(0, size_bytes - size_bytes % BLOCK_BYTES, BLOCK_BYTES))
        self._limit_s = limit_s
        self._stop = stop
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._failed = False

    def run(self, threads: int) -> float:
        """Bytes per second, or 0 if that cannot be said."""
        began = time.monotonic()
        readers = [threading.Thread(target=self._read, args=(began + self._limit_s,)) for _ in range(threads)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        elapsed_s = time.monotonic() - began
        if self._failed or self._stop.is_set() or self._read_bytes < LEAST_BYTES:
            return 0.0
        return self._read_bytes / elapsed_s

    def _read(self, end: float) -> None:
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            while time.monotonic() < end and not self._stop.is_set() and not self._failed:
                with self._lock:
                    offset = next(self._blocks, None)
                if offset is None:
                    return
                try:
                    count = os.preadv(self._descriptor, [block], offset)
                except OSError:
                    self._failed = True
                    return
                with self._lock:
                    self._read_bytes += count
