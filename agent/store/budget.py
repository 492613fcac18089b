"""What checkpoints take of this node's disk, and whether more may come: the budget of the disk tier.

Counted are the blocks of what is committed, of fetches under way and of ingests under way, which claim their room before they
write; not what is being deleted, nor the sources that are downloaded for an ingest.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from schema.errors import OutOfSpace

__all__ = ["check_room", "used_bytes"]

_BLOCK_BYTES = 512


def used_bytes(data: Path, *, but: Path | None = None) -> int:
    """What lies in a node's data directory of checkpoints, in blocks of the disk; ``but`` a directory that is not counted."""
    roots = [*_children(data / "checkpoints"), *_children(data / "partial")]
    roots += [child for child in _children(data / "tmp") if child.name.startswith("ingest")]
    return sum(_tree_bytes(root, but) for root in roots)


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


def _tree_bytes(path: Path, but: Path | None) -> int:
    if path == but:
        return 0
    try:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            return status.st_blocks * _BLOCK_BYTES if stat.S_ISREG(status.st_mode) else 0
        with os.scandir(path) as found:
            return sum(_tree_bytes(path / entry.name, but) for entry in found)
    except FileNotFoundError:  # it was moved or deleted just now
        return 0


def _children(path: Path) -> Iterator[Path]:
    try:
        with os.scandir(path) as found:
            yield from [path / entry.name for entry in found]
    except (FileNotFoundError, NotADirectoryError):
        return
