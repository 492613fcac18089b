"""How fast this node's disk reads: measured when the node is quiet, remembered for a day, and never in a load's way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from agent.config import NodeConfig
from agent.daemon.files import write_atomic
from agent.native.calibration import calibrate
from agent.native.disk_record import DiskRecord, record_path, remembered
from agent.native.disk_speed import SCRATCH_BYTES, measure_read_bps

__all__ = ["DiskSpeed"]

_AGAIN_S: Final = 5.0
"""When to look again whether the node is quiet. It never is at once, so that whom an agent is started for comes first."""
_LIMIT_S: Final = 1.0
_CALIBRATE_S: Final = 2.5
_log = logging.getLogger(__name__)


class DiskSpeed:
    """``read_bps`` of the checkpoints' disk, 0 as long as it is not known. Owned by the agent's loop.

    ``busy`` says whether something starts, loads or ingests, or the node has yet to begin; then a measurement waits. ``huge``
    says, once it has begun, whether the arena has huge pages: into those a disk may read twice as fast as into small ones.
    ``measured`` is called when there is a new figure. The threads that read keep their priority: one of low priority would keep
    the interpreter's lock from the agent's loop.
    """

    def __init__(
        self,
        config: NodeConfig,
        busy: Callable[[], bool],
        huge: Callable[[], bool],
        measured: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = config.checkpoints_path.absolute()
        self._threads = config.reader_threads
        self._place = record_path(config.data_dir)
        self._busy = busy
        self._huge = huge
        self._measured = measured
        self._stop = threading.Event()
        self._closed = False
        record = remembered(self._place, self._directory)
        self.read_bps = record.read_bps if record is not None else 0.0
        self._tuning = record.tuning if record is not None else None
        self._into_huge = record.huge if record is not None else False

    async def run(self) -> None:
        """Measure once the node is quiet, unless it is known; again later if something began meanwhile."""
        while not self._closed:
            if self._busy():
                await asyncio.sleep(_AGAIN_S)
                continue
            if self.read_bps and self._into_huge == self._huge():
                break
            self._into_huge, self._tuning = self._huge(), None
            self._stop.clear()
            try:
                self.read_bps = await asyncio.to_thread(self._measure)
            except OSError as error:
                _log.warning("cannot measure how fast %s reads: %s", self._directory, error)
                return
            if self.read_bps:
                self._measured()
            elif not self._stop.is_set():
                _log.warning("cannot measure how fast %s reads: nothing was read within %g s", self._directory, _LIMIT_S)
                return
        await self._calibrate()

    async def _calibrate(self) -> None:
        """Find out how this disk is read best, once it has something to read; the store looks it up."""
        while self._tuning is None and not self._closed:
            if self._busy() or self._stop.is_set():
                self._stop.clear()
                await asyncio.sleep(_AGAIN_S)
                continue
            file = self._file()
            if file is None:
                return
            try:
                self._tuning = await asyncio.to_thread(
                    calibrate, file, huge=self._into_huge, limit_s=_CALIBRATE_S, stop=self._stop
                )
            except OSError as error:
                _log.warning("cannot find out how to read %s best: %s", self._directory, error)
                return
            if self._tuning is not None:
                block_bytes, depth = self._tuning.block_bytes, self._tuning.depth
                _log.info("%s is read best by %d blocks of %d bytes at a time", self._directory, depth, block_bytes)
                self._remember(self.read_bps)
            elif not self._stop.is_set():
                return

    def give_way(self) -> None:
        """Something is about to begin: end a measurement that is under way, within the time of one block."""
        self._stop.set()

    def close(self) -> None:
        """End for good; the task that runs `run` is cancelled by its owner."""
        self._closed = True
        self._stop.set()

    def _measure(self) -> float:
        began = time.monotonic()
        file = self._file()
        found = measure_read_bps(
            self._directory, file, huge=self._into_huge, threads=self._threads, limit_s=_LIMIT_S, stop=self._stop
        )
        if found:
            _log.info("%s reads %.2f GB/s, measured in %.2f s", self._directory, found / 1e9, time.monotonic() - began)
            self._remember(found)
        return found

    def _file(self) -> Path | None:
        """The largest file of a checkpoint, or None if a file made for the purpose is as good."""
        sizes: dict[Path, int] = {}
        for path in self._directory.glob("*/*/*"):
            with contextlib.suppress(OSError):  # a checkpoint may be dropped meanwhile
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and status.st_size >= SCRATCH_BYTES:
                    sizes[path] = status.st_size
        return max(sizes, key=sizes.__getitem__, default=None)

    def _remember(self, read_bps: float) -> None:
        try:
            device = self._directory.stat().st_dev
            record = DiskRecord(str(self._directory), device, time.time(), read_bps, self._tuning, self._into_huge)
            write_atomic(self._place, msgspec.json.encode(record), durable=False)
        except OSError as error:
            _log.warning("cannot remember how fast %s reads: %s", self._directory, error)
