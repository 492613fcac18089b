"""One fetch: a layout from a remote to the disk and, as it comes, into memory that waits for it.

Parts, runs of chunks, are fetched side by side. Each chunk goes block by block to its memory, into its checksum and to the
disk; what an earlier try has left on the disk is taken from there when its checksum is right.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import xxhash

from agent.native.jobs import Priority, ReadJob, Unit, cancelled
from agent.store.catalog import MANIFEST_FILE
from agent.store.remote.api import Body, Forbidden, Patience, Remote
from agent.store.remote.partial import Partial
from agent.store.remote.steady import Steady
from schema.checkpoint import LAYOUTS, Manifest, Partition, decode_manifest
from schema.errors import Cancelled, InvalidCheckpoint, InvalidInput, NotFound, OutOfSpace, SllmError
from schema.remote import RemoteSettings

__all__ = ["Fetch", "FetchJob"]

_BLOCK_BYTES: Final = 4 << 20
_MAX_MANIFEST_BYTES: Final = 256 << 20
_MAX_ASSET_BYTES: Final = 128 << 20
_RESERVED: Final = frozenset({MANIFEST_FILE, "verified", "quarantined"})
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk and the memory it goes to; without targets it passes through the thread's own."""

    number: int
    partition: Partition
    offset: int
    length: int
    xxh3: int
    unit: Unit | None

    def blocks(self, scratch: memoryview) -> Iterator[memoryview]:
        """Its memory in order, in pieces of at most a block."""
        targets = self.unit.targets if self.unit is not None else (scratch[: min(len(scratch), self.length)],) * self._rounds
        left = self.length
        for target in targets:
            for start in range(0, min(len(target), left), _BLOCK_BYTES):
                block = target[start : min(start + _BLOCK_BYTES, left + start)]
                left -= len(block)
                yield block

    @property
    def _rounds(self) -> int:
        return -(-self.length // _BLOCK_BYTES)


@dataclass(eq=False)
class FetchJob(ReadJob):
    """A `ReadJob` whose bytes come from a remote: its memory is right when it has finished; `Fetch.over` says what became of
    the checkpoint on the disk. ``_coming``: what has come of the chunks under way, by their numbers."""

    _coming: dict[int, int] = field(default_factory=dict)


class Fetch:
    """One layout of one checkpoint from one remote. `prepare` first, from any thread; then `submit`, once.

    ``disk_bytes``: what checkpoints may take of the disk, 0 for all of it.
    ``wanted_layout`` "" takes the default one, or else the first that the remote has.
    """

    def __init__(
        self,
        remote: Remote,
        digest: str,
        wanted_layout: str,
        data: Path,
        checkpoints: Path,
        settings: RemoteSettings,
        *,
        disk_bytes: int = 0,
    ) -> None:
        self._remote = remote
        self._digest = digest
        self._wanted_layout = wanted_layout
        self._data = data
        self._checkpoints = checkpoints
        self._settings = settings
        self._disk_bytes = disk_bytes
        self._stopped = threading.Event()
        self._keep = False
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._parts: deque[list[_Chunk]] = deque()
        self._running = 0
        self._partial: Partial | None = None
        self._manifest: Manifest | None = None
        self._told: Callable[[], None] = _nothing
        self.over = False
        """It has ended, on the disk too: committed there, or ``error`` says why not."""
        self.error: SllmError | None = None

    @property
    def manifest(self) -> Manifest:
        assert self._manifest is not None, "prepare first"
        return self._manifest

    @property
    def directory(self) -> Path:
        """Where manifest and small files lie while the weights come; it moves when all of it is there."""
        assert self._partial is not None, "prepare first"
        return self._partial.path

    def prepare(self) -> None:
        """Get and judge the manifest and the text assets, and take room on the disk.

        Raises NotFound for a checkpoint that is not there, InvalidCheckpoint for one that is not what it should be, OutOfSpace,
        Unreachable, Unauthorised, Cancelled.
        """
        try:
            layout = self._layout()
            data = self._ask(f"{self._digest}/{layout}/{MANIFEST_FILE}", _MAX_MANIFEST_BYTES)
            manifest = self._judge(data, layout)
            assets = {asset.file: self._asset(layout, asset.file, asset.size_bytes, asset.sha256) for asset in manifest.assets}
            coming = Partial(self._data, self._checkpoints, manifest, data)
            try:
                coming.begin(self._disk_bytes)
                for name, content in assets.items():
                    coming.write_asset(name, content)
            except BaseException as error:
                # What an earlier fetch has left waits while room is made that would do.
                full = isinstance(error, OutOfSpace) and not (coming.resumed and error.short_bytes)
                coming.close(keep=not full)
                raise
        except BaseException:
            self._remote.close()
            raise
        self._manifest, self._partial = manifest, coming

    def submit(
        self,
        units: Sequence[Unit],
        changed: Callable[[ReadJob], None],
        *,
        priority: Priority = Priority.REQUEST,
        unit_done: Callable[[ReadJob, Unit], None] | None = None,
        ended: Callable[[], None] | None = None,
    ) -> FetchJob:
        """Begin: ``units`` are the image's chunks in order, or none when it goes to the disk alone.

        ``changed`` and ``unit_done`` are called as `ReadPool` says, ``ended`` when it is `over`, which may be a while later.
        """
        self._told = ended or _nothing
        job = FetchJob(priority, changed, unit_done)
        chunks = list(_chunks(self.manifest, units))
        self._parts = deque(_parts(chunks, self._settings.part_bytes))
        count = max(1, min(self._settings.streams, len(self._parts)))
        self._running = count
        self._threads = [threading.Thread(target=self._serve, args=(job,), name=f"fetch-{n}") for n in range(count)]
        for thread in self._threads:
            thread.start()
        return job

    def cancel(self, job: ReadJob) -> None:
        """End as Cancelled as soon as no thread is at it; without effect on a finished one."""
        with self._lock:
            if job.error is None and not job.finished:
                job.error = cancelled()
        self.stop()

    def came_bytes(self, job: FetchJob) -> int:
        """So much of the weights is here, also of chunks that are not whole yet: over a slow link one takes minutes."""
        with self._lock:
            return job.done_bytes + sum(job._coming.values())

    def stop(self, *, keep: bool = False) -> None:
        """End whatever is under way, `prepare` too; ``keep`` leaves on the disk what has come, for the next try."""
        self._keep = self._keep or keep
        self._stopped.set()
        self._remote.abort()

    def discard(self) -> None:
        """It was prepared, and nobody wants it any more."""
        if self._partial is not None and not self._threads:
            self._close(self._partial, keep=self._keep)

    def join(self) -> None:
        """Wait until no thread of it runs."""
        for thread in self._threads:
            thread.join()

    # --- before the first part

    def _layout(self) -> str:
        if self._wanted_layout:
            return self._wanted_layout
        patience = Patience(self._settings, self._stopped)
        try:
            names = patience.ask(lambda: self._remote.children(self._digest))
        except (InvalidInput, Forbidden):
            names = list(LAYOUTS)
        refused: Forbidden | None = None
        for name in sorted(names, key=lambda name: LAYOUTS.index(name) if name in LAYOUTS else len(LAYOUTS)):
            path = f"{self._digest}/{name}/{MANIFEST_FILE}"
            try:
                if patience.ask(lambda path=path: self._remote.size(path)) is not None:  # type: ignore[misc]
                    return name
            except Forbidden as error:  # it may only not be there
                refused = error
        raise refused or NotFound(f"{self._remote.url} has no checkpoint {self._digest}; publish it there first")

    def _ask(self, path: str, limit_bytes: int) -> bytes:
        return Patience(self._settings, self._stopped).ask(lambda: self._remote.read(path, limit_bytes, self._settings.part_s))

    def _judge(self, data: bytes, layout: str) -> Manifest:
        where = self._remote.where(f"{self._digest}/{layout}/{MANIFEST_FILE}")
        try:
            manifest = decode_manifest(data)
        except (InvalidCheckpoint, RecursionError) as error:
            raise InvalidCheckpoint(f"{where}: {error}") from error
        if (manifest.digest, manifest.layout) != (self._digest, layout):
            raise InvalidCheckpoint(f"{where} is of checkpoint {manifest.digest}, layout {manifest.layout}: it was moved")
        if any(partition.source is not None for partition in manifest.partitions):
            raise InvalidCheckpoint(f"{where} names files of another machine in their place; such a layout cannot be fetched")
        names = [partition.file for partition in manifest.partitions] + [asset.file for asset in manifest.assets]
        if len({*names}) != len(names) or not _RESERVED.isdisjoint(names):
            raise InvalidCheckpoint(f"{where} uses a file name twice, or one that is not for it")
        return manifest

    def _asset(self, layout: str, name: str, size_bytes: int, sha256: str) -> bytes:
        path = f"{self._digest}/{layout}/{name}"
        if size_bytes > _MAX_ASSET_BYTES:
            raise InvalidCheckpoint(f"{self._remote.where(path)} has {size_bytes} bytes; at most {_MAX_ASSET_BYTES} are read")
        found = ""
        for _ in range(2):
            data = self._ask(path, size_bytes)
            found = hashlib.sha256(data).hexdigest()
            if found == sha256:
                return data
        raise InvalidCheckpoint(f"{self._remote.where(path)} is not what was published (sha256 {found}, expected {sha256})")

    # --- on the fetch's threads

    def _serve(self, job: FetchJob) -> None:
        try:
            scratch = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
            while (part := self._next(job)) is not None:
                self._fetch(job, part, scratch)
        except SllmError as error:
            self._failed(job, error)
        except Exception as error:  # this thread has no caller: whatever it is, it is the fetch's end
            self._failed(job, self._unforeseen(error))
        with self._lock:
            self._running -= 1
            last = not self._running
        if last:
            self._finish(job)

    def _next(self, job: FetchJob) -> list[_Chunk] | None:
        with self._lock:
            return self._parts.popleft() if self._parts and job.error is None else None

    def _failed(self, job: FetchJob, error: SllmError) -> None:
        with self._lock:
            if job.error is None:
                job.error = error
        self._stopped.set()
        self._remote.abort()

    def _finish(self, job: FetchJob) -> None:
        """The memory is right, or will not be, which is said at once; to make the disk's copy durable takes longer."""
        assert self._partial is not None
        with self._lock:
            self.error = job.error
            job.finished = True
        job._changed(job)
        if self.error is None:
            try:
                self._partial.commit()
            except SllmError as error:
                self.error = error
            except Exception as error:  # nor has what follows the last of them
                self.error = self._unforeseen(error)
        bad = isinstance(self.error, InvalidCheckpoint | OutOfSpace | Cancelled)
        self._close(self._partial, keep=self.error is None or self._keep or not bad)
        self.over = True
        self._told()

    def _close(self, coming: Partial, *, keep: bool) -> None:
        """Let go of everything. What had to be durable is by then, so that what a disk says of it now changes nothing."""
        try:
            coming.close(keep=keep)
        except OSError as error:
            _log.warning("closing what was fetched of %s: %s", self._digest, error.strerror)
        self._remote.close()

    def _unforeseen(self, error: Exception) -> SllmError:
        _log.error("fetching checkpoint %s failed", self._digest, exc_info=error)
        return SllmError(f"fetching checkpoint {self._digest} failed: {type(error).__name__}: {error}")

    def _fetch(self, job: FetchJob, part: list[_Chunk], scratch: memoryview) -> None:
        """All chunks of a part: from the disk what is right there, the rest from the remote, going on where it broke."""
        assert self._partial is not None
        if self._partial.resumed:
            part = [chunk for chunk in part if not self._take_local(job, chunk, scratch)]
        patience = Patience(self._settings, self._stopped)
        wrong = -1
        for run in _runs(part):
            end = run[-1].offset + run[-1].length
            with Steady(partial(self._open, run[0].partition, end), run[0].offset, patience) as body:
                while run:
                    found = self._take(job, body, run[0], scratch)
                    if found == run[0].xxh3:
                        self._arrived(job, run.popleft())
                        patience.progress()
                    elif run[0].number == wrong:
                        raise self._corrupt(run[0], found)
                    else:
                        wrong = run[0].number
                        body.again(run[0].offset)

    def _open(self, partition: Partition, end: int, at: int) -> AbstractContextManager[Body]:
        deadline = time.monotonic() + self._settings.part_s
        size = partition.size_bytes
        return self._remote.open(self._path(partition), at, end - at, total_bytes=size, deadline=deadline)

    def _take(self, job: FetchJob, body: Body, chunk: _Chunk, scratch: memoryview) -> int:
        assert self._partial is not None
        digest = xxhash.xxh3_64()
        offset = chunk.offset
        for block in chunk.blocks(scratch):
            left = block
            while left:
                left = left[body.some(left) :]
                with self._lock:
                    job._coming[chunk.number] = offset - chunk.offset + len(block) - len(left)
            digest.update(block)
            self._partial.write(chunk.partition.file, offset, block)
            offset += len(block)
        return digest.intdigest()

    def _take_local(self, job: FetchJob, chunk: _Chunk, scratch: memoryview) -> bool:
        assert self._partial is not None
        if job.error is not None or not self._partial.has(chunk.partition.file, chunk.offset, chunk.length):
            return False
        digest = xxhash.xxh3_64()
        offset = chunk.offset
        for block in chunk.blocks(scratch):
            try:
                self._partial.read(chunk.partition.file, offset, block)
            except SllmError as error:  # a bad spot of the disk, which is written anew
                _log.warning("%s; it is fetched again", error)
                return False
            digest.update(block)
            offset += len(block)
        if digest.intdigest() != chunk.xxh3:
            return False
        self._arrived(job, chunk, spared=True)
        return True

    def _arrived(self, job: FetchJob, chunk: _Chunk, *, spared: bool = False) -> None:
        with self._lock:
            if job.error is not None:
                raise job.error
            job.spared_bytes += chunk.length if spared else 0
            job._coming.pop(chunk.number, None)
            job._arrived(chunk.number, chunk.length)
        if job._unit_done is not None and chunk.unit is not None:
            job._unit_done(job, chunk.unit)
        job._changed(job)

    def _corrupt(self, chunk: _Chunk, found: int) -> InvalidCheckpoint:
        where = self._remote.where(self._path(chunk.partition))
        return InvalidCheckpoint(
            f"{where}: the {chunk.length} bytes at offset {chunk.offset} are not what was published, twice "
            f"(xxh3 {found:016x}, expected {chunk.xxh3:016x}); publish the checkpoint again"
        )

    def _path(self, partition: Partition) -> str:
        return f"{self._digest}/{self.manifest.layout}/{partition.file}"


def _nothing() -> None:
    """Nobody waits for its end."""


def _chunks(manifest: Manifest, units: Sequence[Unit]) -> Iterator[_Chunk]:
    number = 0
    for partition in manifest.partitions:
        for index, xxh3 in enumerate(partition.chunk_xxh3):
            offset = index * manifest.chunk_bytes
            length = min(manifest.chunk_bytes, partition.size_bytes - offset)
            unit = units[number] if units else None
            assert unit is None or unit.size_bytes == length, "a unit is one chunk of the manifest"
            yield _Chunk(number, partition, offset, length, xxh3, unit)
            number += 1


def _parts(chunks: Sequence[_Chunk], part_bytes: int) -> Iterator[list[_Chunk]]:
    part: list[_Chunk] = []
    size = 0
    for chunk in chunks:
        if part and (part[-1].partition is not chunk.partition or size + chunk.length > part_bytes):
            yield part
            part, size = [], 0
        part.append(chunk)
        size += chunk.length
    if part:
        yield part


def _runs(part: Sequence[_Chunk]) -> list[deque[_Chunk]]:
    """Chunks that follow on each other in their file."""
    runs: list[deque[_Chunk]] = []
    for chunk in part:
        if runs and runs[-1][-1].offset + runs[-1][-1].length == chunk.offset:
            runs[-1].append(chunk)
        else:
            runs.append(deque([chunk]))
    return runs
