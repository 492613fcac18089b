"""Committed checkpoints of arbitrary bytes, made directly, and a listener that keeps what it was told."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agent.native.arena import Arena
from agent.native.mapping import ImageMapping
from agent.native.reader import Priority, ReadJob, ReadPool, Unit
from agent.store.cache import ArenaStore
from schema.checkpoint import FORMAT_VERSION, PAD_BYTES, KvGeometry, Manifest, Partition, TextDefaults, encode_manifest
from schema.errors import Fault, SllmError
from schema.link import Arriving, LayersArrived, Resident

CHUNK = 2 << 20


def commit(
    root: Path,
    number: int,
    size_bytes: int,
    *,
    partitions: int = 1,
    checksum_bytes: int = CHUNK,
    layer_ends: tuple[int, ...] = (),
) -> tuple[str, Path, bytes]:
    """A checkpoint of seeded bytes under ``root``; returns its digest, its directory and its image."""
    digest = f"{number:064x}"
    directory = root / digest / "exec1"
    directory.mkdir(parents=True)
    image = b""
    entries = []
    for index in range(partitions):
        data = _seeded(number, index, size_bytes)
        file = f"partition_{index}.bin"
        (directory / file).write_bytes(data)
        sums = tuple(xxhash.xxh3_64_intdigest(data[at : at + checksum_bytes]) for at in range(0, len(data), checksum_bytes))
        entries.append(Partition(file, len(image), len(data), sums))
        image += data
    manifest = Manifest(
        format_version=FORMAT_VERSION, digest=digest, layout="exec1", architecture="LlamaForCausalLM", parameters=0,
        vocab_size=1, max_context_tokens=1, chunk_bytes=checksum_bytes, partitions=tuple(entries), tensors=(), ties={},
        kv=KvGeometry(1, 1, 1, "F32"), config={}, text=TextDefaults(), assets=(), layer_ends=layer_ends,
    )  # fmt: skip
    (directory / "manifest.json").write_bytes(encode_manifest(manifest))
    return digest, directory, image


@lru_cache(maxsize=16)
def _seeded(number: int, index: int, size_bytes: int) -> bytes:
    """Random bytes and their padding; tests ask for the same few again and again."""
    return np.random.default_rng((number, index)).bytes(size_bytes) + bytes(-size_bytes % PAD_BYTES)


def read_image(descriptor: int, resident: Resident) -> bytes:
    mapping = ImageMapping(descriptor, resident.extents, resident.image_bytes)
    data = bytes(mapping.buffer)
    mapping.close()
    return data


@dataclass
class Told:
    """A StoreListener that keeps everything, and waits for answers by pumping the store."""

    steps: list[tuple[str, int, int]] = field(default_factory=list)
    resident: dict[str, Resident] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    coming: list[Arriving | LayersArrived] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    evictions: list[tuple[str, str, str]] = field(default_factory=list)
    """What went, why, and for which other."""
    verdicts: dict[str, Fault | None] = field(default_factory=dict)
    bad: list[Resident] = field(default_factory=list)

    def progress(self, op: str, done_bytes: int, total_bytes: int) -> None:
        self.steps.append((op, done_bytes, total_bytes))

    def arriving(self, message: Arriving | LayersArrived) -> None:
        assert message.op not in self.resident.keys() | self.faults.keys(), f"{message.op} was answered before"
        self.coming.append(message)

    def filled(self, op: str, resident: Resident) -> None:
        assert not op or op not in self.resident.keys() | self.faults.keys(), f"{op} was answered twice"
        self.resident[op] = resident

    def failed(self, op: str, digest: str, fault: Fault) -> None:
        assert op not in self.resident.keys() | self.faults.keys(), f"{op} was answered twice"
        self.faults[op] = fault

    def verifying(self, op: str, stage: str, done_bytes: int, total_bytes: int) -> None:
        self.steps.append((f"{op} {stage}", done_bytes, total_bytes))

    def verified(self, op: str, digest: str, fault: Fault | None) -> None:
        assert op not in self.verdicts, f"{op} was answered twice"
        self.verdicts[op] = fault

    def condemned(self, resident: Resident) -> None:
        self.bad.append(resident)

    def evicted(self, digest: str, why: str, for_digest: str) -> None:
        self.gone.append(digest)
        self.evictions.append((digest, why, for_digest))


class Borrower:
    """A FillSink that only keeps an image where it is, until it is given back."""

    def arrived(self, unit: Unit) -> None: ...

    def filled(self, read_bytes: int) -> None: ...

    def failed(self, error: SllmError) -> None: ...


class HandPool(ReadPool):
    """A pool that reads nothing: a test says which units of a job have come, and the memory is as it was."""

    def __init__(self) -> None:
        super().__init__(1)
        self.jobs: list[ReadJob] = []
        self._units: dict[int, list[Unit]] = {}

    def submit(self, units: Sequence[Unit], changed: Callable[[ReadJob], None], **more: Any) -> ReadJob:
        job = ReadJob(more.get("priority", Priority.REQUEST), changed, more.get("unit_done"))
        self._units[id(job)] = list(units)
        self.jobs.append(job)
        return job

    def arrive(self, job: ReadJob, *numbers: int) -> None:
        for number in numbers:
            job._arrived(number, self._units[id(job)][number].size_bytes)
            job._changed(job)

    def finish(self, job: ReadJob, error: SllmError | None = None) -> None:
        job.error, job.finished = error, True
        job._changed(job)


class Bench:
    """A store with its arena, driven as the store process drives it."""

    def __init__(self, arena: Arena, threads: int = 2, pool: ReadPool | None = None) -> None:
        self.told = Told()
        self.arena = arena
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._write = os.eventfd_write
        self.store = ArenaStore(arena, self.told, reader_threads=threads, wake=lambda: self._write(self._event, 1), pool=pool)

    def wait(self, *ops: str, timeout_s: float = 100.0) -> None:
        """Returns when every op is answered."""
        deadline = time.monotonic() + timeout_s
        told = self.told
        while not all(op in told.resident or op in told.faults or op in told.verdicts for op in ops):
            self.turn(deadline - time.monotonic(), f"{ops} were not answered")

    def fill(self, op: str, digest: str, directory: Path, **more: Any) -> None:
        """Returns when a fill is answered."""
        self.store.fill(op, digest, directory, **more)
        self.wait(op)

    def verify(self, digest: str, directory: Path) -> Fault | None:
        """What is found of a copy, and of its image."""
        op = f"look-{len(self.told.verdicts)}"
        self.store.verify(op, digest, directory)
        self.wait(op)
        return self.told.verdicts[op]

    def turn(self, timeout_s: float = 100.0, otherwise: str = "nothing changed") -> None:
        """Pumps once there is something to."""
        assert select.select([self._event], [], [], max(0.0, timeout_s))[0], otherwise
        os.eventfd_read(self._event)
        self.store.pump()

    def close(self) -> None:
        self.store.close()
        self.arena.close()
        os.close(self._event)
