"""One image on its way to its devices: straight from DRAM, beside its way into DRAM, or through the ring past it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.native.copier import Copier, CopyJob, Target
from agent.native.reader import Priority, ReadJob, Unit
from agent.store import catalog
from agent.store.cache import ArenaStore
from agent.store.catalog import CatalogEntry
from agent.store.fills import read_copy
from agent.store.layers import Layers
from agent.store.streaming import Stream, Streams
from schema.checkpoint import Partition
from schema.errors import Cancelled, Conflict, InvalidCheckpoint, OutOfSpace, SllmError
from schema.states import Tier

__all__ = ["DeviceLoad"]


class DeviceLoad:
    """A `FillSink` that copies what it hears of. One thread owns it; ``wake`` is called when `pump` has something to do.

    ``layer`` is called with the number of layers that are usable, on the copying thread, each time there are more: a worker
    that has the memory mapped may compute with these.
    """

    def __init__(
        self,
        entry: CatalogEntry,
        targets: tuple[Target, ...],
        arena: ArenaStore,
        copier: Copier,
        streams: Streams,
        priority: Priority,
        wake: Callable[[bool], None],
        layer: Callable[[int], None],
    ) -> None:
        manifest = entry.manifest
        self.digest = entry.digest
        self.image_bytes = manifest.image_bytes
        self.read_bytes = 0
        self.source: Tier = Tier.DRAM
        self._entry = entry
        self._arena = arena
        self._copier = copier
        self._streams = streams
        self._priority = priority
        self._wake = wake
        self._layer = layer
        self._layers = Layers(manifest)
        self._told_layers = 0
        self._starts = {_path(entry, part): part.start_bytes for part in manifest.partitions}
        self._verifying = not catalog.is_verified(entry.directory)
        self._borrowed = self._bringing = False
        self._stream: Stream | None = None
        if all(each.digest != self.digest for each in arena.residents()):
            self.source = Tier.DISK
        self._job = copier.submit(targets, self._copied, priority=priority)
        self._bringing = True
        arena.bring(self, self.digest, entry.directory, priority, manifest.image_id)

    @property
    def done_bytes(self) -> int:
        return self._job.copied_bytes

    @property
    def error(self) -> SllmError | None:
        return self._job.error

    def raise_to(self, priority: Priority) -> None:
        """Somebody more urgent waits for it now; it is never lowered."""
        self._priority = min(self._priority, priority)
        self._copier.raise_to(self._job, priority)
        if self._bringing:
            self._arena.raise_to(self.digest, priority)
        if self._stream is not None and self._stream.read is not None:
            self._arena.pool.raise_priority(self._stream.read, priority)

    def cancel(self) -> None:
        """End it as Cancelled; it is over when `pump` says so."""
        self._copier.cancel(self._job)
        if self._bringing:
            self._bringing = False
            self._arena.abandon(self, self.digest)
        if self._stream is not None and self._stream.read is not None:
            self._arena.pool.cancel(self._stream.read)

    def pump(self) -> bool:
        """True when it is over: nothing of it is read, copied or borrowed any more; ``error`` says how it ended."""
        if self._stream is not None:
            read = self._stream.read
            assert read is not None
            if self._job.error is not None:
                self._arena.pool.cancel(read)
            if not read.finished and read.stalled is None:
                return False
            self._end_stream(self._stream, read)
        if not self._job.finished:
            return False
        if self._bringing:
            self._bringing = False
            self._arena.abandon(self, self.digest)
        if self._borrowed:
            self._borrowed = False
            self._arena.give_back(self.digest)
        return True

    # --- FillSink

    def arrived(self, unit: Unit) -> None:
        self._copier.put(self._job, self._starts[unit.file] + unit.offset_bytes, unit.targets)

    def filled(self, read_bytes: int) -> None:
        self._bringing = False
        self._borrowed = True
        self.read_bytes = read_bytes
        self.source = Tier.DISK if read_bytes else Tier.DRAM
        for start, size in self._job.missing(self.image_bytes):
            self._copier.put(self._job, start, self._arena.views(self.digest, start, size))
        self._copier.finish(self._job)

    def failed(self, error: SllmError) -> None:
        self._bringing = False
        if isinstance(error, OutOfSpace | Conflict) and not self._job.copied_bytes:
            try:
                self._begin_stream()
                return
            except SllmError as refused:
                error = refused
        self._copier.fail(self._job, error)

    # --- past DRAM

    def _begin_stream(self) -> None:
        """From the copy's files, if they are still those that the load was begun with."""
        now = read_copy(self._entry.directory, self.digest, self._entry.manifest.image_id)
        if now.quarantined is not None:
            raise InvalidCheckpoint(f"{now.directory} is quarantined: {now.quarantined}")
        self.source = Tier.DISK
        self._stream = self._streams.begin(
            self._job,
            lambda partition: _path(self._entry, partition),
            self._entry.manifest,
            self._changed,
            verifying=self._verifying,
            priority=self._priority,
        )

    def _end_stream(self, stream: Stream, read: ReadJob) -> None:
        self._streams.end(stream)
        self._stream = None
        self.read_bytes = read.done_bytes
        error = read.stalled or read.error
        if error is None and (changed := catalog.changed_source(self._entry.manifest)) is not None:
            error = InvalidCheckpoint(changed)
        if error is None:
            self._copier.finish(self._job)
            if self._verifying:
                catalog.mark(catalog.mark_verified, self._entry.directory, self._entry.identity)
            return
        self._copier.fail(self._job, error)
        if read.corrupt:
            catalog.mark(catalog.quarantine, self._entry.directory, self._entry.identity, str(read.error))
        elif not isinstance(read.error, Cancelled):
            catalog.mark(catalog.unmark_verified, self._entry.directory, self._entry.identity)

    # --- on other threads

    def _changed(self, job: ReadJob) -> None:
        if job.finished or job.stalled is not None:
            self._wake(True)

    def _copied(self, job: CopyJob) -> None:
        layers = self._layers.usable(job.usable_bytes)
        if layers > self._told_layers and job.error is None:
            self._told_layers = layers
            self._layer(layers)
        self._wake(job.finished)


def _path(entry: CatalogEntry, partition: Partition) -> Path:
    return catalog.partition_path(entry.directory, partition)
