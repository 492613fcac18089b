"""What a checkpoint's files need to outlive a power loss, and to find their room before they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["reserve", "sync"]


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
