"""What was measured of a disk, as the agent writes it down and the store reads it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from agent.native.calibration import Tuning

__all__ = ["DiskRecord", "record_path", "remembered"]

_VALID_S: Final = 86400.0


class DiskRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``path`` is the checkpoints', ``device`` their file system's (st_dev); ``measured_at`` is Unix seconds, since it outlives
    the machine's clock. ``tuning`` is None as long as it was not calibrated. ``huge``: read into huge pages, as the arena's."""

    path: str
    device: int
    measured_at: float
    read_bps: Annotated[float, Meta(gt=0)]
    tuning: Tuning | None = None
    huge: bool = False


def record_path(data_dir: str | Path) -> Path:
    """Where a node keeps it."""
    return Path(data_dir) / "disk.json"


def remembered(place: Path, directory: Path) -> DiskRecord | None:
    """What was measured within a day on the disk of this directory, or None."""
    try:
        record = msgspec.json.decode(place.read_bytes(), type=DiskRecord)
        same = (record.path, record.device) == (str(directory), directory.stat().st_dev)
    except (OSError, ValueError):  # ValueError: not JSON, not UTF-8, or not what is written here
        return None
    return record if same and 0 <= time.time() - record.measured_at < _VALID_S else None
