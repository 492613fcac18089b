"""Writes the partition file: tensors streamed in order, aligned, padded, with every checksum made on the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from agent.store.ingest.headers import Sources, SourceTensor
from schema.checkpoint import ALIGN_BYTES, PAD_BYTES, Partition, TensorEntry
from schema.errors import OutOfSpace, SllmError

__all__ = ["CHUNK_BYTES", "Written", "disk_errors", "same_bytes", "write_partition"]

CHUNK_BYTES: Final = 4 << 20
_BLOCK_BYTES: Final = 8 << 20
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Written:
    """A finished partition with its tensors, and the sha256 of each tensor's bytes by name."""

    partition: Partition
    tensors: tuple[TensorEntry, ...]
    sha256: dict[str, bytes]


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns a full disk into OutOfSpace, any other disk error into SllmError, naming ``what`` was being done."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutOfSpace(f"{what}: {error.strerror}; free some of the disk and ingest again, nothing was kept") from error
        raise SllmError(f"{what}: {error.strerror or error}") from error


def write_partition(path: Path, sources: Sources, order: Iterable[SourceTensor], progress: Callable[[int], None]) -> Written:
    """Write the tensors in this order to a new file at ``path``, and make it durable.

    ``progress`` hears the bytes read so far. Memory stays within a few blocks of 8 MiB. Raises OutOfSpace before the first
    write when the disk has no room.
    """
    tensors, end = _lay_out(order)
    size = -(-max(end, 1) // PAD_BYTES) * PAD_BYTES
    with disk_errors(f"writing {size} bytes to {path}"), path.open("xb", buffering=0) as file:
        _reserve(file.fileno(), size)
        with ThreadPoolExecutor(1, thread_name_prefix="hash") as hasher:
            sums = _Sums()
            pending: Future[None] | None = None
            position = done = 0
            for entry, source in tensors:
                gap = bytes(entry.offset_bytes - position)
                for data, name in _pieces(sources, source, entry.name, gap):
                    if pending is not None:
                        pending.result()
                    pending = hasher.submit(sums.take, data, name)
                    _write(file.fileno(), data)
                    done += len(data) if name else 0
                    progress(done)
                position = entry.offset_bytes + entry.size_bytes
            if pending is not None:
                pending.result()
            padding = bytes(size - position)
            _write(file.fileno(), padding)
            sums.take(padding, "")
        os.fsync(file.fileno())
    partition = Partition(path.name, 0, size, sums.chunks())
    return Written(partition, tuple(entry for entry, _ in tensors), sums.sha256())


def same_bytes(sources: Sources, one: SourceTensor, other: SourceTensor) -> bool:
    """True when two tensors agree in dtype, shape and every byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    starts = range(0, one.size_bytes, _BLOCK_BYTES)
    sizes = [min(_BLOCK_BYTES, one.size_bytes - start) for start in starts]
    return all(
        sources.read(one, start, size) == sources.read(other, start, size) for start, size in zip(starts, sizes, strict=True)
    )


class _Sums:
    """The checksums of a stream: xxh3 of each chunk of the file, sha256 of each tensor."""

    def __init__(self) -> None:
        self._chunks: list[int] = []
        self._chunk = xxhash.xxh3_64()
        self._filled = 0
        self._tensors: dict[str, hashlib._Hash] = {}

    def take(self, data: bytes, tensor: str) -> None:
        """The next bytes of the file; of a tensor, or of none ("")."""
        if tensor:
            self._tensors.setdefault(tensor, hashlib.sha256()).update(data)
        view = memoryview(data)
        while view:
            part = view[: CHUNK_BYTES - self._filled]
            self._chunk.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == CHUNK_BYTES:
                self._cut()

    def chunks(self) -> tuple[int, ...]:
        if self._filled:
            self._cut()
        return tuple(self._chunks)

    def sha256(self) -> dict[str, bytes]:
        return {name: digest.digest() for name, digest in self._tensors.items()}

    def _cut(self) -> None:
        self._chunks.append(self._chunk.intdigest())
        self._chunk.reset()
        self._filled = 0


def _lay_out(order: Iterable[SourceTensor]) -> tuple[list[tuple[TensorEntry, SourceTensor]], int]:
    laid: list[tuple[TensorEntry, SourceTensor]] = []
    end = 0
    for source in order:
        offset = -(-end // ALIGN_BYTES) * ALIGN_BYTES
        laid.append((TensorEntry(source.name, source.dtype, source.shape, 0, offset, source.size_bytes), source))
        end = offset + source.size_bytes
    return laid, end


def _pieces(sources: Sources, source: SourceTensor, name: str, gap: bytes) -> Iterator[tuple[bytes, str]]:
    if gap:
        yield gap, ""
    if not source.size_bytes:
        yield b"", name
    for start in range(0, source.size_bytes, _BLOCK_BYTES):
        yield sources.read(source, start, min(_BLOCK_BYTES, source.size_bytes - start)), name


def _reserve(descriptor: int, size: int) -> None:
    """Claim the room at once: a full disk shows before hours of reading, and the file lies in long runs."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
