"""The disk reader of a node: jobs in, bytes in memory out, by whichever way the kernel allows.

Large blocks, fair among jobs of a priority, checked on the way, cancelled at once. A `Reader` does the reading; the pool is
what the rest of the store sees of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from agent.native.calibration import Tuning
from agent.native.jobs import JobQueue, Priority, ReadJob, Unit, cancelled
from agent.native.ring_reader import RingReader
from agent.native.threads import BLOCK_BYTES, ThreadReader
from agent.native.uring import NoRing

__all__ = ["BLOCK_BYTES", "Priority", "ReadJob", "ReadPool", "Reader", "Unit"]

DEPTH: Final = 32
"""Blocks under way at a time, unless told otherwise."""
STALL_S: Final = 30.0
_HELPERS: Final = max(2, min(4, (os.cpu_count() or 1) // 2))
_log = logging.getLogger(__name__)


class Reader(Protocol):
    """A way to read: takes work from its ``queue`` until it is closed."""

    @property
    def name(self) -> str: ...

    @property
    def queue(self) -> JobQueue: ...

    def wake(self) -> None:
        """The queue may have something new."""

    def tune(self, block_bytes: int, depth: int) -> None:
        """Read so from now on."""

    def close(self) -> None:
        """End what reads; every job was ended before. Each is ``finished`` when this returns."""


class ReadPool:
    """Reads for all of the store. ``threads`` bounds how many threads read where io_uring is not to be had.

    ``changed`` of a job is called on a reader's thread after every unit, the last time when it is ``finished``. So is
    ``unit_done``, before it and in the order of completion, once the unit's bytes are in memory and their checksum is right;
    what it raises ends the job. Neither may block.

    ``backend``: "io_uring" (NoRing is raised where there is none), "threads", or "auto". ``block_bytes`` is the longest single
    read, ``depth`` how many of them io_uring has under way. A job with a read that has not come back for ``stall_s`` is
    ``stalled``, and is ``finished`` when that read is over, if ever, since its memory is the kernel's until then.
    """

    def __init__(
        self,
        threads: int,
        *,
        backend: str = "auto",
        block_bytes: int = BLOCK_BYTES,
        depth: int = DEPTH,
        stall_s: float = STALL_S,
    ) -> None:
        self._reader = _reader(threads, backend, block_bytes, depth, stall_s)

    @property
    def backend(self) -> str:
        """How reads are done: "io_uring" or "threads"."""
        return self._reader.name

    def tune(self, tuning: Tuning) -> None:
        """Read so from now on; what is under way goes on as it began."""
        self._reader.tune(tuning.block_bytes, tuning.depth)

    def submit(
        self,
        units: Sequence[Unit],
        changed: Callable[[ReadJob], None],
        *,
        priority: Priority = Priority.REQUEST,
        unit_done: Callable[[ReadJob, Unit], None] | None = None,
        last: bool = True,
    ) -> ReadJob:
        """Read all units in the background, in their order as far as they overlap; more may follow unless they are the last."""
        job = ReadJob(priority, changed, unit_done)
        self._reader.queue.add(job, units, last=last)
        self._reader.wake()
        return job

    def feed(self, job: ReadJob, units: Sequence[Unit], *, last: bool) -> None:
        """More units of a job whose last were not given yet, as memory for them comes free. Without effect once it failed."""
        self._reader.queue.feed(job, units, last=last)
        self._reader.wake()

    def raise_priority(self, job: ReadJob, priority: Priority) -> None:
        """Somebody more urgent waits for a job now; it is never lowered."""
        self._reader.queue.raise_to(job, priority)

    def cancel(self, job: ReadJob) -> None:
        """End a job as Cancelled as soon as its running reads are over; without effect on a finished one."""
        self._reader.queue.end(job, cancelled())
        self._reader.wake()

    def close(self) -> None:
        """Cancel all jobs and end the reader; each job is ``finished`` when this returns."""
        for job in self._reader.queue.jobs:
            self.cancel(job)
        self._reader.close()


def _reader(threads: int, backend: str, block_bytes: int, depth: int, stall_s: float) -> Reader:
    if backend != "threads":
        try:
            return RingReader(block_bytes=block_bytes, depth=depth, helpers=_HELPERS, stall_s=stall_s)
        except NoRing as error:
            if backend == "io_uring":
                raise
            _log.info("%s; reading with %d threads", error, threads)
    return ThreadReader(threads, block_bytes=block_bytes, stall_s=stall_s)
