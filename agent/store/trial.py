"""A store of its own, in this process, for measurements: an arena beside the node's, filled with the store's own code."""

from __future__ import annotations

import resource
import threading
import time
from dataclasses import dataclass
from typing import Final

from agent.native.arena import Arena
from agent.native.calibration import Tuning
from agent.native.reader import ReadJob, ReadPool, Unit
from agent.store.cache import ArenaStore
from agent.store.catalog import CatalogEntry, partition_path
from schema.errors import Fault, TimedOut
from schema.link import Arriving, LayersArrived, Resident

__all__ = ["Timing", "TrialStore", "cpu_s"]

_LIMIT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Timing:
    """What one load took: seconds by the clock, and of processor time in this process."""

    seconds: float
    cpu_s: float


def cpu_s() -> float:
    """Processor time of this process, all threads, user and kernel."""
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


class TrialStore:
    """An `ArenaStore` over a fresh arena for one image, every page of it touched. To be closed; for one thread.

    ``tuning`` is how the node's store reads from this disk, where that was found out.
    """

    def __init__(self, image_bytes: int, *, chunk_bytes: int, reader_threads: int, tuning: Tuning | None = None) -> None:
        chunks = max(1, -(-image_bytes // chunk_bytes))
        self.arena = Arena.create(chunks * chunk_bytes, chunk_bytes)
        zeros = bytes(chunk_bytes)
        for chunk in range(chunks):
            self.arena.views([chunk], 0, chunk_bytes)[0][:] = zeros
        self._reader_threads = reader_threads
        self._tuning = tuning
        self._awake = threading.Event()
        self._ends: list[Resident | Fault] = []
        self._store: ArenaStore | None = None
        self.reader = ""
        """Which of its readers `read` had, once it was called."""

    def fill(self, entry: CatalogEntry) -> tuple[Resident, Timing]:
        """Load as an instance start does, from its manifest on; what the arena held is dropped first."""
        store = self.open_store()
        for resident in store.residents():
            store.hold(resident.digest, 0)
            store.drop(resident.digest)
        self._ends.clear()
        began, began_cpu_s = time.perf_counter(), cpu_s()
        store.fill("trial", entry.digest, entry.directory)
        while not self._ends:
            if not self._awake.wait(_LIMIT_S):
                raise TimedOut(f"loading {entry.directory} made no progress for {_LIMIT_S:.0f} s")
            self._awake.clear()
            store.pump()
        timing = Timing(time.perf_counter() - began, cpu_s() - began_cpu_s)
        end = self._ends.pop()
        if isinstance(end, Fault):
            raise end.to_error()
        return end, timing

    def read(self, entry: CatalogEntry, *, check: bool) -> Timing:
        """Read the files into the arena by the store's reader alone: no manifest, no chunk table, checksums if wanted."""
        self.close_store()
        chunks = range(self.arena.chunks)
        units = [
            Unit(
                partition_path(entry.directory, partition),
                partition.size_bytes,
                number * entry.manifest.chunk_bytes,
                tuple(self.arena.views(chunks, partition.start_bytes + number * entry.manifest.chunk_bytes, length)),
                xxh3 if check else None,
            )
            for partition in entry.manifest.partitions
            for number, xxh3 in enumerate(partition.chunk_xxh3)
            for length in [min(entry.manifest.chunk_bytes, partition.size_bytes - number * entry.manifest.chunk_bytes)]
        ]
        ended = threading.Event()

        def changed(job: ReadJob) -> None:
            if job.finished:
                ended.set()

        pool = ReadPool(self._reader_threads)
        self.reader = pool.backend
        if self._tuning is not None:
            pool.tune(self._tuning)
        try:
            began, began_cpu_s = time.perf_counter(), cpu_s()
            job = pool.submit(units, changed)
            if not ended.wait(_LIMIT_S):
                raise TimedOut(f"reading {entry.directory} took longer than {_LIMIT_S:.0f} s")
            timing = Timing(time.perf_counter() - began, cpu_s() - began_cpu_s)
        finally:
            pool.close()
        if job.error is not None:
            raise job.error
        return timing

    def open_store(self) -> ArenaStore:
        """The store over the arena, its reader running, as a node's is before anybody asks it for something."""
        if self._store is None:
            self._store = ArenaStore(self.arena, self, reader_threads=self._reader_threads, wake=self._awake.set)
            if self._tuning is not None:
                self._store.tune(self._tuning)
        return self._store

    def close_store(self) -> None:
        """End the store over the arena, which stays."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def close(self) -> None:
        """End the store and give the memory back."""
        self.close_store()
        self.arena.close()

    # What an `ArenaStore` says: a StoreListener.

    def progress(self, op: str, done_bytes: int, total_bytes: int) -> None:
        pass

    def arriving(self, message: Arriving | LayersArrived) -> None:
        pass

    def filled(self, op: str, resident: Resident) -> None:
        self._ends.append(resident)

    def failed(self, op: str, digest: str, fault: Fault) -> None:
        self._ends.append(fault)

    def verifying(self, op: str, stage: str, done_bytes: int, total_bytes: int) -> None:
        pass

    def verified(self, op: str, digest: str, fault: Fault | None) -> None:
        pass

    def condemned(self, resident: Resident) -> None:
        pass

    def evicted(self, digest: str, why: str, for_digest: str) -> None:
        pass
