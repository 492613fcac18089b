"""Writes the partition file: tensors in order, aligned, padded, with every checksum made on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.store.durable import disk_errors, reserve
from agent.store.ingest.headers import Sources, SourceTensor
from agent.store.ingest.journal import Journal
from agent.store.ingest.order import fused_group
from agent.store.ingest.pipeline import CHUNK_BYTES, Tile, fill, find_chunks
from schema.checkpoint import ALIGN_BYTES, PAD_BYTES, Partition, TensorEntry
from schema.errors import InvalidCheckpoint

__all__ = ["CHUNK_BYTES", "Written", "same_bytes", "write_partition"]

_BLOCK_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """A finished partition with its tensors, and the sha256 of each tensor's bytes by name."""

    partition: Partition
    tensors: tuple[TensorEntry, ...]
    sha256: dict[str, bytes]


def write_partition(
    path: Path,
    sources: Sources,
    order: Iterable[SourceTensor],
    progress: Callable[[int], None],
    *,
    journal: Path | None = None,
    claim: contextlib.AbstractContextManager[None] | None = None,
    resumed: Callable[[int], None] = lambda _: None,
) -> Written:
    """Write the tensors in this order to the file at ``path``, and make it durable.

    ``progress`` hears the bytes read so far. Memory stays far below 1 GiB, whatever the tensors' sizes (`pipeline.fill`).
    With a ``journal`` an earlier, broken-off call for the same tensors of unchanged files is gone on with: chunks that the
    file has by their checksum are kept, and ``resumed`` hears how many bytes need not be read. ``claim`` is entered before
    anything is written and while the disk's room is reserved.
    Raises OutOfSpace before the first write when the disk has no room, InvalidCheckpoint when a source was changed meanwhile.
    """
    tensors, end = _lay_out(order)
    size = -(-max(end, 1) // PAD_BYTES) * PAD_BYTES
    ends = [*(entry.offset_bytes for entry, _ in tensors[1:]), size]
    tiles = [Tile(source, entry.offset_bytes, stop) for (entry, source), stop in zip(tensors, ends, strict=False)]
    tiles = tiles or [Tile(None, 0, size)]
    before = sources.identities()
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(f"writing {size} bytes to {path}", path.parent))
        done = None
        with claim or contextlib.nullcontext():
            if journal is not None:
                done = Journal(journal, _identity(tensors, before))
                stack.callback(done.close)
            file = stack.enter_context(path.open("xb" if done is None else "ab", buffering=0))
            if done is not None and (done.fresh or os.fstat(file.fileno()).st_size != size):
                done.forget()
                file.truncate(0)
            reserve(file.fileno(), size)
        os.ftruncate(file.fileno(), size)
        there = find_chunks(path, size, done.chunks) if done is not None else {}
        sums, sha256 = fill(path, size, sources, tiles, progress, done, there, resumed)
        os.fsync(file.fileno())
    if sources.identities() != before:
        raise InvalidCheckpoint(
            "the model's files were changed while they were read; ingest it again when nobody writes to them"
        )
    return Written(Partition(path.name, 0, size, sums), tuple(entry for entry, _ in tensors), sha256)


def _identity(tensors: Sequence[tuple[TensorEntry, SourceTensor]], files: Sequence[tuple[str | int, ...]]) -> str:
    """Of everything that decides which bytes come where."""
    placed = [(entry.offset_bytes, *dataclasses.astuple(source)) for entry, source in tensors]
    return hashlib.sha256(json.dumps((CHUNK_BYTES, files, placed)).encode()).hexdigest()


def same_bytes(sources: Sources, one: SourceTensor, other: SourceTensor) -> bool:
    """True when two tensors agree in dtype, shape and every byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    starts = range(0, one.size_bytes, _BLOCK_BYTES)
    sizes = [min(_BLOCK_BYTES, one.size_bytes - start) for start in starts]
    return all(
        sources.read(one, start, size) == sources.read(other, start, size) for start, size in zip(starts, sizes, strict=True)
    )


def _lay_out(order: Iterable[SourceTensor]) -> tuple[list[tuple[TensorEntry, SourceTensor]], int]:
    laid: list[tuple[TensorEntry, SourceTensor]] = []
    end = 0
    before: SourceTensor | None = None
    for source in order:
        fused = before is not None and _fuses(before, source)
        offset = end if fused else -(-end // ALIGN_BYTES) * ALIGN_BYTES
        before = source
        laid.append((TensorEntry(source.name, source.dtype, source.shape, 0, offset, source.size_bytes), source))
        end = offset + source.size_bytes
    return laid, end


def _fuses(one: SourceTensor, other: SourceTensor) -> bool:
    """True when ``other`` goes right behind ``one``: its bytes are then aligned to its elements, since those of one are."""
    group = fused_group(one.name)
    return (
        group is not None
        and group == fused_group(other.name)
        and (one.dtype == other.dtype and one.shape[1:] == other.shape[1:])
    )
