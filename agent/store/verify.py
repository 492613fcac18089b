"""Compares what lies in a tier with the checksums of its manifest: the files of a copy on disk, and its image in the arena.

One verification at a time, on a thread of its own. It reads through the store's `ReadPool`, behind everything that anybody
waits for, into a little memory beside the arena, so that looking at a copy never evicts one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from agent.native.blocks import block_memory
from agent.native.reader import Priority, ReadJob, ReadPool, Unit
from agent.store import catalog
from schema.checkpoint import Manifest, Partition
from schema.errors import Cancelled, InvalidCheckpoint, SllmError

__all__ = ["Image", "Verdict", "Verifier"]

_BLOCK_BYTES: Final = 4 << 20
_BLOCKS: Final = 4
_LANES: Final = 2
"""So many reads of ``_BLOCKS`` blocks each are under way: one is compared while another is read."""

Image = Callable[[int, int], list[memoryview]]
"""The memory of ``(start_bytes, size_bytes)`` of an image, in pieces."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a verification ended. ``error`` is of the copy on disk: an InvalidCheckpoint when it is bad; ``image_error`` of the
    image in the arena, None too when there was none or it was not looked at. ``copy`` is the identity of what was read."""

    op: str
    digest: str
    directory: Path
    copy: catalog.Identity | None
    error: SllmError | None
    image_error: InvalidCheckpoint | None = None


@dataclass(eq=False, slots=True)
class _Asked:
    op: str
    digest: str
    directory: Path
    image: Image | None
    image_id: str
    cancelled: threading.Event = field(default_factory=threading.Event)
    stage: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(slots=True)
class _Lane:
    """Memory for a few blocks, and the read that fills it."""

    memory: memoryview
    ended: threading.Event = field(default_factory=threading.Event)
    job: ReadJob | None = None
    blocks: list[tuple[int, memoryview]] = field(default_factory=list)


class Verifier:
    """Verifies what it is asked to, in that order. ``wake`` is called, from any thread, when `take` has news."""

    def __init__(self, pool: ReadPool, wake: Callable[[], None]) -> None:
        self._pool = pool
        self._wake = wake
        self._condition = threading.Condition()
        self._asked: dict[str, _Asked] = {}
        self._queue: deque[_Asked] = deque()
        self._verdicts: deque[Verdict] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def asked(self) -> dict[str, str]:
        """The digest of each op that is not answered yet."""
        return {op: asked.digest for op, asked in self._asked.items()}

    def begin(self, op: str, digest: str, directory: Path, image: Image | None, image_id: str) -> None:
        """Verify a copy, and the ``image`` of its digest in the arena if it is this copy's, which must stay where it is until
        the verdict is taken."""
        asked = _Asked(op, digest, directory, image, image_id)
        self._asked[op] = asked
        with self._condition:
            self._queue.append(asked)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="verify")
                self._thread.start()
            self._condition.notify_all()

    def cancel(self, op: str) -> None:
        """End a verification early; its verdict is Cancelled, at once if it has not begun."""
        if (asked := self._asked.get(op)) is None:
            return
        asked.cancelled.set()
        with self._condition:
            waits = asked in self._queue
            if waits:
                self._queue.remove(asked)
        if waits:
            self._verdicts.append(Verdict(op, asked.digest, asked.directory, None, _cancelled()))
            self._wake()

    def progress(self, op: str) -> tuple[str, int, int]:
        """(stage, bytes done, bytes in all) of what is not answered yet."""
        asked = self._asked[op]
        return asked.stage, asked.done_bytes, asked.total_bytes

    def take(self) -> list[Verdict]:
        """The verdicts since the last call."""
        taken = []
        while self._verdicts:
            verdict = self._verdicts.popleft()
            del self._asked[verdict.op]
            taken.append(verdict)
        return taken

    def close(self) -> None:
        """End what is under way; no thread touches anything when this returns. The pool must still serve."""
        with self._condition:
            self._closed = True
            for asked in self._asked.values():
                asked.cancelled.set()
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    # --- on the thread

    def _serve(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                asked = self._queue.popleft()
            self._verdicts.append(self._verify(asked))
            self._wake()

    def _verify(self, asked: _Asked) -> Verdict:
        error: SllmError | None = None
        image_error: InvalidCheckpoint | None = None
        manifest: Manifest | None = None
        copy = catalog.identity(asked.directory)
        try:
            _check_cancel(asked)
            entry = catalog.read_entry(asked.directory)
            manifest = entry.manifest
            if entry.changed is not None:
                raise InvalidCheckpoint(entry.changed)
            catalog.check_assets(asked.directory, manifest)
            self._verify_disk(asked, manifest)
            if (changed := catalog.changed_source(manifest)) is not None:  # while they were read
                raise InvalidCheckpoint(changed)
        except SllmError as failure:
            error = failure
        except Exception as failure:  # this thread has no caller: whatever it is, it is the verification's end
            error = SllmError(f"verifying {asked.directory} failed: {type(failure).__name__}: {failure}")
        mine = manifest is not None and manifest.image_id == asked.image_id
        if manifest is not None and mine and asked.image is not None and not isinstance(error, Cancelled):
            try:
                self._verify_image(asked, manifest, asked.image)
            except InvalidCheckpoint as failure:
                image_error = failure
            except Cancelled as failure:
                error = error or failure
        # A traceback would keep the frames, and with them the memory, alive.
        error = error.with_traceback(None) if error is not None else None
        image_error = image_error.with_traceback(None) if image_error is not None else None
        return Verdict(asked.op, asked.digest, asked.directory, copy, error, image_error)

    def _verify_disk(self, asked: _Asked, manifest: Manifest) -> None:
        asked.stage, asked.done_bytes = "verify disk", 0
        asked.total_bytes = sum(partition.size_bytes for partition in manifest.partitions)
        memory = block_memory(_LANES * _BLOCKS * _BLOCK_BYTES)
        size = _BLOCKS * _BLOCK_BYTES
        lanes = [_Lane(memory[number * size : (number + 1) * size]) for number in range(_LANES)]
        try:
            for partition in manifest.partitions:
                self._verify_file(asked, manifest, partition, lanes)
        finally:
            for lane in lanes:
                if lane.job is not None:  # nothing may write into memory that is given back
                    self._pool.cancel(lane.job)
                    lane.ended.wait()

    def _verify_file(self, asked: _Asked, manifest: Manifest, partition: Partition, lanes: list[_Lane]) -> None:
        path = catalog.partition_path(asked.directory, partition)
        check = _ChunkCheck(str(path), manifest.chunk_bytes, partition)
        waiting: deque[_Lane] = deque(lanes)
        reading: deque[_Lane] = deque()
        offset = 0
        while offset < partition.size_bytes or reading:
            if waiting and offset < partition.size_bytes:
                lane = waiting.popleft()
                offset = self._read(lane, path, partition.size_bytes, offset)
                reading.append(lane)
                continue
            lane = reading.popleft()
            job = lane.job
            assert job is not None
            lane.ended.wait()
            lane.job = None
            if job.error is not None:
                raise job.error
            for at, block in lane.blocks:
                _check_cancel(asked)
                check.update(at, block)
                asked.done_bytes += len(block)
            lane.blocks.clear()
            waiting.append(lane)
            self._wake()

    def _read(self, lane: _Lane, path: Path, size_bytes: int, offset: int) -> int:
        """Begin to read the next blocks of a file into a lane; where those after them begin."""
        units = []
        for number in range(_BLOCKS):
            length = min(_BLOCK_BYTES, size_bytes - offset)
            if length <= 0:
                break
            block = lane.memory[number * _BLOCK_BYTES : number * _BLOCK_BYTES + length]
            lane.blocks.append((offset, block))
            units.append(Unit(path, size_bytes, offset, (block,)))
            offset += length
        lane.ended.clear()

        def changed(job: ReadJob) -> None:
            if job.finished or job.stalled is not None:  # a read that does not come back keeps its memory to itself
                lane.ended.set()

        lane.job = self._pool.submit(units, changed, priority=Priority.BACKGROUND)
        return offset

    def _verify_image(self, asked: _Asked, manifest: Manifest, image: Image) -> None:
        asked.stage, asked.done_bytes, asked.total_bytes = "verify dram", 0, manifest.image_bytes
        for partition in manifest.partitions:
            check = _ChunkCheck(f"the image of {partition.file} in memory", manifest.chunk_bytes, partition)
            for start in range(0, partition.size_bytes, _BLOCK_BYTES):
                _check_cancel(asked)
                length = min(_BLOCK_BYTES, partition.size_bytes - start)
                at = start
                for piece in image(partition.start_bytes + start, length):
                    check.update(at, piece)
                    at += len(piece)
                asked.done_bytes += length
            self._wake()


class _ChunkCheck:
    """Compares a file's chunks with their checksums as its bytes come, in order."""

    def __init__(self, name: str, chunk_bytes: int, partition: Partition) -> None:
        self._name = name
        self._chunk_bytes = chunk_bytes
        self._partition = partition
        self._hash = xxhash.xxh3_64()

    def update(self, offset: int, data: memoryview) -> None:
        """Take in the bytes at ``offset``, the next ones. Raises InvalidCheckpoint naming a chunk that is wrong."""
        for at, piece in self._cut(offset, data):
            self._hash.update(piece)
            end = at + len(piece)
            if end % self._chunk_bytes and end != self._partition.size_bytes:
                continue
            number = (end - 1) // self._chunk_bytes
            found, expected = self._hash.intdigest(), self._partition.chunk_xxh3[number]
            if found != expected:
                start = number * self._chunk_bytes
                raise InvalidCheckpoint(
                    f"{self._name}: the {end - start} bytes at offset {start} are not what was ingested "
                    f"(xxh3 {found:016x}, expected {expected:016x})"
                )
            self._hash.reset()

    def _cut(self, offset: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        while data:
            room = self._chunk_bytes - offset % self._chunk_bytes
            yield offset, data[:room]
            offset, data = offset + min(room, len(data)), data[room:]


def _check_cancel(asked: _Asked) -> None:
    if asked.cancelled.is_set():
        raise _cancelled()


def _cancelled() -> Cancelled:
    return Cancelled("the verification was cancelled")
