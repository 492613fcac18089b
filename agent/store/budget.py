"""What checkpoints take of this node's disk, and whether more may come: the budget of the disk tier.

Counted are the blocks of what is committed, of fetches and of ingests, which claim their room before they write, one after
another; not what is being deleted, nor the sources that are downloaded for an ingest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from agent.store.durable import no_room
from agent.store.temporary import sweep
from schema.errors import OutOfSpace

__all__ = ["check_room", "claim_room", "free_bytes", "used_bytes"]

_BLOCK_BYTES = 512


def used_bytes(data: Path, *, but: Path | None = None) -> int:
    """What lies in a node's data directory of checkpoints, in blocks of the disk; ``but`` a directory that is not counted."""
    roots = [*_children(data / "checkpoints"), *_children(data / "partial")]
    roots += [child for child in _children(data / "tmp") if child.name.startswith("ingest")]
    return sum(_tree_bytes(root, but) for root in roots)


@contextlib.contextmanager
def claim_room(limit_bytes: int, data: Path, need_bytes: int, what: str, *, but: Path | None = None) -> Iterator[None]:
    """Check the budget, and have the disk's room reserved inside, while no other does: two could else find the same room free.

    What fetches and ingests that broke off have left for another try goes before anything is refused. Raises what
    `check_room` does, and OutOfSpace for a disk that is full, telling how much is missing.
    """
    data.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        lies = _tree_bytes(but, None) if but is not None else 0
        free = shutil.disk_usage(data).free
        try:
            check_room(limit_bytes, data, need_bytes, what, but=but)
            short = free + lies < need_bytes
        except OutOfSpace:
            short = True
        if short and (not limit_bytes or need_bytes <= limit_bytes):
            _sweep_kept(data)
            free = shutil.disk_usage(data).free
        if short:
            check_room(limit_bytes, data, need_bytes, what, but=but)  # a disk that is full says so when it is to reserve
        try:
            yield
        except OSError as error:
            if (full := no_room(what, error, data, need_bytes, free, lies)) is None:
                raise
            raise full from error
    finally:
        os.close(descriptor)


def free_bytes(data: Path, need_bytes: int) -> int:
    """What the disk has free; where that is less than is needed, what broken-off fetches and ingests have left goes first."""
    free = shutil.disk_usage(data).free
    if free >= need_bytes:
        return free
    _sweep_kept(data)
    return shutil.disk_usage(data).free


def check_room(limit_bytes: int, data: Path, need_bytes: int, what: str, *, but: Path | None = None) -> None:
    """Raise OutOfSpace, telling how much is missing, when ``what`` would pass the budget; ``limit_bytes`` 0 is none.

    ``but``: a directory that ``what`` itself has begun to fill.
    """
    if not limit_bytes:
        return
    used = used_bytes(data, but=but)
    short = used + need_bytes - limit_bytes
    if short <= 0:
        return
    raise OutOfSpace(
        f"{what} takes {need_bytes} bytes of disk; checkpoints may have {limit_bytes} (node.disk_bytes) and have {used}: "
        f"{short} are missing; remove checkpoints (`sllmctl checkpoint rm`) or raise the budget",
        short_bytes=short if need_bytes <= limit_bytes else 0,
    )


def _sweep_kept(data: Path) -> None:
    for name in ("tmp", "partial"):
        sweep(data / name, kept_alone=True)


def _tree_bytes(path: Path, but: Path | None) -> int:
    if path == but:
        return 0
    try:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            return status.st_blocks * _BLOCK_BYTES if stat.S_ISREG(status.st_mode) else 0
        with os.scandir(path) as found:
            return sum(_tree_bytes(path / entry.name, but) for entry in found)
    except OSError:  # it was moved or deleted just now, or the disk does not say
        return 0


def _children(path: Path) -> Iterator[Path]:
    try:
        with os.scandir(path) as found:
            yield from [path / entry.name for entry in found]
    except (FileNotFoundError, NotADirectoryError):
        return
