"""A file that is being written to a shared directory, under another name until it is whole.

What a write left that was killed is gone on with by the next one on the same machine: only there a lock tells for sure that
nobody writes to it any more. Others delete it once nothing new has come of it for long.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from functools import cache
from pathlib import Path
from typing import Final

from agent.store.remote.api import STALE_S

__all__ = ["open_unfinished", "sweep_unfinished"]

_NAME: Final = re.compile(r"\.[0-9a-f]{12}(?:\.[0-9a-f]{12}\..+)?\.part")
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_TRIES: Final = 16


def open_unfinished(target: Path) -> tuple[Path, int]:
    """A file beside ``target`` that nobody else writes to, and its descriptor, which holds it: one that holds what an earlier
    write left, if there is one, else an empty one. Raises OSError.

    What was left is on the disk, and is read from there: what the system remembers of it may never have reached that.
    """
    for left in sorted(target.parent.glob(f".{_machine()}.*.{target.name}.part")):
        with contextlib.suppress(OSError):  # another has just taken, finished or deleted it, or holds it
            descriptor = _hold(left, 0)
            try:
                own = _own(target)
                left.rename(own)
                os.utime(descriptor)  # by the share's own clock
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError:
                os.close(descriptor)
                raise
            return own, descriptor
    for last in range(_TRIES - 1, -1, -1):
        own = _own(target)
        try:
            return own, _hold(own, os.O_CREAT | os.O_EXCL)
        except (BlockingIOError, FileNotFoundError):  # another found it before it was held, and took it
            if not last:
                raise
    raise AssertionError


def sweep_unfinished(directory: Path, now: float) -> None:
    """Delete what writes that were broken off have left; ``now`` is by the share's own clock."""
    for path in directory.iterdir():
        if _NAME.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # another has just finished, or deleted, it
                if now - path.lstat().st_mtime > STALE_S:
                    path.unlink()


def _hold(path: Path, flags: int) -> int:
    """Raises BlockingIOError while another holds it, and OSError of one that cannot be held where it was not made just now."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not flags or isinstance(error, BlockingIOError):  # else the share knows no locks, and nobody can take it
            os.close(descriptor)
            raise
    if flags and not path.exists():  # another held it first, and has finished it
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return descriptor


def _own(target: Path) -> Path:
    """A name that no other write to the same share has too."""
    return target.with_name(f".{_machine()}.{secrets.token_hex(6)}.{target.name}.part")


@cache
def _machine() -> str:
    """This machine since it was started: all who run on it see each other's locks, whatever the share makes of them."""
    return _BOOT.read_text().replace("-", "")[:12]
