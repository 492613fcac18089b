"""Reading, by io_uring and by threads: fair shares, rings, cancel, short and shrinking files, both ways of reading."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from agent.native import files, threads
from agent.native.reader import Priority, ReadJob, ReadPool, Unit
from agent.native.uring import NoRing
from tests.agent.native.clock import STALL_S, Clock

MIB = 1 << 20


@pytest.fixture(params=["io_uring", "threads"])
def pool(request: pytest.FixtureRequest) -> Iterator[ReadPool]:
    try:
        pool = ReadPool(2, backend=request.param)
    except NoRing as error:
        pytest.skip(str(error))
    yield pool
    pool.close()


@pytest.fixture
def threaded() -> Iterator[ReadPool]:
    pool = ReadPool(2, backend="threads")
    yield pool
    pool.close()


class Watch:
    """Keeps the order in which jobs finish; ``wait`` returns when the given one has."""

    def __init__(self) -> None:
        self._done = threading.Condition()
        self.finished: list[ReadJob] = []

    def __call__(self, job: ReadJob) -> None:
        with self._done:
            if job.finished:
                self.finished.append(job)
            self._done.notify_all()

    def wait(self, job: ReadJob) -> None:
        self.until(lambda: job in self.finished)

    def until(self, true: Callable[[], bool]) -> None:
        with self._done:
            assert self._done.wait_for(true, timeout=100)


def units(path: Path, size: int, memory: memoryview, step: int = MIB) -> list[Unit]:
    return [Unit(path, size, at, (memory[at : min(at + step, size)],)) for at in range(0, size, step)]


def write(path: Path, size: int) -> bytes:
    data = os.urandom(size)
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("size", [4096, MIB, 9 * MIB + 4096, 3 * MIB + 1])
def test_bytes_arrive(pool: ReadPool, tmp_path: Path, size: int, cached: bool) -> None:
    data = write(tmp_path / "f", size)
    if not cached:
        descriptor = os.open(tmp_path / "f", os.O_RDWR)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    memory = memoryview(bytearray(size))
    watch = Watch()
    job = pool.submit(units(tmp_path / "f", size, memory), watch)
    watch.wait(job)
    assert job.error is None
    assert job.done_bytes == size
    assert memory == data


def test_file_that_shrinks_under_the_read_is_named_with_its_offset(pool: ReadPool, tmp_path: Path) -> None:
    write(tmp_path / "f", 4 * MIB)
    memory = memoryview(bytearray(8 * MIB))
    watch = Watch()
    ahead = [Unit(tmp_path / "f", 4 * MIB, 4 * MIB - 4096, (memory[:8192],))]
    job = pool.submit(ahead, watch)
    watch.wait(job)
    assert job.error is not None
    assert job.error.code == "invalid_checkpoint"
    assert f"{tmp_path / 'f'} ends at byte {4 * MIB}" in str(job.error)


def test_disk_error_is_named_with_its_offset(threaded: ReadPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "f", 4 * MIB)
    real = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if offset >= 2 * MIB:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(threads.os, "preadv", failing)
    watch = Watch()
    job = threaded.submit(units(tmp_path / "f", 4 * MIB, memoryview(bytearray(4 * MIB)), 2 * MIB), watch)
    watch.wait(job)
    assert str(job.error) == f"cannot read {tmp_path / 'f'} at byte {2 * MIB}: Input/output error"
    assert job.error is not None
    assert job.error.code == "internal"


def test_short_reads_and_refused_direct_reads_are_made_good(
    threaded: ReadPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "f", MIB)
    real = os.preadv

    def unknown(descriptor: int, offset: int, length: int) -> tuple[int, int]:
        raise OSError(errno.ENOSYS, "Function not implemented")

    def stingy(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT:
            raise OSError(errno.EAGAIN, "not cached")
        if os.get_blocking(descriptor):  # the one opened for direct reads
            raise OSError(errno.EINVAL, "bad alignment")
        return real(descriptor, [buffers[0][:70001]], offset, flags)

    monkeypatch.setattr(files, "cached_pages", unknown)
    monkeypatch.setattr(threads.os, "preadv", stingy)
    memory = memoryview(bytearray(MIB))
    watch = Watch()
    job = threaded.submit(units(tmp_path / "f", MIB, memory), watch)
    watch.wait(job)
    assert job.error is None
    assert memory == data


def test_cancel_ends_a_job_and_leaves_its_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "f", 8 * MIB)
    entered, leave = threading.Event(), threading.Event()
    real = os.preadv

    def held(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        entered.set()
        assert leave.wait(100)
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(threads.os, "preadv", held)
    pool, watch = ReadPool(1, backend="threads"), Watch()
    memory = memoryview(bytearray(8 * MIB))
    job = pool.submit(units(tmp_path / "f", 8 * MIB, memory), watch)
    assert entered.wait(100)
    pool.cancel(job)
    assert not job.finished
    leave.set()
    watch.wait(job)
    assert job.error is not None
    assert job.error.code == "cancelled"
    assert not any(memory[MIB:])
    pool.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.leave.set()


class Gate:
    """Holds back every read until ``leave`` is set; ``entered`` tells of the first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()
        real = os.preadv

        def held(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            self.entered.set()
            assert self.leave.wait(100)
            return real(descriptor, buffers, offset, flags)

        monkeypatch.setattr(threads.os, "preadv", held)


def read_side_by_side(tmp_path: Path, gate: Gate, priorities: list[Priority], counts: list[int]) -> list[int]:
    """The order in which jobs of so many units each were served, by one thread that was busy while they came."""
    write(tmp_path / "f", 64 * 4096)
    pool, watch = ReadPool(1, backend="threads"), Watch()
    order: list[int] = []
    memory = memoryview(bytearray(64 * 4096))

    def submit(number: int, priority: Priority, count: int) -> ReadJob:
        work = units(tmp_path / "f", 64 * 4096, memory, 4096)[:count]
        return pool.submit(work, watch, priority=priority, unit_done=lambda *_: order.append(number))

    jobs = [submit(-1, Priority.REQUEST, 1)]
    assert gate.entered.wait(100)
    jobs += [submit(number, *each) for number, each in enumerate(zip(priorities, counts, strict=True))]
    gate.leave.set()
    for job in jobs:
        watch.wait(job)
        assert job.error is None
    pool.close()
    return order[1:]


def test_jobs_of_one_priority_share_fairly(tmp_path: Path, gate: Gate) -> None:
    order = read_side_by_side(tmp_path, gate, [Priority.REQUEST] * 3, [8, 8, 8])
    for at in range(0, 24, 3):
        assert sorted(order[at : at + 3]) == [0, 1, 2]


def test_a_higher_priority_goes_first_and_never_starves_the_rest(tmp_path: Path, gate: Gate) -> None:
    order = read_side_by_side(tmp_path, gate, [Priority.PREFETCH, Priority.REQUEST, Priority.BACKGROUND], [16, 64, 4])
    while_requested = order[: len(order) - order[::-1].index(1)]
    assert 6 <= while_requested.count(0) <= 10
    assert 1 <= while_requested.count(2) <= 2
    assert order[:10].count(1) >= 7


def test_a_job_that_is_raised_goes_on_as_urgently_as_those_it_joins(tmp_path: Path, gate: Gate) -> None:
    write(tmp_path / "f", 64 * 4096)
    pool, watch = ReadPool(1, backend="threads"), Watch()
    order: list[int] = []
    memory = memoryview(bytearray(64 * 4096))
    work = units(tmp_path / "f", 64 * 4096, memory, 4096)
    low = pool.submit(work, watch, priority=Priority.BACKGROUND, unit_done=lambda *_: order.append(0))
    assert gate.entered.wait(100)
    high = pool.submit(work, watch, unit_done=lambda *_: order.append(1))
    pool.raise_priority(low, Priority.REQUEST)
    pool.raise_priority(low, Priority.PREFETCH)
    assert low.priority is Priority.REQUEST
    gate.leave.set()
    watch.wait(low)
    watch.wait(high)
    assert 28 <= order[:64].count(0) <= 36
    pool.close()


def test_units_are_told_of_once_their_bytes_are_right(pool: ReadPool, tmp_path: Path) -> None:
    data = write(tmp_path / "f", 8 * MIB)
    memory = memoryview(bytearray(8 * MIB))
    watch, told = Watch(), []

    def done(job: ReadJob, unit: Unit) -> None:
        assert not job.finished
        told.append((unit.offset_bytes, bytes(unit.targets[0]) == data[unit.offset_bytes : unit.offset_bytes + MIB]))

    job = pool.submit(units(tmp_path / "f", 8 * MIB, memory), watch, unit_done=done)
    watch.wait(job)
    assert sorted(told) == [(at, True) for at in range(0, 8 * MIB, MIB)]
    assert job.prefix_bytes == job.done_bytes == 8 * MIB


def test_a_sink_that_fails_ends_the_job(pool: ReadPool, tmp_path: Path) -> None:
    write(tmp_path / "f", MIB)

    def full(job: ReadJob, unit: Unit) -> None:
        raise RuntimeError("no room")

    watch = Watch()
    job = pool.submit(units(tmp_path / "f", MIB, memoryview(bytearray(MIB))), watch, unit_done=full)
    watch.wait(job)
    assert job.error is not None
    assert "no room" in str(job.error)


def test_a_ring_of_two_slots_takes_a_file_of_any_size(pool: ReadPool, tmp_path: Path) -> None:
    data = write(tmp_path / "f", 16 * MIB)
    slots = [memoryview(bytearray(MIB)) for _ in range(2)]
    free = queue.SimpleQueue[memoryview]()
    copied, watch = bytearray(16 * MIB), Watch()

    def drained(job: ReadJob, unit: Unit) -> None:
        copied[unit.offset_bytes : unit.offset_bytes + MIB] = unit.targets[0]
        free.put(unit.targets[0])

    job = pool.submit([], watch, unit_done=drained, last=False)
    for slot in slots:
        free.put(slot)
    for at in range(0, 16 * MIB, MIB):
        unit = Unit(tmp_path / "f", 16 * MIB, at, (free.get(timeout=100),))
        assert not job.finished
        pool.feed(job, [unit], last=at == 15 * MIB)
    watch.wait(job)
    assert job.error is None
    assert copied == data
    assert job.prefix_bytes == 16 * MIB
    with pytest.raises(ValueError, match="last"):
        pool.feed(job, [], last=True)


def test_an_open_job_ends_by_its_last_units_by_a_cancel_and_by_closing(tmp_path: Path) -> None:
    pool, watch = ReadPool(2, backend="threads"), Watch()
    jobs = [pool.submit([], watch, last=False) for _ in range(3)]
    pool.feed(jobs[0], [], last=True)
    watch.wait(jobs[0])
    assert jobs[0].error is None
    pool.cancel(jobs[1])
    watch.wait(jobs[1])
    pool.feed(jobs[1], [Unit(tmp_path / "none", 1, 0, (memoryview(bytearray(1)),))], last=True)
    pool.close()
    assert [job.error.code for job in jobs[1:] if job.error is not None] == ["cancelled", "cancelled"]
    assert jobs[2].finished


def test_closing_ends_what_runs(pool: ReadPool, tmp_path: Path) -> None:
    write(tmp_path / "f", 32 * MIB)
    watch = Watch()
    job = pool.submit(units(tmp_path / "f", 32 * MIB, memoryview(bytearray(32 * MIB))), watch)
    pool.close()
    assert job.finished


def test_a_wrong_checksum_is_the_copys_fault_and_names_the_place(pool: ReadPool, tmp_path: Path) -> None:
    data = write(tmp_path / "f", 3 * MIB)
    memory = memoryview(bytearray(3 * MIB))
    right = [
        Unit(unit.file, unit.file_bytes, unit.offset_bytes, unit.targets, xxhash.xxh3_64_intdigest(data[at : at + MIB]))
        for at, unit in zip(range(0, 3 * MIB, MIB), units(tmp_path / "f", 3 * MIB, memory), strict=True)
    ]
    watch = Watch()
    job = pool.submit(right, watch)
    watch.wait(job)
    assert job.error is None
    assert memory == data
    wrong = Unit(tmp_path / "f", 3 * MIB, MIB, (memory[MIB : 2 * MIB],), 1)
    job = pool.submit([right[0], wrong, right[2]], watch)
    watch.wait(job)
    assert job.corrupt
    assert f"the {MIB} bytes at offset {MIB}" in str(job.error)


def test_what_cannot_be_opened_ends_the_job(pool: ReadPool, tmp_path: Path) -> None:
    memory = memoryview(bytearray(8 * MIB))
    watch = Watch()
    job = pool.submit(units(tmp_path / "none", 8 * MIB, memory), watch)
    watch.wait(job)
    assert job.error is not None
    assert job.error.code == "invalid_checkpoint"
    assert "No such file" in str(job.error)


@pytest.mark.parametrize("backend", ["io_uring", "threads"])
def test_an_opening_that_does_not_come_back_ends_its_job_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    data = write(tmp_path / "f", MIB)
    write(tmp_path / "stuck", MIB)
    clock, entered, leave = Clock(monkeypatch), threading.Event(), threading.Event()
    real = os.open

    def held(path: Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if Path(path).name == "stuck":
            entered.set()
            assert leave.wait(100)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(files.os, "open", held)
    try:
        pool = ReadPool(1, backend=backend, depth=2, stall_s=STALL_S)
    except NoRing as error:
        pytest.skip(str(error))
    watch = Watch()
    stuck = pool.submit(units(tmp_path / "stuck", MIB, memoryview(bytearray(MIB)), 4096), watch)
    assert entered.wait(100)
    clock.forward()
    memory = memoryview(bytearray(MIB))
    job = pool.submit(units(tmp_path / "f", MIB, memory), watch)
    watch.wait(job)
    assert memory == data
    watch.until(lambda: stuck.stalled is not None)
    assert str(stuck.stalled).startswith(f"opening {tmp_path / 'stuck'} has not come back")
    leave.set()
    watch.wait(stuck)
    assert stuck.error is stuck.stalled
    pool.close()


def test_a_unit_in_pieces_and_off_every_boundary(pool: ReadPool, tmp_path: Path) -> None:
    data = write(tmp_path / "f", 6 * MIB + 777)
    memory = memoryview(bytearray(6 * MIB))
    pieces = (memory[:100], memory[100 : 2 * MIB + 5], memory[2 * MIB + 5 :])
    watch = Watch()
    sums = xxhash.xxh3_64_intdigest(data[333 : 333 + 6 * MIB])
    job = pool.submit([Unit(tmp_path / "f", 6 * MIB + 777, 333, pieces, sums)], watch)
    watch.wait(job)
    assert job.error is None
    assert memory == data[333 : 333 + 6 * MIB]


def test_a_read_that_does_not_come_back_ends_its_job_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "f", MIB)
    write(tmp_path / "stuck", MIB)
    clock, entered, leave = Clock(monkeypatch), threading.Event(), threading.Event()
    real = os.preadv

    def held(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "stuck":
            entered.set()
            assert leave.wait(100)
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(threads.os, "preadv", held)
    pool, watch = ReadPool(1, backend="threads", stall_s=STALL_S), Watch()
    stuck = pool.submit(units(tmp_path / "stuck", MIB, memoryview(bytearray(MIB))), watch)
    memory = memoryview(bytearray(MIB))
    job = pool.submit(units(tmp_path / "f", MIB, memory), watch)
    assert entered.wait(100)
    clock.forward()
    watch.wait(job)
    assert memory == data
    assert stuck.error is not None
    assert str(stuck.error).startswith(f"reading {tmp_path / 'stuck'} at byte 0 has not come back")
    assert not stuck.finished
    leave.set()
    watch.wait(stuck)
    pool.close()
