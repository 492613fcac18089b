"""Takes safetensors files as the partitions of a checkpoint where they lie: one pass makes every checksum, none is written."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import xxhash

from agent.native.blocks import block_memory
from agent.store.ingest.headers import Sources, SourceTensor
from agent.store.ingest.writer import CHUNK_BYTES
from schema.checkpoint import Partition, SourceFile, TensorEntry
from schema.errors import InvalidCheckpoint

__all__ = ["sum_files"]

_THREADS: Final = max(1, min(4, os.cpu_count() or 1))

Summed = tuple[tuple[Partition, ...], tuple[TensorEntry, ...], dict[str, bytes]]


def sum_files(sources: Sources, stored: Sequence[SourceTensor], progress: Callable[[int], None]) -> Summed:
    """The partitions, the tensors in the given order, and the sha256 of each tensor's bytes by name.

    ``progress`` hears the bytes read so far. Some files are read at a time, a chunk of each in memory. Raises InvalidCheckpoint
    for a file that changes meanwhile, and for a tensor that is put together of several.
    """
    files = sorted({tensor.file for tensor in sources.tensors.values()})
    numbers = {file: number for number, file in enumerate(files)}
    wanted: dict[str, list[SourceTensor]] = {file: [] for file in files}
    for tensor in stored:
        if tensor.parts:
            raise InvalidCheckpoint(
                f"tensor {tensor.name!r} is {len(tensor.parts)} in the files, which cannot be loaded in place; have it copied"
            )
        wanted[tensor.file].append(tensor)
    lock = threading.Lock()
    done = 0

    def read(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done)

    partitions: list[Partition] = []
    sha256: dict[str, bytes] = {}
    start = 0
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="sum") as pool:
        for file, (size, chunks, sums, source) in zip(
            files, pool.map(lambda file: _sum_file(sources, file, wanted[file], read), files), strict=True
        ):
            partition = Partition(f"partition_{numbers[file]}", start, size, chunks, source)
            partitions.append(partition)
            sha256.update(sums)
            start += partition.padded_bytes
    entries = tuple(
        TensorEntry(each.name, each.dtype, each.shape, numbers[each.file], each.offset_bytes, each.size_bytes)
        for each in stored
    )
    return tuple(partitions), entries, sha256


def _sum_file(
    sources: Sources, file: str, tensors: Sequence[SourceTensor], read: Callable[[int], None]
) -> tuple[int, tuple[int, ...], dict[str, bytes], SourceFile]:
    path, descriptor, reader = sources.opened(file)
    before = os.fstat(descriptor)
    sums = {tensor.name: hashlib.sha256() for tensor in tensors}
    ordered = sorted(tensors, key=lambda each: (each.offset_bytes, each.size_bytes))
    chunks: list[int] = []
    memory = block_memory(CHUNK_BYTES)
    at = first = 0
    while at < before.st_size:
        view = memory[: min(CHUNK_BYTES, before.st_size - at)]
        if (count := reader.read_into(at, view)) < len(view):
            raise InvalidCheckpoint(f"{path} ended at byte {at + count} while it was read")
        chunks.append(xxhash.xxh3_64_intdigest(view))
        end = at + len(view)
        while first < len(ordered) and ordered[first].offset_bytes + ordered[first].size_bytes <= at:
            first += 1
        for tensor in ordered[first:]:
            if tensor.offset_bytes >= end:
                break
            low, high = max(at, tensor.offset_bytes), min(end, tensor.offset_bytes + tensor.size_bytes)
            sums[tensor.name].update(view[low - at : high - at])
        at = end
        read(len(view))
    for status in (os.fstat(descriptor), os.lstat(path)):
        if _identity(status) != _identity(before):
            raise InvalidCheckpoint(f"{path} was changed while it was read; add the model again when nobody writes to it")
    identity = SourceFile(path, before.st_mtime_ns, before.st_ino)
    return before.st_size, tuple(chunks), {name: digest.digest() for name, digest in sums.items()}, identity


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino
