"""The reader over io_uring: one thread that keeps a ring full of large blocks, with helpers for what would hold it up.

Each block is read from the page cache if it lies there, else past it. Whether it does is asked for first (cachestat); then a
kernel thread copies it, so that several are copied at a time. Where the kernel does not answer that, a read that must not
wait (RWF_NOWAIT) tells. Opening files and checksums are the helpers': neither stalls the ring.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import xxhash

from agent.native.address import address_of
from agent.native.files import DIRECT_ALIGN_BYTES, OpenFile, stalled, wrong_checksum
from agent.native.jobs import JobQueue, ReadJob, Work
from agent.native.uring import ASYNC, NoRing, Ring
from schema.errors import SllmError

__all__ = ["RingReader"]

_TICK_S: Final = 1.0
"""How often reads are looked at that do not come back."""
_TOGETHER: Final = 4
_REST_S: Final = 3600.0
_CANCELLATION: Final = 1 << 63
"""The user data of cancellations; reads count from 1, and 0 is the wait to be woken."""
_AGAINS: Final = 1000
"""A read that the kernel puts off so often has failed."""
_MAX_DEPTH: Final = 64
_ENTRIES: Final = 4 * _MAX_DEPTH
"""Of the ring: when all reads are overdue, as many are cancelled, and as many begun, before it is entered again."""
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Task:
    """A unit under way: ``left`` blocks of it are not over yet."""

    work: Work
    file: OpenFile
    left: int = 0
    error: SllmError | None = None


@dataclass(slots=True, eq=False)
class _Block:
    """A run of a unit, read at once; what is left of it after a short read."""

    task: _Task
    memory: memoryview
    offset: int
    nowait: bool = False
    direct: bool = False
    began: float = 0.0
    agains: int = 0
    overdue: bool = False


@dataclass(slots=True, eq=False)
class _Opening:
    """A file that a helper opens, or is to open since ``asked``, and the units that wait for it."""

    path: Path
    asked: float
    began: float = inf
    works: list[Work] = field(default_factory=list)
    overdue: bool = False


@dataclass(slots=True)
class _Files:
    """What is open for one job, and what is about to be."""

    open: dict[Path, OpenFile] = field(default_factory=dict)
    opening: dict[Path, _Opening] = field(default_factory=dict)


class RingReader:
    """A `Reader` of ``depth`` blocks of ``block_bytes`` at a time. Raises NoRing where the kernel gives none.

    A block that has not come back for ``stall_s`` ends its job; its memory is the kernel's until it does come back.
    """

    name: Final = "io_uring"

    def __init__(self, *, block_bytes: int, depth: int, helpers: int, stall_s: float) -> None:
        self.queue = JobQueue(self._ended)
        self.block_bytes = block_bytes
        self.depth = min(depth, _MAX_DEPTH)
        self._stall_s = stall_s
        self._files: dict[ReadJob, _Files] = {}
        self._openings: set[_Opening] = set()
        self._opened: SimpleQueue[tuple[_Files, _Opening, OpenFile | SllmError]] = SimpleQueue()
        self._errands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._backlog: deque[_Block] = deque()
        self._flying: dict[int, _Block] = {}
        self._overdue = 0
        self._waiting = 0
        self._serial = 0
        self._closed = False
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        refused: SimpleQueue[SllmError | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, args=(refused,), name="ring", daemon=True)
        self._thread.start()
        error = refused.get()
        if error is not None:
            self._thread.join()
            os.close(self._woken)
            raise error
        self._helpers: list[threading.Thread] = []
        for _ in range(helpers):
            self._start_helper()

    def wake(self) -> None:
        if not self._closed:
            os.eventfd_write(self._woken, 1)

    def tune(self, block_bytes: int, depth: int) -> None:
        self.block_bytes, self.depth = block_bytes, min(depth, _MAX_DEPTH)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._woken, 1)
        self._thread.join(self._stall_s)
        if self._thread.is_alive():
            _log.error("a read of %s does not come back; it is left behind", ", ".join(self._stuck()))
            return
        for _ in self._helpers:
            self._errands.put(None)
        for helper in self._helpers:
            helper.join()
        os.close(self._woken)

    # --- the ring's thread

    def _serve(self, refused: SimpleQueue[SllmError | None]) -> None:
        try:
            ring = Ring(_ENTRIES)
        except NoRing as error:
            refused.put(error)
            return
        refused.put(None)
        ring.poll(self._woken, 0)
        try:
            while self._fill(ring):
                # Of many under way a few are awaited at a time: the disk has enough to do, and each awakening costs.
                awaited = max(1, min(_TOGETHER, (len(self._flying) - self._overdue) // 8))
                ring.enter(_TICK_S if self._flying or self._openings else _REST_S, awaited)
                for user_data, result in ring.completions():
                    self._completed(ring, user_data, result)
                self._look_for_overdue(ring)
        except Exception as error:
            # Reads under way would go on into memory that another was given: only the process's end is the end of them.
            # The next store takes the arena back.
            _log.critical("the reader has failed, and so must this process: %r", error, exc_info=error)
            os._exit(os.EX_SOFTWARE)
        ring.close()

    def _fill(self, ring: Ring) -> bool:
        """Take work until the ring is full or there is none. False when all is over for good."""
        room = self.depth
        while True:
            while self._backlog and len(self._flying) - self._overdue < room:
                self._launch(ring, self._backlog.popleft())
            if self._backlog or len(self._flying) - self._overdue + self._waiting >= room:
                return True
            with self.queue.condition:
                work = self.queue.take()
                if work is None:
                    return not self._closed or bool(self.queue.jobs)
            self._begin(work)

    def _begin(self, work: Work) -> None:
        if work.unit is None:
            self.queue.settle(work, None)
            return
        files = self._files.setdefault(work.job, _Files())
        file = files.open.get(work.unit.file)
        if file is not None:
            self._cut(_Task(work, file))
            return
        opening = files.opening.get(work.unit.file)
        if opening is None:
            opening = files.opening[work.unit.file] = _Opening(work.unit.file, time.monotonic())
            self._openings.add(opening)
            size_bytes = work.unit.file_bytes
            self._errands.put(lambda: self._open(files, opening, size_bytes))
        opening.works.append(work)
        self._waiting += not opening.overdue

    def _cut(self, task: _Task) -> None:
        """Blocks of a unit: within one piece of memory, whole pages of the file, the odd rest by itself."""
        unit = task.work.unit
        assert unit is not None
        offset = unit.offset_bytes
        for target in unit.targets:
            at = 0
            while at < len(target):
                length = min(self.block_bytes, len(target) - at)
                if length > DIRECT_ALIGN_BYTES:
                    length -= (offset + at + length) % DIRECT_ALIGN_BYTES
                self._backlog.append(_Block(task, target[at : at + length], offset + at))
                task.left += 1
                at += length
            offset += len(target)
        if not task.left:
            self._over(task)

    def _launch(self, ring: Ring, block: _Block) -> None:
        task = block.task
        if task.work.job.error is not None or task.error is not None:
            self._block_over(block, None)
            return
        file, length = task.file, len(block.memory)
        cached = file.in_cache(block.offset, length)
        block.nowait = cached is None
        aligned = not block.offset % DIRECT_ALIGN_BYTES and not length % DIRECT_ALIGN_BYTES
        block.direct = cached is False and file.use_direct and aligned
        self._send(ring, block)

    def _send(self, ring: Ring, block: _Block) -> None:
        self._serial += 1
        self._flying[self._serial] = block
        block.began = time.monotonic()
        descriptor = block.task.file.direct if block.direct else block.task.file.cached
        ring.read(
            descriptor, address_of(block.memory), len(block.memory), block.offset, self._serial,
            rw_flags=os.RWF_NOWAIT if block.nowait else 0, flags=0 if block.nowait or block.direct else ASYNC,
        )  # fmt: skip

    def _completed(self, ring: Ring, user_data: int, result: int) -> None:
        if not user_data:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._woken)
            ring.poll(self._woken, 0)
            while not self._opened.empty():
                self._file_opened(*self._opened.get())
            return
        block = self._flying.pop(user_data, None)
        if block is None:
            return  # a cancellation's own answer
        if block.overdue:
            self._overdue -= 1
        file = block.task.file
        if result > 0:
            block.memory, block.offset, block.agains = block.memory[result:], block.offset + result, 0
            if not block.memory:
                self._block_over(block, None)
            else:
                self._launch(ring, block)
        elif result == 0:
            self._block_over(block, file.short(block.offset))
        elif block.task.work.job.error is not None:
            self._block_over(block, None)
        elif block.nowait and -result in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
            file.try_cache = file.try_cache and result == -errno.EAGAIN
            block.nowait = False
            block.direct = file.use_direct and not (block.offset | len(block.memory)) % DIRECT_ALIGN_BYTES
            self._send(ring, block)
        elif block.direct and result == -errno.EINVAL:
            file.use_direct = block.direct = False  # the file system opens for direct reads and then wants another alignment
            self._send(ring, block)
        elif -result in (errno.EAGAIN, errno.EINTR, errno.ECANCELED) and block.agains < _AGAINS:
            block.agains += 1
            self._send(ring, block)
        else:
            self._block_over(block, file.failed(block.offset, os.strerror(-result)))

    def _file_opened(self, files: _Files, opening: _Opening, file: OpenFile | SllmError) -> None:
        del files.opening[opening.path]
        self._openings.discard(opening)
        if not opening.overdue:
            self._waiting -= len(opening.works)
        if isinstance(file, OpenFile):
            files.open[opening.path] = file
        for work in opening.works:
            if isinstance(file, OpenFile):
                self._cut(_Task(work, file))
            else:
                self.queue.settle(work, file)

    def _block_over(self, block: _Block, error: SllmError | None) -> None:
        task = block.task
        task.left -= 1
        task.error = task.error or error
        if not task.left:
            self._over(task)

    def _over(self, task: _Task) -> None:
        work, job = task.work, task.work.job
        assert work.unit is not None
        if task.error is None and job.error is None and work.unit.xxh3 is not None:
            self._errands.put(lambda: self._check(work))
        else:
            self.queue.settle(work, task.error)

    def _look_for_overdue(self, ring: Ring) -> None:
        now = time.monotonic()
        untried = [each for each in self._openings if each.began == inf and now - each.asked >= self._stall_s]
        stuck = [each for each in self._openings if not each.overdue and now - each.began >= self._stall_s]
        for opening in (*untried, *stuck):
            self._start_helper()  # for one that all keep waiting, or in the place of the one that is stuck
            if opening in untried:
                opening.asked = now
            else:
                opening.overdue = True
                self._waiting -= len(opening.works)
                self._stall(opening.works[0].job, stalled(opening.path, None, self._stall_s))
        for serial, block in self._flying.items():
            if now - block.began < self._stall_s:
                return  # they are in the order of their beginnings
            if not block.overdue:
                block.overdue = True
                self._overdue += 1
                self._stall(block.task.work.job, stalled(block.task.file.path, block.offset, self._stall_s))
                ring.cancel(serial, _CANCELLATION)

    def _stall(self, job: ReadJob, error: SllmError) -> None:
        _log.error("%s", error)
        self.queue.stall(job, error)

    def _stuck(self) -> list[str]:
        reads = [f"{block.task.file.path} at byte {block.offset}" for block in list(self._flying.values())]
        return [*reads, *(str(opening.path) for opening in list(self._openings))]

    # --- helpers

    def _start_helper(self) -> None:
        helper = threading.Thread(target=self._help, name=f"ring-{len(self._helpers)}", daemon=True)
        self._helpers.append(helper)
        helper.start()

    def _help(self) -> None:
        while (errand := self._errands.get()) is not None:
            errand()

    def _open(self, files: _Files, opening: _Opening, size_bytes: int) -> None:
        file: OpenFile | SllmError
        opening.began = time.monotonic()
        try:
            file = OpenFile(opening.path, size_bytes)
        except SllmError as error:
            file = error
        except Exception as error:  # a helper has no caller: whatever it is, it is the job's end
            file = SllmError(f"opening {opening.path} failed: {type(error).__name__}: {error}")
        self._opened.put((files, opening, file))
        os.eventfd_write(self._woken, 1)  # also while it is being closed: these units have yet to be settled

    def _check(self, work: Work) -> None:
        unit = work.unit
        assert unit is not None
        digest = xxhash.xxh3_64()
        for target in unit.targets:
            digest.update(target)
        found = digest.intdigest()
        wrong = found != unit.xxh3
        self.queue.settle(work, wrong_checksum(unit, found) if wrong else None, corrupt=wrong)
        if self._closed:  # the ring may wait for nothing but this
            os.eventfd_write(self._woken, 1)

    def _ended(self, job: ReadJob) -> None:
        files = self._files.pop(job, None)
        for file in files.open.values() if files is not None else ():
            file.close()
