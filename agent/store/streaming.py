"""Reads that pass through a ring of pinned slots on their way to a device: what is not to stay in DRAM, or does not fit there.

A slot is taken when a read is handed to the pool, and comes back when its copies are over. Streams take turns, a unit each.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agent.native.copier import Copier, CopyJob
from agent.native.pinned import HostMemory, Ring
from agent.native.reader import Priority, ReadJob, ReadPool, Unit
from schema.checkpoint import Manifest, Partition
from schema.errors import OutOfSpace

__all__ = ["RING_SLOTS", "SLOT_BYTES", "Stream", "Streams"]

SLOT_BYTES: Final = 4 << 20
RING_SLOTS: Final = 32
"""128 MiB: what a disk wants in flight, and as much again under copies."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of a partition's file, the place in the image of its first byte, and its checksum if it is to be checked."""

    file: Path
    file_bytes: int
    offset: int
    start: int
    size: int
    xxh3: int | None


@dataclass(eq=False)
class Stream:
    """One image on its way through the ring. ``read`` is its job at the disk."""

    copy: CopyJob
    runs: deque[_Run]
    read: ReadJob | None = None
    closed: bool = False
    out: dict[int, tuple[Unit, int, tuple[int, ...]]] = field(default_factory=dict)
    """Units that are being read, by identity, with their place in the image and their slots."""


class Streams:
    """All streams of a store over one ring, which is made when the first of them begins."""

    def __init__(
        self, pool: ReadPool, copier: Copier, host: HostMemory, slots: int = RING_SLOTS, slot_bytes: int = SLOT_BYTES
    ) -> None:
        self._pool = pool
        self._copier = copier
        self._host = host
        self._shape = slots, slot_bytes
        self._ring: Ring | None = None
        self._lock = threading.RLock()
        self._waiting: deque[Stream] = deque()

    @property
    def free_slots(self) -> int:
        return self._shape[0] if self._ring is None else len(self._ring.free)

    def begin(
        self,
        copy: CopyJob,
        directory: Callable[[Partition], Path],
        manifest: Manifest,
        changed: Callable[[ReadJob], None],
        *,
        verifying: bool,
        priority: Priority,
    ) -> Stream:
        """Read an image and hand it to a copy job, run by run.

        Raises OutOfSpace when a chunk that must be checked as a whole is larger than the ring.
        """
        slots, slot_bytes = self._shape
        if verifying and manifest.chunk_bytes > slots * slot_bytes:
            raise OutOfSpace(
                f"the checkpoint's chunks of {manifest.chunk_bytes} bytes are larger than the ring of {slots * slot_bytes} "
                "bytes through which it would be read; give the node a larger arena"
            )
        runs = deque(_runs(directory, manifest, slot_bytes, verifying))
        stream = Stream(copy, runs)
        with self._lock:
            if self._ring is None:
                self._ring = Ring(slots, slot_bytes)
                self._host.add(self._ring.address, self._ring.size_bytes)
            stream.read = self._pool.submit(
                (),
                lambda job: self._changed(stream, job, changed),
                priority=priority,
                unit_done=lambda job, unit: self._arrived(stream, unit),
                last=not runs,
            )
            self._waiting.append(stream)
            self._feed()
        return stream

    def end(self, stream: Stream) -> None:
        """Its read job is over: slots of what was never read come back, if its reads stall when those are over, if ever."""
        with self._lock:
            stream.closed = True
            if stream in self._waiting:
                self._waiting.remove(stream)
            if stream.read is not None and stream.read.finished:
                self._take_back(stream)

    def _changed(self, stream: Stream, job: ReadJob, changed: Callable[[ReadJob], None]) -> None:
        """On a reader's thread."""
        if job.finished:
            with self._lock:
                if stream.closed:
                    self._take_back(stream)
        changed(job)

    def _take_back(self, stream: Stream) -> None:
        for _, _, slots in stream.out.values():
            self._give(slots)
        stream.out.clear()
        self._feed()

    def _arrived(self, stream: Stream, unit: Unit) -> None:
        """On a reader's thread."""
        with self._lock:
            _, start, slots = stream.out.pop(id(unit))
        self._copier.put(stream.copy, start, unit.targets, lambda: self._copied(slots))

    def _copied(self, slots: tuple[int, ...]) -> None:
        """On the copying thread."""
        with self._lock:
            self._give(slots)
            self._feed()

    def _give(self, slots: tuple[int, ...]) -> None:
        assert self._ring is not None
        self._ring.give(slots)

    def _feed(self) -> None:
        """Hand out free slots, a unit to each stream in turn; one that finds too few is the next to get some."""
        assert self._ring is not None
        while self._waiting:
            stream = self._waiting[0]
            if stream.read is None or stream.closed or not stream.runs or stream.read.error is not None:
                self._waiting.popleft()
                continue
            taken = self._ring.take(stream.runs[0].size)
            if taken is None:
                return
            run = stream.runs.popleft()
            unit = Unit(run.file, run.file_bytes, run.offset, taken[1], run.xxh3)
            stream.out[id(unit)] = unit, run.start, taken[0]
            self._pool.feed(stream.read, (unit,), last=not stream.runs)
            self._waiting.rotate(-1)


def _runs(path: Callable[[Partition], Path], manifest: Manifest, slot_bytes: int, verifying: bool) -> Iterator[_Run]:
    """What is read at once: a checksum's chunk while they are checked, else what fills a slot."""
    step = manifest.chunk_bytes if verifying else min(slot_bytes, manifest.chunk_bytes)
    for partition in manifest.partitions:
        file = path(partition)
        for offset in range(0, partition.size_bytes, step):
            size = min(step, partition.size_bytes - offset)
            xxh3 = partition.chunk_xxh3[offset // manifest.chunk_bytes] if verifying else None
            yield _Run(file, partition.size_bytes, offset, partition.start_bytes + offset, size, xxh3)
