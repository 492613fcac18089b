"""The ring: every way in which a read can end, and where there is no io_uring."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.native import files, reader, ring_reader
from agent.native.reader import Priority, ReadPool, Unit
from agent.native.uring import NoRing, Ring
from tests.agent.native.clock import STALL_S, Clock
from tests.agent.native.test_reader import MIB, Watch, units, write

Rule = Callable[[int, int, bool], int]
"""What becomes of a result: from (offset, result, direct)."""


@pytest.fixture(autouse=True)
def _needs_a_ring() -> None:
    try:
        Ring(4).close()
    except NoRing as error:
        pytest.skip(str(error))


def faulty(monkeypatch: pytest.MonkeyPatch, rule: Rule) -> list[tuple[int, int]]:
    """Let a rule change the results of reads; returns their (offset, length), as they are begun."""
    begun: list[tuple[int, int]] = []

    class FaultyRing(Ring):
        def __init__(self, entries: int) -> None:
            super().__init__(entries)
            self.reads: dict[int, tuple[int, bool]] = {}
            self.kept: list[tuple[int, int]] = []

        def read(
            self, descriptor: int, address: int, length: int, offset: int, user_data: int, *, rw_flags: int = 0, flags: int = 0
        ) -> None:
            begun.append((offset, length))
            self.reads[user_data] = (offset, not flags and not rw_flags)
            super().read(descriptor, address, length, offset, user_data, rw_flags=rw_flags, flags=flags)

        def completions(self) -> list[tuple[int, int]]:
            found = [*self.kept, *super().completions()]
            self.kept = []
            told = []
            for user_data, result in found:
                if user_data in self.reads:
                    offset, direct = self.reads[user_data]
                    changed = rule(offset, result, direct)
                    if changed == HELD:
                        self.kept.append((user_data, result))
                        continue
                    told.append((user_data, changed))
                else:
                    told.append((user_data, result))
            return told

    monkeypatch.setattr(ring_reader, "Ring", FaultyRing)
    return begun


HELD = -100000


def cold(path: Path, size: int) -> bytes:
    data = write(path, size)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return data


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not true():
        assert time.monotonic() < deadline
        os.sched_yield()


def test_short_reads_go_on_where_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(7)
    faulty(monkeypatch, lambda offset, result, direct: chance.randrange(1, result + 1) if result > 5000 else result)
    data = cold(tmp_path / "f", 3 * MIB + 123)
    pool, watch, memory = ReadPool(1, backend="io_uring"), Watch(), memoryview(bytearray(3 * MIB + 123))
    job = pool.submit(units(tmp_path / "f", len(data), memory), watch)
    watch.wait(job)
    assert job.error is None
    assert memory == data
    pool.close()


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR, errno.ECANCELED])
def test_what_the_kernel_puts_off_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    failures = iter([code] * 40)
    faulty(monkeypatch, lambda offset, result, direct: -next(failures, -result))
    data = cold(tmp_path / "f", 2 * MIB)
    pool, watch, memory = ReadPool(1, backend="io_uring"), Watch(), memoryview(bytearray(2 * MIB))
    job = pool.submit(units(tmp_path / "f", len(data), memory), watch)
    watch.wait(job)
    assert job.error is None
    assert memory == data
    pool.close()


def test_what_it_puts_off_for_ever_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_reader, "_AGAINS", 20)
    faulty(monkeypatch, lambda offset, result, direct: -errno.EAGAIN)
    cold(tmp_path / "f", MIB)
    pool, watch = ReadPool(1, backend="io_uring"), Watch()
    job = pool.submit(units(tmp_path / "f", MIB, memoryview(bytearray(MIB))), watch)
    watch.wait(job)
    assert "at byte 0: Resource temporarily unavailable" in str(job.error)
    pool.close()


def test_a_disk_error_is_named_with_its_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, lambda offset, result, direct: -errno.EIO if offset >= 2 * MIB else result)
    cold(tmp_path / "f", 4 * MIB)
    pool, watch = ReadPool(1, backend="io_uring"), Watch()
    job = pool.submit(units(tmp_path / "f", 4 * MIB, memoryview(bytearray(4 * MIB)), 2 * MIB), watch)
    watch.wait(job)
    assert str(job.error) == f"cannot read {tmp_path / 'f'} at byte {2 * MIB}: Input/output error"
    pool.close()


def test_a_file_system_that_wants_another_alignment_is_read_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directs: list[int] = []

    def strict(offset: int, result: int, direct: bool) -> int:
        if direct:
            directs.append(offset)
            return -errno.EINVAL
        return result

    faulty(monkeypatch, strict)
    data = cold(tmp_path / "f", 8 * MIB)
    pool, watch, memory = ReadPool(1, backend="io_uring", depth=1), Watch(), memoryview(bytearray(8 * MIB))
    job = pool.submit(units(tmp_path / "f", len(data), memory), watch)
    watch.wait(job)
    assert job.error is None
    assert memory == data
    assert directs == [0]
    pool.close()


@pytest.mark.parametrize("warm", [True, False])
def test_where_the_kernel_cannot_tell_what_is_cached_a_read_that_must_not_wait_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    def unknown(descriptor: int, offset: int, length: int) -> tuple[int, int]:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files, "cached_pages", unknown)
    data = (write if warm else cold)(tmp_path / "f", 5 * MIB + 10)
    pool, watch, memory = ReadPool(1, backend="io_uring"), Watch(), memoryview(bytearray(len(data)))
    job = pool.submit(units(tmp_path / "f", len(data), memory), watch)
    watch.wait(job)
    assert job.error is None
    assert memory == data
    pool.close()


def test_a_read_that_does_not_come_back_ends_its_job_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, leave = Clock(monkeypatch), threading.Event()
    begun = faulty(monkeypatch, lambda offset, result, direct: HELD if offset == 7 * 4096 and not leave.is_set() else result)
    data = cold(tmp_path / "f", MIB)
    pool, watch, memory = ReadPool(1, backend="io_uring", depth=1, stall_s=STALL_S), Watch(), memoryview(bytearray(MIB))
    stuck = pool.submit([Unit(tmp_path / "f", MIB, 7 * 4096, (memoryview(bytearray(4096)),))], watch)
    job = pool.submit(units(tmp_path / "f", MIB, memory), watch)
    until(lambda: bool(begun))
    clock.forward()
    watch.wait(job)
    assert job.error is None
    assert memory == data
    assert stuck.error is not None
    assert stuck.error.code == "timed_out"
    assert str(stuck.error).startswith(f"reading {tmp_path / 'f'} at byte {7 * 4096} has not come back")
    assert not stuck.finished
    leave.set()
    pool.cancel(job)
    watch.wait(stuck)
    pool.close()


def test_a_disk_that_holds_all_reads_at_once_ends_their_job_and_not_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, leave, ended = Clock(monkeypatch), threading.Event(), threading.Event()
    depth = ring_reader._MAX_DEPTH
    faulty(monkeypatch, lambda offset, result, direct: HELD if offset < depth * 4096 and not leave.is_set() else result)
    monkeypatch.setattr(ring_reader.os, "_exit", lambda code: ended.set())
    cold(tmp_path / "f", MIB)
    late = threading.Event()

    class LateRing(ring_reader.Ring):  # type: ignore[misc, name-defined]
        def enter(self, timeout_s: float, completions: int = 1) -> None:
            if len(self.kept) == depth and not late.is_set():
                late.set()
                clock.forward()  # all of them are overdue when they are looked at next
                pool._reader.wake()
            super().enter(timeout_s, completions)

    monkeypatch.setattr(ring_reader, "Ring", LateRing)
    pool, watch = ReadPool(1, backend="io_uring", depth=depth, block_bytes=4096, stall_s=STALL_S), Watch()
    blocks = [Unit(tmp_path / "f", MIB, 4096 * each, (memoryview(bytearray(4096)),)) for each in range(4 * depth)]
    job = pool.submit(blocks[depth:], watch, priority=Priority.BACKGROUND)
    stuck = pool.submit(blocks[:depth], watch)
    until(lambda: job.finished or ended.is_set())
    assert late.is_set()
    assert not ended.is_set()
    assert job.error is None
    assert stuck.stalled is not None
    leave.set()
    watch.wait(stuck)
    pool.close()


def test_an_opening_is_overdue_only_once_a_helper_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "f", MIB)
    clock, entered, leave = Clock(monkeypatch), threading.Semaphore(0), threading.Event()
    real = os.open

    def held(path: Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if Path(path).name.startswith("stuck"):
            entered.release()
            assert leave.wait(100)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(files.os, "open", held)
    monkeypatch.setattr(reader, "_HELPERS", 1)
    pool, watch = ReadPool(1, backend="io_uring", stall_s=STALL_S), Watch()
    stuck = []
    for number in range(3):
        write(tmp_path / f"stuck{number}", MIB)
        stuck.append(pool.submit(units(tmp_path / f"stuck{number}", MIB, memoryview(bytearray(MIB))), watch))
    memory = memoryview(bytearray(MIB))
    job = pool.submit(units(tmp_path / "f", MIB, memory), watch)
    ring = pool._reader
    assert isinstance(ring, ring_reader.RingReader)
    until(lambda: len(ring._openings) == 4)
    assert entered.acquire(timeout=100)
    clock.forward()
    watch.wait(job)
    assert (job.error, memory) == (None, data)
    assert [each.stalled is not None for each in stuck] == [True, False, False]
    assert all(entered.acquire(timeout=100) for _ in stuck[1:]), "each helper that is stuck has another in its place"
    clock.forward()
    watch.until(lambda: all(each.stalled is not None for each in stuck))
    leave.set()
    for each in stuck:
        watch.wait(each)
    pool.close()


def test_closing_waits_for_no_read_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave = threading.Event()
    begun = faulty(monkeypatch, lambda offset, result, direct: result if leave.is_set() else HELD)
    monkeypatch.setattr(ring_reader, "_TICK_S", 0.05)
    cold(tmp_path / "f", MIB)
    pool, watch = ReadPool(1, backend="io_uring", stall_s=1.0), Watch()
    job = pool.submit(units(tmp_path / "f", MIB, memoryview(bytearray(MIB))), watch)
    until(lambda: bool(begun))
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 60
    assert not job.finished
    leave.set()
    watch.wait(job)


def test_a_cancelled_job_begins_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = threading.Event()
    begun = faulty(monkeypatch, lambda offset, result, direct: result if hold.is_set() else HELD)
    monkeypatch.setattr(ring_reader, "_TICK_S", 0.05)
    cold(tmp_path / "f", 8 * MIB)
    pool, watch = ReadPool(1, backend="io_uring", depth=2), Watch()
    job = pool.submit(units(tmp_path / "f", 8 * MIB, memoryview(bytearray(8 * MIB))), watch)
    until(lambda: len(begun) == 2)
    pool.cancel(job)
    hold.set()
    watch.wait(job)
    assert job.error is not None
    assert job.error.code == "cancelled"
    assert len(begun) == 2
    pool.close()


REFUSED = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
# Of every system call load its number; io_uring_setup (425) returns an error, the rest is allowed.
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | int(sys.argv[1])), (0x06, 0, 0, 0x7FFF0000)]
program = b"".join(struct.pack("HBBI", *step) for step in steps)
kept = ctypes.create_string_buffer(program)
header = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(kept))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.create_string_buffer(header), 0, 0) == 0, ctypes.get_errno()
from agent.native.reader import ReadPool
from agent.native.uring import NoRing
pool = ReadPool(2)
print(pool.backend)
pool.close()
try:
    ReadPool(2, backend="io_uring")
except NoRing as error:
    print(error)
"""


@pytest.mark.parametrize(("code", "why"), [(errno.EPERM, "not permitted"), (errno.ENOSYS, "not implemented")])
def test_where_it_is_forbidden_or_missing_threads_read(code: int, why: str) -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED, str(code)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    backend, reason = done.stdout.splitlines()
    assert backend == "threads"
    assert why in reason


def handles(tmp_path: Path) -> int:
    """How many descriptors are of rings, of wakes, or of files of this test."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists
            target = str(entry.readlink())
            found += "io_uring" in target or "eventfd" in target or target.startswith(str(tmp_path))
    return found


def test_no_handle_is_left(tmp_path: Path) -> None:
    data = write(tmp_path / "f", MIB)
    before = handles(tmp_path)
    pool, watch = ReadPool(1, backend="io_uring"), Watch()
    assert handles(tmp_path) > before
    job = pool.submit(units(tmp_path / "f", len(data), memoryview(bytearray(MIB))), watch)
    watch.wait(job)
    pool.close()
    assert handles(tmp_path) <= before
