"""A remote that is a directory: a share mounted on this node, ``file:///path``."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from agent.store.durable import sync
from agent.store.remote.api import Body, Interrupted, Source, left_s, nothing_there
from agent.store.remote.unfinished import open_unfinished, sweep_unfinished
from schema.errors import Cancelled, InvalidCheckpoint, NotFound, OutOfSpace, SllmError, TimedOut, Unauthorised

__all__ = ["DirectoryRemote"]

_BLOCK_BYTES: Final = 4 << 20
_WRITE_BYTES: Final = 16 << 20
_WRITERS: Final = 4
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MISSING: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_PASSING: Final = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.EHOSTDOWN)


class DirectoryRemote:
    """A `Remote` over a directory. Its root must exist: a share that is not mounted must not be taken for an empty one."""

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self._root = root
        self._stopped = threading.Event()

    def where(self, path: str) -> str:
        return str(self._root / path)

    @contextlib.contextmanager
    def open(
        self, path: str, offset: int, length: int, *, total_bytes: int | None = None, deadline: float | None = None
    ) -> Iterator[Body]:
        with self._errors(path):
            descriptor = os.open(self._root / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidCheckpoint(f"{self.where(path)} is no regular file")
            if total_bytes is not None and status.st_size != total_bytes:
                raise InvalidCheckpoint(f"{self.where(path)} has {status.st_size} bytes; its manifest says {total_bytes}")
            yield _FileBody(self, path, descriptor, offset, deadline)
        finally:
            os.close(descriptor)

    def read(self, path: str, limit_bytes: int, part_s: float | None = None) -> bytes:
        size = self.size(path)
        if size is None:
            raise nothing_there(self.where(path))
        if size > limit_bytes:
            raise InvalidCheckpoint(f"{self.where(path)} has {size} bytes; at most {limit_bytes} are read")
        data = bytearray(size)
        with self.open(path, 0, size) as body:  # which waits for the disk, that knows no trickle
            body.fill(memoryview(data))
        return bytes(data)

    def size(self, path: str) -> int | None:
        try:
            with self._errors(path):
                return (self._root / path).stat().st_size
        except NotFound:
            self._check_root()
            return None

    def children(self, path: str) -> list[str]:
        try:
            with self._errors(path):
                return sorted(each.name for each in (self._root / path).iterdir() if each.is_dir())
        except NotFound:
            self._check_root()
            return []

    def write(self, path: str, size_bytes: int, source: Source, wrote: Callable[[int], None]) -> None:
        self._check_root()
        target = self._root / path
        with self._errors(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished, descriptor = open_unfinished(target)
            keep = False
            try:
                sweep_unfinished(target.parent, os.fstat(descriptor).st_mtime)
                self._fill(descriptor, size_bytes, source, wrote)
                os.ftruncate(descriptor, size_bytes)
                os.fsync(descriptor)
                unfinished.rename(target)
                for directory in target.relative_to(self._root).parents:  # each may have been made just now
                    sync(self._root / directory)
            except OSError as error:
                keep = error.errno in _PASSING  # the next try goes on with it
                raise
            finally:
                if not keep:
                    unfinished.unlink(missing_ok=True)
                os.close(descriptor)

    def abort(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        pass

    def check_stop(self) -> None:
        if self._stopped.is_set():
            raise Cancelled("the transfer was cancelled")

    def _fill(self, descriptor: int, size_bytes: int, source: Source, wrote: Callable[[int], None]) -> None:
        """Several parts at once, so that while some are read and compared others are written. Those that an earlier try has
        written stay."""
        left_bytes = os.fstat(descriptor).st_size

        def part(offset: int) -> None:
            self.check_stop()
            data = source(offset, min(_WRITE_BYTES, size_bytes - offset))
            if offset >= left_bytes or not _lies(descriptor, data, offset):
                self._write(descriptor, data, offset)
            else:
                os.utime(descriptor)  # it goes on: nobody is to take it for left meanwhile
            wrote(len(data))

        with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:
            for _ in pool.map(part, range(0, size_bytes, _WRITE_BYTES)):
                pass  # an error ends this, and what has not been begun

    def _write(self, descriptor: int, view: memoryview, offset: int) -> None:
        while view:
            self.check_stop()
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count

    def _check_root(self) -> None:
        if not self._root.is_dir():
            raise NotFound(f"{self._root} is no directory on this node; mount the share there, or make it")

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        self.check_stop()
        try:
            yield
        except OSError as error:
            raise self.explain(error, path) from error

    def explain(self, error: OSError, path: str) -> SllmError:
        """The error of ours for one of the system's."""
        where = self.where(path)
        if error.errno in _MISSING:
            return nothing_there(where)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return Unauthorised(f"{where}: {error.strerror}; the agent's user needs access to it")
        if error.errno in _FULL:
            return OutOfSpace(f"{where}: {error.strerror}; make room on the remote and publish again")
        if error.errno in _PASSING:
            return Interrupted(f"{where}: {error.strerror}")
        return SllmError(f"{where}: {error.strerror or error}")


def _lies(descriptor: int, data: memoryview, offset: int) -> bool:
    """True when these bytes are there; what cannot be read is to be written anew."""
    found = bytearray(len(data))
    view = memoryview(found)
    try:
        while view and (count := os.preadv(descriptor, [view], offset)):
            view, offset = view[count:], offset + count
    except OSError:
        return False
    return not view and found == data


class _FileBody(Body):
    def __init__(self, remote: DirectoryRemote, path: str, descriptor: int, offset: int, deadline: float | None) -> None:
        self._remote = remote
        self._path = path
        self._descriptor = descriptor
        self._offset = offset
        self._deadline = deadline

    def some(self, view: memoryview) -> int:
        where = self._remote.where(self._path)
        self._remote.check_stop()
        try:
            left_s(self._deadline, 1.0, f"{where} at byte {self._offset}")
        except TimedOut as error:  # as with other remotes, it may pass
            raise Interrupted(str(error)) from error
        try:
            count = os.preadv(self._descriptor, [view[:_BLOCK_BYTES]], self._offset)
        except OSError as error:
            raise self._remote.explain(error, self._path) from error
        if not count:
            raise Interrupted(f"{where} ends at byte {self._offset}, {len(view)} bytes early")
        self._offset += count
        return count
