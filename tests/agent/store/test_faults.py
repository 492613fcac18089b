"""Any mix of fills, cancels, drops and faults of the disk over a small arena: one end for each op, and nothing is left."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.native import ring_reader, threads
from agent.native.arena import Arena
from agent.native.reader import Priority, ReadPool
from agent.native.uring import NoRing, Ring
from agent.store import catalog
from schema.errors import Conflict, NotFound
from tests.agent.store.images import CHUNK, Bench, commit, read_image
from tests.examples import examples

CHUNKS = 6
FEW = ((0, 1), (1, 1), (2, 3), (3, 2))
"""Number and chunks of each partition; 1 and 3 have two."""
STALL_S = 0.05


class Made(list[tuple[str, Path, bytes]]):
    """Checkpoints: digest, directory and image, by number."""

    def __repr__(self) -> str:
        return "made"


class Disk:
    """What the checkpoints' files do, by their digest: "eio", "shrinks", "short" (reads), "again", "stalls", or what they
    should."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}
        self.healed = threading.Event()
        self.healed.set()

    def set(self, digest: str, fault: str) -> None:
        self.faults[digest] = fault
        if fault == "stalls":
            self.healed.clear()

    def heal(self) -> None:
        self.faults.clear()
        self.healed.set()

    def fault(self, descriptor: int) -> str:
        with contextlib.suppress(OSError):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            return self.faults.get(path.parent.parent.name, "")
        return ""

    def result(self, fault: str, result: int, offset: int) -> int:
        if fault == "eio" and offset:
            return -errno.EIO
        if fault == "shrinks" and offset:
            return 0
        if fault == "short" and result > 8192:
            return max(1, result // 3)
        return result


def break_threads(monkeypatch: pytest.MonkeyPatch, disk: Disk) -> None:
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        fault = disk.fault(descriptor)
        if fault == "stalls":
            assert disk.healed.wait(60)
        result = disk.result(fault, real(descriptor, buffers, offset, flags), offset)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    monkeypatch.setattr(threads.os, "preadv", preadv)
    monkeypatch.setattr(threads, "_TICK_S", STALL_S / 2)


def break_ring(monkeypatch: pytest.MonkeyPatch, disk: Disk) -> None:
    class BrokenRing(Ring):
        def __init__(self, entries: int) -> None:
            super().__init__(entries)
            self.reads: dict[int, tuple[int, str]] = {}
            self.kept: list[tuple[int, int]] = []
            self.again = True

        def read(self, descriptor: int, address: int, length: int, offset: int, user_data: int, **flags: Any) -> None:
            self.reads[user_data] = (offset, disk.fault(descriptor))
            super().read(descriptor, address, length, offset, user_data, **flags)

        def enter(self, timeout_s: float, completions: int = 1) -> None:
            super().enter(0.01 if self.kept else timeout_s, completions)

        def completions(self) -> list[tuple[int, int]]:
            found, self.kept = [*self.kept, *super().completions()], []
            told = []
            for user_data, result in found:
                offset, fault = self.reads.get(user_data, (0, ""))
                if fault == "stalls" and not disk.healed.is_set():
                    self.kept.append((user_data, result))
                elif fault == "again" and self.again:
                    self.again = False
                    told.append((user_data, -errno.EAGAIN))
                else:
                    self.again = True
                    told.append((user_data, disk.result(fault, result, offset)))
            return told

    monkeypatch.setattr(ring_reader, "Ring", BrokenRing)
    monkeypatch.setattr(ring_reader, "_TICK_S", STALL_S / 2)


@pytest.fixture(scope="module")
def made() -> Iterator[Made]:
    with tempfile.TemporaryDirectory(prefix="sl") as root:
        few = [commit(Path(root), number, size * CHUNK - 100, partitions=1 + number % 2) for number, size in FEW]
        yield Made([*few, commit(Path(root), 4, 7 * CHUNK)])


NUMBERS = st.integers(0, 4)
ACTIONS = st.one_of(
    st.tuples(st.just("fill"), NUMBERS, st.integers(0, 2), st.sampled_from(Priority)),
    st.tuples(st.just("fill"), NUMBERS, st.integers(0, 2), st.sampled_from(Priority)),
    st.tuples(st.just("hold"), NUMBERS, st.integers(0, 1)),
    st.tuples(st.just("drop"), NUMBERS),
    st.tuples(st.just("break"), NUMBERS, st.sampled_from(["eio", "shrinks", "short", "again", "stalls"])),
    st.tuples(st.just("turn")),
    st.tuples(st.just("heal")),
)


@pytest.mark.parametrize("backend", ["io_uring", "threads"])
@given(actions=st.lists(ACTIONS, min_size=5, max_size=30))
@settings(max_examples=examples(40), suppress_health_check=list(HealthCheck))
def test_each_op_ends_once_and_nothing_is_left(made: Made, backend: str, actions: list[Any]) -> None:
    disk = Disk()
    with pytest.MonkeyPatch.context() as monkeypatch:
        (break_ring if backend == "io_uring" else break_threads)(monkeypatch, disk)
        try:
            pool = ReadPool(2, backend=backend, depth=3, block_bytes=CHUNK // 2, stall_s=STALL_S)
        except NoRing as error:
            pytest.skip(str(error))
        bench = Bench(Arena.create(CHUNKS * CHUNK, CHUNK), pool=pool)
        try:
            play(bench, disk, made, actions)
        finally:
            disk.heal()
            bench.close()
        assert open_files(made) == 0


def play(bench: Bench, disk: Disk, made: Made, actions: list[Any]) -> None:
    ops: list[str] = []
    for action in actions:
        digest, directory, _ = made[action[1]] if len(action) > 1 else ("", Path(), b"")
        match action[0]:
            case "fill":
                ops.append(f"op{len(ops)}")
                bench.store.fill(ops[-1], digest, directory, action[2], action[3])
            case "hold":
                bench.store.hold(digest, action[2])
            case "drop":
                with contextlib.suppress(Conflict, NotFound):
                    bench.store.drop(digest)
            case "break":
                disk.set(digest, action[2])
            case "turn":
                bench.store.pump()
            case "heal":
                disk.heal()
        assert bench.store.arena.used_bytes <= CHUNKS * CHUNK
    bench.wait(*ops)  # also while disks stall: by the deadline
    assert bench.store.filling() == ()
    bench.store.pool._reader._stall_s = 1000.0  # type: ignore[attr-defined]  # from here on no machine is so busy
    disk.heal()
    end = time.monotonic() + 100
    while bench.store.arena.used_bytes != sum(-(-each.image_bytes // CHUNK) * CHUNK for each in bench.store.residents()):
        bench.store.pump()
        assert time.monotonic() < end, "chunks were leaked"
        time.sleep(0.001)
    for resident in bench.store.residents():
        digest, directory, image = made[int(resident.digest, 16)]
        assert read_image(bench.arena.descriptor, resident) == image
        assert catalog.quarantine_reason(directory) is None
        bench.store.hold(digest, 0)
        bench.store.drop(digest)
    assert bench.store.arena.used_bytes == 0
    for number in (3, 1):  # all six chunks, and the slots, can be given away again
        refill(bench, made, number)


def refill(bench: Bench, made: Made, number: int) -> None:
    digest, directory, image = made[number]
    op = f"whole{number}"
    bench.store.fill(op, digest, directory, 1)
    bench.wait(op)
    assert op in bench.told.resident, bench.told.faults
    assert read_image(bench.arena.descriptor, bench.told.resident[op]) == image


def open_files(made: Made) -> int:
    root = str(made[0][1].parent.parent)
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(entry.readlink()).startswith(root)
    return found
