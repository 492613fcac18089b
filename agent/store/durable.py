"""What a checkpoint's files need to outlive a power loss, to find their room before they are written, and to fail in words."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from schema.errors import OutOfSpace, SllmError

__all__ = ["disk_errors", "no_room", "replace", "reserve", "sync"]

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_EXCHANGE: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV)
"""What a file system says that cannot let two directories change places, or not these two."""
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Claim the room at once: a full disk shows before hours of reading, and the file lies in long runs. Raises OSError."""
    if not size:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def replace(new: Path, old: Path, away: Path) -> None:
    """Put a directory in the place of another, which is moved ``away``; all of one file system. Raises OSError.

    In one step, so that whoever looks finds one of them, as does who looks after a power loss. Where the file system cannot do
    that there is nothing for a moment; and the old one again, if the new one could not be moved there.
    """
    try:
        _exchange(new, old)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        old.rename(away)
        try:
            new.rename(old)
        except OSError:
            with contextlib.suppress(OSError):
                away.rename(old)
            raise
    else:
        new.rename(away)


def _exchange(one: Path, other: Path) -> None:
    call = getattr(_libc, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one), None, str(other))


def no_room(what: str, error: OSError, place: Path, need_bytes: int, free_bytes: int, lie_bytes: int = 0) -> OutOfSpace | None:
    """What is said of a disk that does not take ``need_bytes``, of which ``lie_bytes`` lie there; None for another error.

    ``free_bytes`` were free on the disk of ``place`` before they were asked for: what was refused may have filled it.
    """
    if error.errno not in _FULL:
        return None
    short = need_bytes - lie_bytes - free_bytes
    missing = f": at least {short} are missing" if short > 0 else ""  # else it is a quota, or how large a file may be
    return OutOfSpace(
        f"{error.strerror}: {what} needs {need_bytes - lie_bytes} more bytes of disk, and {place} has {free_bytes} free"
        f"{missing}; free some of that disk and try again"
    )


@contextlib.contextmanager
def disk_errors(what: str, place: Path | None = None, need_bytes: int = 0) -> Iterator[None]:
    """Turns a full disk into OutOfSpace, any other disk error into SllmError, naming ``what`` was being done, and the file that
    the error is of where that is another.

    Of a full disk it is told what it has free, which is that of ``place``, and how many bytes are needed there in all.
    """
    try:
        yield
    except OSError as error:
        at = "" if error.filename is None or str(error.filename) in what else f"{error.filename}: "
        if error.errno in _FULL:
            room = _room(place, need_bytes)
            raise OutOfSpace(f"{what}: {at}{error.strerror}{room}; free some of the disk and try again") from error
        raise SllmError(f"{what}: {at}{error.strerror or error}") from error


def _room(place: Path | None, need_bytes: int) -> str:
    if place is None:
        return ""
    need = f"; it takes {need_bytes} bytes in all" if need_bytes else ""
    for each in (place, *place.parents):  # it may not be made yet
        with contextlib.suppress(OSError):
            return f"{need}; {place} has {shutil.disk_usage(each).free} free"
    return need
