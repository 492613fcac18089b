"""The disk reader of a node: jobs in, bytes in memory out, by whichever way the kernel allows.

Large blocks, fair among jobs of a priority, checked on the way, cancelled at once. A `Reader` does the reading; the pool is
what the rest of the store sees of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from agent.native.jobs import JobQueue, Priority, ReadJob, Unit, cancelled
from agent.native.threads import BLOCK_BYTES, ThreadReader

__all__ = ["BLOCK_BYTES", "Priority", "ReadJob", "ReadPool", "Reader", "Unit"]


class Reader(Protocol):
    """A way to read: takes work from its ``queue`` until it is closed."""

    @property
    def name(self) -> str: ...

    @property
    def queue(self) -> JobQueue: ...

    def wake(self) -> None:
        """The queue may have something new."""

    def close(self) -> None:
        """End what reads; every job was ended before. Each is ``finished`` when this returns."""


class ReadPool:
    """Reads for all of the store. ``threads`` bounds how many threads read where io_uring is not to be had.

    ``changed`` of a job is called on a reader's thread after every unit, the last time when it is ``finished``. So is
    ``unit_done``, before it and in the order of completion, once the unit's bytes are in memory and their checksum is right;
    what it raises ends the job. Neither may block.
    """

    def __init__(self, threads: int) -> None:
        self._reader: Reader = ThreadReader(threads)

    @property
    def backend(self) -> str:
        """How reads are done: "io_uring" or "threads"."""
        return self._reader.name

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
