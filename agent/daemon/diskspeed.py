"""How fast this node's disk reads: measured beside everything else, remembered for a day, and never in a load's way."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from agent.config import NodeConfig
from agent.daemon.files import write_atomic
from agent.native.disk_speed import measure_read_bps

__all__ = ["DiskSpeed"]

_VALID_S: Final = 86400.0
_AGAIN_S: Final = 60.0
"""After it gave way to a load, by when most loads are over."""
_LIMIT_S: Final = 0.4
_FILE_BYTES: Final = 64 << 20
"""Files of checkpoints from this size are read rather than one made for it."""
_log = logging.getLogger(__name__)


class _Remembered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``device`` is the file system's (st_dev); ``measured_at`` is Unix seconds, for it outlives the machine's clock."""

    device: int
    measured_at: float
    read_bps: Annotated[float, Meta(gt=0)]


class DiskSpeed:
    """``read_bps`` of the checkpoints' disk, 0 as long as it is not known. Owned by the agent's loop."""

    def __init__(self, config: NodeConfig) -> None:
        self._directory = config.checkpoints_path
        self._threads = config.reader_threads
        self._place = Path(config.data_dir) / "disk.json"
        self._stop = threading.Event()
        self._closed = False
        self.read_bps = self._remembered()

    async def run(self) -> None:
        """Measure, unless it is known; again after a while if a load came between."""
        while not self.read_bps and not self._closed:
            self._stop.clear()
            try:
                self.read_bps = await asyncio.to_thread(self._measure)
            except OSError as error:
                _log.warning("cannot measure how fast %s reads: %s", self._directory, error)
                return
            if self.read_bps or not self._stop.is_set():
                return
            await asyncio.sleep(_AGAIN_S)

    def give_way(self) -> None:
        """A load is about to begin: end a measurement that is under way, within the time of one block."""
        self._stop.set()

    def close(self) -> None:
        """End for good; the task that runs `run` is cancelled by its owner."""
        self._closed = True
        self._stop.set()

    def _measure(self) -> float:
        files = (child for child in self._directory.glob("*/*/*") if child.is_file() and not child.is_symlink())
        sizes = {child: child.stat().st_size for child in files}
        largest = max(sizes, key=sizes.__getitem__, default=None)
        file = largest if largest is not None and sizes[largest] >= _FILE_BYTES else None
        found = measure_read_bps(self._directory, file, threads=self._threads, limit_s=_LIMIT_S, stop=self._stop)
        if found:
            memory = _Remembered(self._directory.stat().st_dev, time.time(), found)
            write_atomic(self._place, msgspec.json.encode(memory), durable=False)
            _log.info("%s reads %.2f GB/s", self._directory, found / 1e9)
        return found

    def _remembered(self) -> float:
        """What an earlier life measured within a day on the same disk; 0 if there is nothing of the kind."""
        try:
            memory = msgspec.json.decode(self._place.read_bytes(), type=_Remembered)
            same = memory.device == self._directory.stat().st_dev
        except (OSError, msgspec.DecodeError):
            return 0.0
        return memory.read_bps if same and 0 <= time.time() - memory.measured_at < _VALID_S else 0.0
