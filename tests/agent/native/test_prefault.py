"""Pages made present: all of them, those of a load first, none lost, and by either system call."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import threading
from collections.abc import Iterator

import pytest

from agent.native import numa, prefault
from agent.native.arena import Arena

CHUNK = 2 << 20
CHUNKS = 16


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(CHUNKS * CHUNK, CHUNK)
    yield arena
    arena.close()


class Counted:
    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.chunks = 0

    def __call__(self, chunks: int) -> None:
        with self._condition:
            self.chunks = max(self.chunks, chunks)
            self._condition.notify_all()

    def wait(self, chunks: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self.chunks >= chunks, timeout=100)


def present_bytes(arena: Arena) -> int:
    return os.fstat(arena.descriptor).st_blocks * 512


@pytest.mark.parametrize("old_kernel", [False, True])
def test_all_pages_become_present_and_keep_their_content(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, old_kernel: bool
) -> None:
    if old_kernel:
        monkeypatch.setattr(prefault, "_POPULATE_WRITE", 9999)  # as a kernel that does not know it
    view = arena.views([3], 0, CHUNK)[0]
    view[:] = bytes(range(256)) * (CHUNK // 256)
    if arena.pages != "hugetlb":
        assert present_bytes(arena) < CHUNKS * CHUNK
    counted = Counted()
    arena.prefault(2, counted)
    counted.wait(CHUNKS)
    assert present_bytes(arena) >= CHUNKS * CHUNK
    assert arena.info(0).faulted_bytes == CHUNKS * CHUNK
    assert view == bytes(range(256)) * (CHUNK // 256)
    assert not any(arena.views([4], 0, CHUNK)[0])


def test_while_held_only_what_is_hurried_for_is_touched(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[int] = []
    gate, taken = threading.Semaphore(0), threading.Event()
    real = prefault.Prefault._touch

    def seen(self: prefault.Prefault, chunk: int) -> None:
        taken.set()
        assert gate.acquire(timeout=100)
        touched.append(chunk)
        real(self, chunk)

    monkeypatch.setattr(prefault.Prefault, "_touch", seen)
    counted = Counted()
    arena.prefault(1, counted)
    assert taken.wait(100)
    arena.hold_prefault(True)
    arena.hurry([9, 8, 9])
    gate.release(3)
    counted.wait(3)
    assert touched == [0, 9, 8], "the first was taken before anybody spoke"
    arena.hold_prefault(False)
    gate.release(CHUNKS)
    counted.wait(CHUNKS)
    assert sorted(touched) == list(range(CHUNKS))


def test_no_memory_ends_it_and_nothing_else(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: prefault.Prefault, chunk: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(prefault.Prefault, "_touch", full)
    arena.prefault(2, Counted())
    arena.views([1], 0, CHUNK)[0][:] = bytes([1]) * CHUNK
    assert arena.info(0).faulted_bytes == 0


def test_no_chunk_lies_in_two_steps(arena: Arena) -> None:
    for limit in (1, CHUNK, 3 * CHUNK + 5, 1 << 30):
        steps = arena.steps(limit)
        assert steps[0][0] == arena.address
        assert sum(size for _, size in steps) == CHUNKS * CHUNK
        assert all(size % CHUNK == 0 and (size <= limit or size == CHUNK) for _, size in steps)
        assert all(at + size == following for (at, size), (following, _) in itertools.pairwise(steps))


def test_nodes_of_the_machine_are_read_as_the_kernel_writes_them() -> None:
    assert numa.online_nodes("0\n") == [0]
    assert numa.online_nodes("0-2,5,7-8\n") == [0, 1, 2, 5, 7, 8]


def test_memory_takes_the_policy(arena: Arena) -> None:
    with mmap.mmap(arena.descriptor, CHUNK) as memory:
        assert numa.interleave(memory, [0]) or not hasattr(os, "sched_getaffinity")
        assert not numa.interleave(memory, [2000])
