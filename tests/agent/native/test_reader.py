"""The reader's threads: order of age, cancel, short and shrinking files, both ways of reading."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.native import reader
from agent.native.reader import ReadJob, ReadPool, Unit

MIB = 1 << 20


@pytest.fixture
def pool() -> Iterator[ReadPool]:
    pool = ReadPool(2)
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
        with self._done:
            assert self._done.wait_for(lambda: job in self.finished, timeout=30)


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


def test_disk_error_is_named_with_its_offset(pool: ReadPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "f", 4 * MIB)
    real = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if offset >= 2 * MIB:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(reader.os, "preadv", failing)
    watch = Watch()
    job = pool.submit(units(tmp_path / "f", 4 * MIB, memoryview(bytearray(4 * MIB)), 2 * MIB), watch)
    watch.wait(job)
    assert str(job.error) == f"cannot read {tmp_path / 'f'} at byte {2 * MIB}: Input/output error"
    assert job.error is not None
    assert job.error.code == "internal"


def test_short_reads_and_refused_direct_reads_are_made_good(
    pool: ReadPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "f", MIB)
    real = os.preadv

    def stingy(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT:
            raise OSError(errno.EAGAIN, "not cached")
        if os.get_blocking(descriptor):  # the one opened for direct reads
            raise OSError(errno.EINVAL, "bad alignment")
        return real(descriptor, [buffers[0][:70001]], offset, flags)

    monkeypatch.setattr(reader.os, "preadv", stingy)
    memory = memoryview(bytearray(MIB))
    watch = Watch()
    job = pool.submit(units(tmp_path / "f", MIB, memory), watch)
    watch.wait(job)
    assert job.error is None
    assert memory == data


def test_cancel_ends_a_job_and_leaves_its_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "f", 8 * MIB)
    entered, leave = threading.Event(), threading.Event()
    real = os.preadv

    def held(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        entered.set()
        assert leave.wait(30)
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(reader.os, "preadv", held)
    pool, watch = ReadPool(1), Watch()
    memory = memoryview(bytearray(8 * MIB))
    job = pool.submit(units(tmp_path / "f", 8 * MIB, memory), watch)
    assert entered.wait(30)
    pool.cancel(job)
    assert not job.finished
    leave.set()
    watch.wait(job)
    assert job.error is not None
    assert job.error.code == "cancelled"
    assert not any(memory[MIB:])
    pool.close()


def test_the_oldest_job_is_served_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "f", 4 * MIB)
    entered, leave = threading.Event(), threading.Event()
    real = os.preadv

    def held(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        entered.set()
        assert leave.wait(30)
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(reader.os, "preadv", held)
    pool, watch = ReadPool(1), Watch()
    jobs = []
    for _ in range(3):
        memory = memoryview(bytearray(4 * MIB))
        jobs.append(pool.submit(units(tmp_path / "f", 4 * MIB, memory), watch))
        assert entered.wait(30)
    leave.set()
    for job in jobs:
        watch.wait(job)
    assert watch.finished == jobs
    pool.close()


def test_closing_ends_what_runs(tmp_path: Path) -> None:
    write(tmp_path / "f", 32 * MIB)
    pool, watch = ReadPool(1), Watch()
    job = pool.submit(units(tmp_path / "f", 32 * MIB, memoryview(bytearray(32 * MIB))), watch)
    pool.close()
    assert job.finished
