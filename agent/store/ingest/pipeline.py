"""Fills a partition file on several threads: each reads and hashes tensors of its own; chunks are written as they fill.

No thread waits for another, so nothing need be queued: while one waits for the disk, others hash. A chunk that several tensors
share is written by whoever brings its last bytes. Large tensors, which a single thread must hash, are begun first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from agent.native.blocks import block_memory
from agent.store.ingest.headers import Sources, SourceTensor
from agent.store.ingest.journal import Journal
from agent.store.ingest.reading import SourceReader
from schema.errors import SllmError

__all__ = ["CHUNK_BYTES", "Tile", "fill", "find_chunks"]

CHUNK_BYTES: Final = 4 << 20
_MAX_THREADS: Final = 12
_TICK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Tile:
    """Bytes ``start_bytes`` to ``end_bytes`` of the file: a tensor's, then zeros. The tiles of a file leave nothing out."""

    source: SourceTensor | None
    start_bytes: int
    end_bytes: int


def fill(
    path: Path,
    file_bytes: int,
    sources: Sources,
    tiles: Sequence[Tile],
    progress: Callable[[int], None],
    journal: Journal | None = None,
    there: Mapping[int, int] | None = None,
    resumed: Callable[[int], None] = lambda _: None,
) -> tuple[tuple[int, ...], dict[str, bytes]]:
    """Write the tiles to the file that lies at ``path`` with that size; returns the xxh3 of each chunk of it, and the sha256
    of each tensor by name.

    ``progress`` hears on the calling thread how many bytes of tensors are done. ``journal`` hears what is done, and has what
    was done by another call, whose chunks are ``there`` (`find_chunks`). A tensor that was read to its end is then read again
    only where a chunk of it is not there; ``resumed`` hears how many bytes are left alone. Memory: some two chunks for each
    of at most 12 threads, and for each large tensor, of which there are at most 24. Raises what reading and writing raise,
    the first of it.
    """
    threads = min(_MAX_THREADS, 2 * (os.cpu_count() or 1) + 2)
    numbers = {tile: number for number, tile in enumerate(tiles)}
    filling = _Filling(path, file_bytes, sources, journal, numbers, dict(there or {}))
    missing = [tile for tile in tiles if not filling.take_over(tile)]
    resumed(filling.done_bytes)
    filling.runs = _runs(missing, threads)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="ingest") as pool:
            try:
                pending = {pool.submit(filling.work) for _ in range(threads)}
                while pending:
                    ended, pending = wait(pending, _TICK_S, FIRST_EXCEPTION)
                    progress(filling.done_bytes)
                    for each in ended:
                        each.result()
            finally:
                filling.stopped = True
    finally:
        filling.close()
    return tuple(filling.xxh3[number] for number in range(len(filling.xxh3))), filling.sha256


def find_chunks(path: Path, file_bytes: int, chunks: Mapping[int, int]) -> dict[int, int]:
    """Those of the chunks, xxh3 by number, that the file has and that can be read. Past the page cache, whose pages others
    need."""
    if not chunks:
        return {}
    threads = min(4, os.cpu_count() or 1)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        reader = stack.enter_context(contextlib.closing(SourceReader(descriptor)))
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="ingest"))

        def look(numbers: Sequence[int]) -> list[int]:
            """Those that are right, read one after the other into the same memory."""
            memory, right = block_memory(CHUNK_BYTES), []
            for number in numbers:
                start = number * CHUNK_BYTES
                view = memory[: max(0, min(CHUNK_BYTES, file_bytes - start))]
                with contextlib.suppress(OSError):  # a bad spot of the disk, which is written anew
                    if view and reader.read_into(start, view) == len(view) and xxhash.xxh3_64_intdigest(view) == chunks[number]:
                        right.append(number)
            return right

        numbers = sorted(chunks)
        shares = pool.map(look, [numbers[first::threads] for first in range(threads)])
        return {number: chunks[number] for share in shares for number in share}


@dataclass(slots=True)
class _Chunk:
    """``missing_bytes`` have not been brought yet. Its memory begins at a page, as direct writes want it."""

    view: memoryview
    missing_bytes: int = 0


@dataclass(slots=True)
class _Filling:
    """What the threads share."""

    path: Path
    file_bytes: int
    sources: Sources
    journal: Journal | None
    numbers: Mapping[Tile, int]
    there: Mapping[int, int]
    runs: Iterator[list[Tile]] = field(default_factory=lambda: iter(()))
    done_bytes: int = 0
    stopped: bool = False
    xxh3: dict[int, int] = field(default_factory=dict)
    sha256: dict[str, bytes] = field(default_factory=dict)
    _cached: int = -1
    _direct: int = -1
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: dict[int, _Chunk] = field(default_factory=dict)
    _free: list[_Chunk] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.xxh3.update(self.there)
        self._cached = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._direct = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without direct writes says so when it opens
                os.close(self._cached)
                raise

    def close(self) -> None:
        for descriptor in (self._cached, self._direct):
            if descriptor >= 0:
                os.close(descriptor)

    def take_over(self, tile: Tile) -> bool:
        """Count what of this tile need not be brought; True when that is all of it.

        A tensor with a known sha256 was read to its end once, so only what fell into chunks that are not there is read again.
        """
        known = self._known(tile)
        if tile.source is not None and known is not None:
            self.sha256[tile.source.name] = known
            data_end = tile.start_bytes + tile.source.size_bytes
            for number in self._chunks(tile):
                if number in self.there:
                    start = max(tile.start_bytes, number * CHUNK_BYTES)
                    self.done_bytes += max(0, min(data_end, (number + 1) * CHUNK_BYTES) - start)
        return (tile.source is None or known is not None) and all(number in self.there for number in self._chunks(tile))

    def _known(self, tile: Tile) -> bytes | None:
        return None if self.journal is None else self.journal.tensors.get(self.numbers[tile])

    def _chunks(self, tile: Tile) -> range:
        return range(tile.start_bytes // CHUNK_BYTES, -(-tile.end_bytes // CHUNK_BYTES))

    def work(self) -> None:
        """One thread's share: runs of tiles until there are none left."""
        while True:
            with self._lock:
                run = next(self.runs, None)
            if run is None:
                return
            for tile in run:
                self._bring(tile)

    def _bring(self, tile: Tile) -> None:
        source, at = tile.source, tile.start_bytes
        data_end = at + (source.size_bytes if source is not None else 0)
        known = self._known(tile)
        digest = hashlib.sha256()
        while at < tile.end_bytes:
            if self.stopped:
                raise SllmError(f"writing {self.path} was given up")
            number, within = divmod(at, CHUNK_BYTES)
            end = min(tile.end_bytes, (number + 1) * CHUNK_BYTES)
            if known is not None and number in self.there:
                at = end
                continue
            chunk = self._chunk(number)
            size = max(0, min(data_end, end) - at)
            if source is not None and size:
                view = chunk.view[within : within + size]
                self.sources.read_into(source, at - tile.start_bytes, view)
                if known is None:
                    digest.update(view)
            if zeros := end - at - size:
                chunk.view[within + size : within + size + zeros] = bytes(zeros)
            self._brought(number, chunk, end - at, size)
            at = end
        if source is not None and known is None:
            self.sha256[source.name] = digest.digest()
            if self.journal is not None:
                self.journal.tensor(self.numbers[tile], digest.digest())

    def _chunk(self, number: int) -> _Chunk:
        with self._lock:
            chunk = self._open.get(number)
            if chunk is None or number in self.there:  # of what is there, each reader has a copy that is not written again
                chunk = self._free.pop() if self._free else _Chunk(block_memory(CHUNK_BYTES))
                if number in self.there:
                    return chunk
                chunk.missing_bytes = min(CHUNK_BYTES, self.file_bytes - number * CHUNK_BYTES)
                self._open[number] = chunk
            return chunk

    def _brought(self, number: int, chunk: _Chunk, count: int, data_bytes: int) -> None:
        with self._lock:
            self.done_bytes += data_bytes
            if number in self.there:
                self._free.append(chunk)
                return
            chunk.missing_bytes -= count
            if chunk.missing_bytes:
                return
        start = number * CHUNK_BYTES
        data = chunk.view[: min(CHUNK_BYTES, self.file_bytes - start)]
        self.xxh3[number] = xxhash.xxh3_64_intdigest(data)
        self._write(data, start)
        if self.journal is not None:
            self.journal.chunk(number, self.xxh3[number])
        with self._lock:
            self._free.append(self._open.pop(number))

    def _write(self, data: memoryview, start: int) -> None:
        while data:
            try:
                count = os.pwrite(self._direct if self._direct >= 0 else self._cached, data, start)
            except OSError as error:
                if error.errno != errno.EINVAL or self._direct < 0:
                    raise
                # A direct write may want another alignment, or go on from the middle of one that was cut short.
                count = os.pwrite(self._cached, data, start)
            data = data[count:]
            start += count


def _runs(tiles: Sequence[Tile], threads: int) -> Iterator[list[Tile]]:
    """Large tiles, the largest first; then the others in order, small ones together."""
    large = max(CHUNK_BYTES, sum(tile.end_bytes - tile.start_bytes for tile in tiles) // (2 * threads))
    rest: list[Tile] = []
    first: list[Tile] = []
    for tile in tiles:
        (first if tile.end_bytes - tile.start_bytes >= large else rest).append(tile)
    for tile in sorted(first, key=lambda each: each.start_bytes - each.end_bytes):
        yield [tile]
    run: list[Tile] = []
    size = 0
    for tile in rest:
        run.append(tile)
        size += tile.end_bytes - tile.start_bytes
        if size >= CHUNK_BYTES:
            yield run
            run, size = [], 0
    if run:
        yield run
