"""A file as readers open it: twice, through the page cache and past it, and what its errors mean to a job."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from pathlib import Path

from agent.native.cachestat import cached_pages
from agent.native.jobs import Unit
from schema.errors import InvalidCheckpoint, SllmError, TimedOut

__all__ = ["DIRECT_ALIGN_BYTES", "OpenFile", "allow_open_files", "stalled", "wrong_checksum"]

DIRECT_ALIGN_BYTES = 4096
"""Direct reads begin and end at multiples of this, in the file and in memory."""


def allow_open_files() -> None:
    """Let this process open as many files as the system allows it: a checkpoint of 200 shards takes 400 while it is read."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class OpenFile:
    """``cached`` reads through the page cache; ``direct`` past it, -1 where the file system does not know that.

    ``use_direct``, ``try_cache`` (reads that must not wait) and ``ask_cache`` (cachestat) are lowered by the reader when the
    system turns out to refuse them.
    Raises InvalidCheckpoint for what is missing, no regular file, or not of ``size_bytes``.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.cached = self._open(os.O_NONBLOCK)
        self.direct = -1
        status = os.fstat(self.cached)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
            os.close(self.cached)
            raise InvalidCheckpoint(f"{path} has {status.st_size} bytes; its manifest says {size_bytes}")
        with contextlib.suppress(SllmError):  # a file system that knows no direct reads says so when it opens
            self.direct = self._open(os.O_DIRECT)
        self.use_direct = self.try_cache = self.ask_cache = self.direct >= 0

    def _open(self, flags: int) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                raise InvalidCheckpoint(f"cannot open {self.path}: {error.strerror}") from error
            raise SllmError(f"cannot open {self.path}: {error.strerror}") from error

    def in_cache(self, offset: int, length: int) -> bool | None:
        """Whether all of a range lies in the page cache; None if only a read that must not wait can tell.

        Asked with cachestat where there is one: since Linux 6.0 a read that must not wait starts reading ahead what it did
        not find, which here halved the bandwidth of the direct reads that followed.
        """
        if not self.try_cache:
            return False
        if self.ask_cache:
            try:
                found, pages = cached_pages(self.cached, offset, length)
            except OSError:
                self.ask_cache = False
            else:
                return found >= pages
        return None

    def failed(self, offset: int, why: str | None) -> SllmError:
        """The error of a read that the system refused."""
        return SllmError(f"cannot read {self.path} at byte {offset}: {why}")

    def short(self, offset: int) -> SllmError:
        """The error of a file that has become shorter than it was when it was opened."""
        return InvalidCheckpoint(f"{self.path} ends at byte {offset}; its manifest says {self.size_bytes}")

    def close(self) -> None:
        os.close(self.cached)
        if self.direct >= 0:
            os.close(self.direct)


def stalled(path: Path, offset: int | None, stall_s: float) -> SllmError:
    """The error of a read, or of an opening, that does not come back: a dead disk, or a server that does not answer."""
    what = f"opening {path}" if offset is None else f"reading {path} at byte {offset}"
    return TimedOut(f"{what} has not come back for {stall_s:g} s; look at the disk")


def wrong_checksum(unit: Unit, found: int) -> SllmError:
    """The error of a unit whose bytes are not what was ingested."""
    return InvalidCheckpoint(
        f"{unit.file}: the {unit.size_bytes} bytes at offset {unit.offset_bytes} are not what was "
        f"ingested (xxh3 {found:016x}, expected {unit.xxh3:016x}); ingest the model again"
    )
