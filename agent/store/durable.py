"""What a checkpoint's files need to outlive a power loss, to find their room before they are written, and to fail in words."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from schema.errors import OutOfSpace, SllmError

__all__ = ["disk_errors", "reserve", "sync"]

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
