"""What is to be read, for whom, and in which order: the queue that every reader takes its work from.

Jobs of one priority share fairly by bytes; a higher one goes first, without starving the rest: each has a clock that a unit
of its work moves on by bytes over weight, and the job whose clock is furthest behind goes next (stride scheduling, Waldspurger
and Weihl 1995). A job that comes, or comes back after it had nothing to read, starts at the present, so that nobody saves up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final

from schema.errors import Cancelled, SllmError

__all__ = ["JobQueue", "Priority", "ReadJob", "Unit", "Work"]


class Priority(IntEnum):
    """Who waits for a read, the most urgent first."""

    REQUEST = 0
    """An instance that starts."""
    PREFETCH = 1
    """Ahead of need."""
    BACKGROUND = 2
    """Verify and scrub: nobody waits."""


_WEIGHTS: Final = {Priority.REQUEST: 64, Priority.PREFETCH: 8, Priority.BACKGROUND: 1}


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of a file and the memory it goes to, in pieces. ``xxh3`` is its expected checksum, None to trust it."""

    file: Path
    file_bytes: int
    offset_bytes: int
    targets: tuple[memoryview, ...]
    xxh3: int | None = None

    @property
    def size_bytes(self) -> int:
        return sum(len(target) for target in self.targets)


@dataclass(frozen=True, slots=True)
class Work:
    """A unit of a job on its way; ``number`` counts the job's units from 0. Without a unit, the job is to be ended."""

    job: ReadJob
    unit: Unit | None
    number: int


@dataclass(eq=False)
class ReadJob:
    """Units to be read, for one asker. Made by `ReadPool.submit`; what has no underscore may be read at any time.

    ``error``, once set, is how the job ends; ``corrupt`` says that it is a wrong checksum: the copy on disk is bad, whoever
    reads it. ``finished``: no reader touches the job's memory any more. It is set once, then ``changed`` is called.
    ``stalled``: a read of it does not come back; the job has ended as good as, but its memory is the kernel's.
    ``done_bytes`` are in memory and right, ``prefix_bytes`` of them without a gap from the job's first unit on; of them
    ``spared_bytes`` were at hand, and say nothing of how fast the others come.
    """

    priority: Priority
    _changed: Callable[[ReadJob], None]
    _unit_done: Callable[[ReadJob, Unit], None] | None = None
    done_bytes: int = 0
    prefix_bytes: int = 0
    spared_bytes: int = 0
    error: SllmError | None = None
    corrupt: bool = False
    finished: bool = False
    stalled: SllmError | None = None
    _pending: deque[Unit] = field(default_factory=deque)
    _last: bool = False
    _running: int = 0
    _clock: float = 0.0
    _taken: int = 0
    _prefix_units: int = 0
    _beyond: dict[int, int] = field(default_factory=dict)

    def _arrived(self, number: int, size_bytes: int) -> None:
        self.done_bytes += size_bytes
        self._beyond[number] = size_bytes
        while (size := self._beyond.pop(self._prefix_units, None)) is not None:
            self.prefix_bytes += size
            self._prefix_units += 1


class JobQueue:
    """The jobs of one pool. ``condition`` guards all of it, and is notified when `take` may have something new.

    ``ended`` is called, on the thread that settles, before a job is ``finished``: the reader closes what it has open for it.
    """

    def __init__(self, ended: Callable[[ReadJob], None]) -> None:
        self._ended = ended
        self.condition = threading.Condition()
        self._jobs: list[ReadJob] = []
        self._clock = 0.0

    @property
    def jobs(self) -> tuple[ReadJob, ...]:
        with self.condition:
            return tuple(self._jobs)

    def add(self, job: ReadJob, units: Sequence[Unit], *, last: bool) -> None:
        with self.condition:
            job._clock = self._clock
            job._pending.extend(units)
            job._last = last
            self._jobs.append(job)
            self.condition.notify_all()

    def feed(self, job: ReadJob, units: Sequence[Unit], *, last: bool) -> None:
        """More units; without effect on a job that has failed or was cancelled. Raises ValueError after the last ones."""
        with self.condition:
            if job.error is not None:
                return
            if job._last:
                raise ValueError("the job was given its last units before")
            if not job._pending:
                job._clock = max(job._clock, self._clock)
            job._pending.extend(units)
            job._last = last
            self.condition.notify_all()

    def raise_to(self, job: ReadJob, priority: Priority) -> None:
        with self.condition:
            if priority < job.priority:
                job.priority = priority
                job._clock = min(job._clock, self._clock)  # what it owes was counted at its old weight

    def end(self, job: ReadJob, error: SllmError) -> None:
        """What is not yet begun of a job will not be; it ends with this error unless it has another or is finished."""
        with self.condition:
            if not job.finished and job.error is None:
                job.error = error
                job._pending.clear()
            self.condition.notify_all()

    def stall(self, job: ReadJob, error: SllmError) -> None:
        """A read of the job does not come back, which it says to whoever waits. It is ``finished`` if the read ever is over."""
        with self.condition:
            job.stalled = job.stalled or error
        self.end(job, error)
        job._changed(job)

    def take(self) -> Work | None:
        """The next thing to do, or None. To be called with ``condition`` held, and answered with `settle`."""
        ready = [job for job in self._jobs if job._pending or (not job._running and (job._last or job.error is not None))]
        if not ready:
            return None
        job = min(ready, key=lambda each: (each._clock, each.priority))
        job._running += 1
        if not job._pending:
            return Work(job, None, 0)
        unit = job._pending.popleft()
        self._clock = job._clock
        job._clock += unit.size_bytes / _WEIGHTS[job.priority]
        job._taken += 1
        return Work(job, unit, job._taken - 1)

    def settle(self, work: Work, error: SllmError | None, *, corrupt: bool = False) -> None:
        """A unit's memory is right, or will not be. Calls back, ``unit_done`` before the job can finish."""
        job, unit = work.job, work.unit
        if unit is not None and error is None and job.error is None:
            with self.condition:
                job._arrived(work.number, unit.size_bytes)
            if job._unit_done is not None:
                try:
                    job._unit_done(job, unit)
                except Exception as raised:  # a reader has no caller: whatever it is, it is the job's end
                    error = SllmError(f"what follows a read of {unit.file} failed: {type(raised).__name__}: {raised}")
        with self.condition:
            job._running -= 1
            if error is not None and job.error is None:
                job.error, job.corrupt = error, corrupt
                job._pending.clear()
            finished = not job._running and not job._pending and (job._last or job.error is not None)
            if finished:
                self._jobs.remove(job)
        if finished:
            self._ended(job)
            job.finished = True
        if finished or job.error is None:
            job._changed(job)


def cancelled() -> Cancelled:
    """How a cancelled job ends."""
    return Cancelled("the read was cancelled")
