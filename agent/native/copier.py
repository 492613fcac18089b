"""Copies from pinned host memory to devices: asynchronous, coalesced, on two streams per device, and nobody waits for one.

One thread makes every call: it queues what has come in, marks it with events, and asks the events from time to time. What comes
in is runs of an image, in any order; each is copied to every target that wants a part of it, so that the bytes of several
devices are read once.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from agent.native.address import address_of
from agent.native.device import DeviceError, DeviceMemory, Driver
from agent.native.pinned import HostMemory
from schema.errors import Cancelled, SllmError

__all__ = ["COPY_BYTES", "Copier", "CopyJob", "Slice", "Target"]

COPY_BYTES: Final = 32 << 20
"""The longest single copy. At 55 GB/s it takes 0.6 ms: long against what a call costs, short for whoever wants to cancel."""
_BATCH_BYTES: Final = 64 << 20
_MAX_FLYING: Final = 64
"""Batches queued on the devices at once; a driver's own queue would block at about a thousand copies."""
_STREAMS: Final = 2
_POLL_S: Final = 0.0005
_AHEAD_S: Final = 0.25
"""How often memory that is to be pinned ahead of need is looked at, until its pages are there."""
_MARK_TRIES: Final = 100
"""How often a stream that refuses an event is asked again before what was queued on it counts as lost with its device."""
_WEIGHTS: Final = (64, 8, 1)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of the image that a device wants, and where in its memory it goes."""

    start_bytes: int
    size_bytes: int
    at_bytes: int


@dataclass(frozen=True, slots=True)
class Target:
    """A device's memory and its part of the image: all of it, or its shard of a tensor-parallel one."""

    memory: DeviceMemory
    slices: tuple[Slice, ...]


@dataclass(slots=True)
class _Piece:
    start: int
    address: int
    size: int
    unit: _Unit


@dataclass(slots=True)
class _Unit:
    """What was put at once: ``done`` is called when none of its ``pieces`` is read any more."""

    pieces: int
    views: tuple[memoryview, ...]
    done: Callable[[], None] | None

    def landed(self) -> None:
        self.pieces -= 1
        if self.pieces <= 0 and self.done is not None:
            self.done()


@dataclass(eq=False)
class CopyJob:
    """One image on its way to its targets. Made by `Copier.submit`; what has no underscore may be read at any time.

    ``copied_bytes`` of the image have arrived, ``usable_bytes`` of them without a gap from its beginning: layers lie in
    execution order, so those below are ready. ``finished``: no copy touches host or device memory any more; ``error`` says
    how it ended.
    """

    targets: tuple[Target, ...]
    priority: int
    _changed: Callable[[CopyJob], None]
    copied_bytes: int = 0
    usable_bytes: int = 0
    error: SllmError | None = None
    finished: bool = False
    _queued: deque[_Piece] = field(default_factory=deque)
    _put: list[tuple[int, int]] = field(default_factory=list)
    _beyond: dict[int, int] = field(default_factory=dict)
    _flying: int = 0
    _last: bool = False
    _clock: float = 0.0

    def missing(self, image_bytes: int) -> list[tuple[int, int]]:
        """Start and size of what was not put yet."""
        gaps, at = [], 0
        for start, end in sorted([*self._put, (image_bytes, image_bytes)]):
            if start > at:
                gaps.append((at, start - at))
            at = max(at, end)
        return gaps

    def _arrived(self, start: int, size: int) -> None:
        self.copied_bytes += size
        self._beyond[start] = size
        while (size := self._beyond.pop(self.usable_bytes, 0)) > 0:
            self.usable_bytes += size


@dataclass(slots=True)
class _Flight:
    job: CopyJob
    pieces: list[_Piece]
    runs: list[tuple[int, int]]
    events: list[Any]
    unmarked: list[Any]
    """Streams that have copies of it and no event yet."""
    tries: int = 0
    failed: bool = False


class Copier:
    """The copying thread. ``changed`` of a job is called on it whenever more has arrived, the last time when it is finished."""

    def __init__(self, driver: Driver, host: HostMemory) -> None:
        self._driver = driver
        self._host = host
        self._condition = threading.Condition()
        self._jobs: list[CopyJob] = []
        self._flights: deque[_Flight] = deque()
        self._streams: dict[int, list[Any]] = {}
        self._turn: dict[int, int] = {}
        self._clock = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="copier")
        self._thread.start()

    def submit(self, targets: Sequence[Target], changed: Callable[[CopyJob], None], *, priority: int = 0) -> CopyJob:
        """A job to `put` runs into; it goes on until `finish`, `cancel` or an error."""
        job = CopyJob(tuple(targets), priority, changed)
        with self._condition:
            if self._closed:
                raise DeviceError("copies to devices have ended in this process; restart the store")
            job._clock = self._clock
            self._jobs.append(job)
        return job

    def put(self, job: CopyJob, start_bytes: int, views: Sequence[memoryview], done: Callable[[], None] | None = None) -> None:
        """Copy a run of the image, which lies in ``views`` and was not put before; ``done`` is called, on the copying thread,
        when that memory is free again, also when it was not copied. From any thread, without waiting."""
        unit = _Unit(0, tuple(views), done)
        pieces, at = [], start_bytes
        for view in views:
            for address, size in self._host.cut(address_of(view), len(view), COPY_BYTES):
                pieces.append(_Piece(at, address, size, unit))
                at += size
        unit.pieces = len(pieces)
        with self._condition:
            if job.finished:
                pieces.clear()
                unit.pieces = 0
            elif not job._queued:
                job._clock = max(job._clock, self._clock)
            job._put.append((start_bytes, at))
            job._queued.extend(pieces)
            self._condition.notify()
        if not pieces:
            unit.landed()

    def finish(self, job: CopyJob) -> None:
        """All was put: the job is finished when it has arrived."""
        with self._condition:
            job._last = True
            self._condition.notify()

    def raise_to(self, job: CopyJob, priority: int) -> None:
        """Somebody more urgent waits for a job now; it is never lowered."""
        with self._condition:
            if priority < job.priority:
                job.priority = priority
                job._clock = min(job._clock, self._clock)  # what it owes was counted at its old weight

    def fail(self, job: CopyJob, error: SllmError) -> None:
        """End a job with this error, once its running copies are over; without effect on one that has ended."""
        with self._condition:
            if not job.finished and job.error is None:
                job.error = error
            self._condition.notify()

    def cancel(self, job: CopyJob) -> None:
        """End a job as Cancelled."""
        self.fail(job, Cancelled("the copy to the device was cancelled"))

    def close(self) -> None:
        """Cancel all jobs, end the thread and unpin; each job is ``finished`` when this returns."""
        with self._condition:
            jobs = list(self._jobs)
        for job in jobs:
            self.cancel(job)
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # the thread has no caller, and whoever waits for a job must hear of its end
            _log.critical("copying to devices has failed for good", exc_info=error)
            with self._condition:
                self._closed = True
                jobs, self._jobs = self._jobs, []
            for job in jobs:
                job.error = job.error or SllmError(f"copying to devices failed: {type(error).__name__}: {error}")
                job.finished = True
                job._changed(job)

    def _serve(self) -> None:
        while True:
            with self._condition:
                work = self._take()
                ended = self._ended()
                if work is None and not ended and not self._flights and self._closed and not self._jobs:
                    break
            for job in ended:
                self._end(job)
            if work is not None:
                self._issue(*work)
            landed = self._collect()
            if work is None and not landed and not ended:
                self._rest()
        for streams in self._streams.values():
            for stream in streams:
                self._driver.close_stream(stream)
        self._host.close()

    def _rest(self) -> None:
        """Nothing to do: pin ahead where that is left, else wait for work, or a while for copies under way."""
        if not self._flights and not self._closed and self._host.pin_next():
            return
        with self._condition:
            queued = any(job._queued and job.error is None for job in self._jobs)
            over = any(not job._flying and (job.error or (job._last and not job._queued)) for job in self._jobs)
            if over or self._closed or (queued and len(self._flights) < _MAX_FLYING):
                return
            self._condition.wait(_POLL_S if self._flights else _AHEAD_S if self._host.waiting else None)

    def _take(self) -> tuple[CopyJob, list[_Piece]] | None:
        """A batch of the job whose turn it is: by weight of priority, so that a prefetch never starves."""
        ready = [job for job in self._jobs if job._queued and job.error is None]
        if not ready or len(self._flights) >= _MAX_FLYING:
            return None
        job = min(ready, key=lambda each: (each._clock, each.priority))
        pieces: list[_Piece] = []
        size = 0
        while job._queued and (not pieces or size + job._queued[0].size <= _BATCH_BYTES):
            pieces.append(job._queued.popleft())
            size += pieces[-1].size
        self._clock = job._clock
        job._clock += size / _WEIGHTS[job.priority]
        job._flying += 1
        return job, sorted(pieces, key=lambda piece: piece.start)

    def _ended(self) -> list[CopyJob]:
        """Jobs that are over, with what was queued of them and will not be copied."""
        ended = [job for job in self._jobs if not job._flying and (job.error or (job._last and not job._queued))]
        for job in ended:
            self._jobs.remove(job)
        return ended

    def _end(self, job: CopyJob) -> None:
        with self._condition:
            left, job._queued = job._queued, deque()
            job.finished = True
        for piece in left:
            piece.unit.landed()
        job._changed(job)

    def _issue(self, job: CopyJob, pieces: list[_Piece]) -> None:
        """Queue a batch: adjacent pieces as one copy, to each target what it wants of them, and an event per stream used."""
        flight = _Flight(job, pieces, [], [], [])
        try:
            for start, address, size in self._merged(pieces):
                self._host.pin(address)
                for target in job.targets:
                    for part, at, length in _wanted(target, start, size):
                        stream = self._stream(target.memory.device)
                        if stream not in flight.unmarked:
                            flight.unmarked.append(stream)
                        self._driver.copy(stream, target.memory, at, address + part, length)
                flight.runs.append((start, size))
        except SllmError as error:
            flight.failed = True
            self.fail(job, error)
        self._mark(flight)
        self._flights.append(flight)

    def _mark(self, flight: _Flight) -> None:
        """An event after all that was queued of this flight on each stream."""
        while flight.unmarked:
            try:
                flight.events.append(self._driver.record(flight.unmarked[-1]))
            except SllmError as error:
                flight.failed = True
                flight.tries += 1
                self.fail(flight.job, error)
                if flight.tries < _MARK_TRIES:
                    return
            flight.unmarked.pop()

    def _merged(self, pieces: list[_Piece]) -> list[tuple[int, int, int]]:
        """Start, address and size of copies: pieces that adjoin in the image and in memory, within one step, are one."""
        merged: list[tuple[int, int, int]] = []
        for piece in pieces:
            if merged:
                start, address, size = merged[-1]
                adjoins = start + size == piece.start and address + size == piece.address
                if adjoins and size + piece.size <= COPY_BYTES and piece.address < self._host.step_end(address):
                    merged[-1] = start, address, size + piece.size
                    continue
            merged.append((piece.start, piece.address, piece.size))
        return merged

    def _stream(self, device: int) -> Any:
        streams = self._streams.setdefault(device, [])
        turn = self._turn[device] = (self._turn.get(device, -1) + 1) % _STREAMS
        while len(streams) <= turn:
            streams.append(self._driver.stream(device))
        return streams[turn]

    def _collect(self) -> bool:
        """Take in the batches whose events have all occurred, in any order; True if there was one."""
        landed = []
        for flight in self._flights:
            self._mark(flight)
            try:
                while flight.events and self._driver.occurred(flight.events[-1]):
                    self._driver.close_event(flight.events.pop())
            except DeviceError as error:
                flight.failed = True
                self.fail(flight.job, error)
                self._driver.close_event(flight.events.pop())
            if not flight.events and not flight.unmarked:
                landed.append(flight)
        for flight in landed:
            self._flights.remove(flight)
            self._land(flight)
        return bool(landed)

    def _land(self, flight: _Flight) -> None:
        job = flight.job
        if not flight.failed:
            for start, size in flight.runs:
                job._arrived(start, size)
        for piece in flight.pieces:
            piece.unit.landed()
        with self._condition:
            job._flying -= 1
        if job.error is None:
            job._changed(job)


def _wanted(target: Target, start: int, size: int) -> list[tuple[int, int, int]]:
    """What a target wants of a run: offset in the run, place in its memory, and length."""
    parts = []
    for piece in target.slices:
        low, high = max(start, piece.start_bytes), min(start + size, piece.start_bytes + piece.size_bytes)
        if low < high:
            parts.append((low - start, piece.at_bytes + low - piece.start_bytes, high - low))
    return parts
