"""What a checkpoint's files need to outlive a power loss, to find their room before they are written, and to fail in words."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from schema.errors import OutOfSpace, SllmError

__all__ = ["disk_errors", "replace", "reserve", "sync"]

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


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns a full disk into OutOfSpace, any other disk error into SllmError, naming ``what`` was being done, and the file that
    the error is of where that is another."""
    try:
        yield
    except OSError as error:
        at = "" if error.filename is None or str(error.filename) in what else f"{error.filename}: "
        if error.errno in _FULL:
            raise OutOfSpace(f"{what}: {at}{error.strerror}; free some of the disk and try again") from error
        raise SllmError(f"{what}: {at}{error.strerror or error}") from error
