"""One checkpoint on its way into the arena: who asked, what is read to where, and what its end says of the copy on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Protocol

from agent.native.arena import Arena
from agent.native.chunk_table import Occupant
from agent.native.reader import Priority, ReadJob, Unit
from agent.store import catalog
from agent.store.api import FillSink
from agent.store.layers import Layers
from schema.checkpoint import Manifest
from schema.errors import Conflict, InvalidCheckpoint, SllmError

__all__ = ["Fill", "FillSource", "changed_meanwhile", "clash", "fill_units", "read_copy"]


class FillSource(Protocol):
    """Where an image comes from that is not on the disk yet; its jobs are as those of a `ReadPool`."""

    @property
    def manifest(self) -> Manifest: ...

    def submit(
        self,
        units: Sequence[Unit],
        changed: Callable[[ReadJob], None],
        *,
        priority: Priority,
        unit_done: Callable[[ReadJob, Unit], None] | None = None,
    ) -> ReadJob: ...

    def do_without(self) -> None:
        """There is no memory for the image now, or it is there already."""


@dataclass(slots=True)
class Fill:
    """A checkpoint on its way in, for all ``ops`` that asked. ``occupant`` and ``job`` are there once it is being read, and
    ``copy`` is then the identity of what is read.

    ``image_id`` is what who asked expects to find, "" if that is not known, and what is read once it is.
    ``layers`` are those of an image whose layers come in the order in which they are used; ``offered`` the ops that were told
    where it comes to lie, and of ``told_layers``.
    """

    digest: str
    directory: Path
    ops: list[str]
    priority: Priority
    source: FillSource | None = None
    occupant: Occupant | None = None
    job: ReadJob | None = None
    manifest: Manifest | None = None
    image_id: str = ""
    copy: catalog.Identity | None = None
    image_bytes: int = 0
    verifying: bool = False
    given_up: bool = False
    stalled: bool = False
    sinks: tuple[FillSink, ...] = ()
    begun_at: float = 0.0
    told_at: float = 0.0
    told_bytes: int = -1
    layers: Layers | None = None
    told_layers: int = 0
    offered: set[str] = field(default_factory=set)

    @property
    def usable_layers(self) -> int:
        """How many layers, and all that is before them, are in memory and right."""
        return 0 if self.layers is None or self.job is None else self.layers.usable(self.job.prefix_bytes)

    def left_s(self, now: float) -> float:
        """How long the rest takes, if it comes as fast as what has come from there."""
        done, spared = (0, 0) if self.job is None else (self.job.done_bytes, self.job.spared_bytes)
        return inf if done <= spared else (self.image_bytes - done) * (now - self.begun_at) / (done - spared)

    def arrived(self, job: ReadJob, unit: Unit) -> None:
        """On a reader's thread: bytes that lie in the arena now go on to whoever wants them."""
        for sink in self.sinks:
            sink.arrived(unit)


def fill_units(
    arena: Arena, directory: Path, manifest: Manifest, chunks: Sequence[int], verifying: bool, least_bytes: int
) -> Iterator[Unit]:
    """The checksums' chunks, or as many of them together as make ``least_bytes``, where none is looked at."""
    together = max(1, least_bytes // manifest.chunk_bytes)
    step = together * manifest.chunk_bytes
    for partition in manifest.partitions:
        file = catalog.partition_path(directory, partition)
        for number in range(0, len(partition.chunk_xxh3), together):
            offset = number * manifest.chunk_bytes
            length = min(step, partition.size_bytes - offset)
            yield Unit(
                file,
                partition.size_bytes,
                offset,
                tuple(arena.views(chunks, partition.start_bytes + offset, length)),
                partition.chunk_xxh3[number] if verifying else None,
            )


def read_copy(directory: Path, digest: str, image_id: str) -> catalog.CatalogEntry:
    """What lies in a directory now, in quarantine or not. Raises Conflict if that is another image of the digest than was meant
    ("" is any), and what `catalog.read_entry` raises."""
    entry = catalog.read_entry(directory)
    if entry.digest != digest:
        raise InvalidCheckpoint(f"{directory} holds checkpoint {entry.digest}, not {digest}")
    if image_id not in ("", entry.manifest.image_id):
        raise Conflict(f"another copy lies in {directory} now: it was replaced; try again")
    return entry


def changed_meanwhile(fill: Fill) -> SllmError | None:
    """A user's file that was written to while it was loaded: what has come may be of neither state."""
    if fill.source is not None or fill.manifest is None or (changed := catalog.changed_source(fill.manifest)) is None:
        return None
    return InvalidCheckpoint(changed)


def clash(digest: str, here: str, asked: str) -> Conflict | None:
    """What is said when another image of a digest is asked for than lies here, or comes; None where that is not known."""
    if not here or not asked or here == asked:
        return None
    return Conflict(
        f"checkpoint {digest} lies in memory from another copy, its tensors at other places; this one cannot be loaded "
        "beside that; stop the instances that use it, if any do, then try again"
    )
