"""Copies to devices over a fake driver: every byte where it belongs, nothing left over, whatever fails on the way."""

from __future__ import annotations

import mmap
import random
import threading
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.native import copier as copier_module
from agent.native.address import address_of
from agent.native.copier import Copier, CopyJob, Slice, Target
from agent.native.device import DeviceError
from agent.native.pinned import HostMemory, Ring
from schema.errors import Cancelled, SllmError
from tests.agent.native.fake_driver import FakeDriver, content
from tests.examples import examples

PAGE = mmap.PAGESIZE
STEP = 16 * PAGE


@dataclass
class Bench:
    """A copier over a host area of so many pages, pinned in steps of sixteen."""

    pages: int
    driver: FakeDriver = field(default_factory=lambda: FakeDriver((64 << 20, 64 << 20)))

    def __post_init__(self) -> None:
        self.area = mmap.mmap(-1, self.pages * PAGE)
        self.area[:] = random.Random(self.pages).randbytes(len(self.area))
        self.view = memoryview(self.area)
        self.host = HostMemory(self.driver, STEP)
        self.host.add(address_of(self.view), len(self.area))
        self.copier = Copier(self.driver, self.host)
        self.ended = threading.Event()
        self.seen: list[int] = []

    def changed(self, job: CopyJob) -> None:
        self.seen.append(job.usable_bytes)
        if job.finished:
            self.ended.set()

    def whole(self, device: int = 0) -> Target:
        size = len(self.area)
        return Target(self.driver.allocate(device, size), (Slice(0, size, 0),))

    def close(self, *targets: Target) -> None:
        self.copier.close()
        for target in targets:
            self.driver.free(target.memory)
        assert not self.driver.leaked
        assert not self.driver.registered


def test_only_pages_that_are_there_are_pinned_ahead_of_need() -> None:
    driver = FakeDriver((64 << 20,))
    host = HostMemory(driver, STEP)
    with mmap.mmap(-1, 3 * STEP) as area, memoryview(area) as view:
        host.add(address := address_of(view), len(area))
        view[:STEP] = view[2 * STEP :] = bytes([1]) * STEP
        view[STEP] = 1  # one page of the second step
        assert [host.pin_next() for _ in range(3)] == [True, True, False]
        assert driver.registered == {address: STEP, address + 2 * STEP: STEP}
        assert host.waiting
        view[STEP : 2 * STEP] = bytes([1]) * STEP
        assert host.pin_next()
        assert not host.waiting
        host.close()


@given(data=st.data())
@settings(max_examples=examples(60))
def test_every_byte_arrives_once_whatever_the_runs_and_shards(data: st.DataObject) -> None:
    pages = data.draw(st.integers(1, 80))
    bench = Bench(pages)
    with closing(bench.copier):  # also when hypothesis gives an example up
        cuts = sorted({0, pages, *data.draw(st.lists(st.integers(1, max(1, pages - 1)), max_size=12))})
        runs = data.draw(st.permutations(list(pairwise(cuts))))
        targets = [bench.whole(0)]
        if data.draw(st.booleans()):  # two shards on another device, the second half first
            half = pages // 2 * PAGE
            memory = bench.driver.allocate(1, pages * PAGE)
            targets.append(Target(memory, (Slice(0, half, pages * PAGE - half), Slice(half, pages * PAGE - half, 0))))
        freed: list[int] = []
        job = bench.copier.submit(targets, bench.changed)
        for low, high in runs:
            bench.copier.put(job, low * PAGE, [bench.view[low * PAGE : high * PAGE]], lambda low=low: freed.append(low))
        bench.copier.finish(job)
        assert bench.ended.wait(100)
        assert job.error is None
        image = bytes(bench.area)
        assert job.copied_bytes == job.usable_bytes == len(image)
        assert bench.seen == sorted(bench.seen)
        assert sorted(freed) == cuts[:-1]
        assert content(targets[0].memory, len(image)) == image
        if len(targets) == 2:
            assert content(targets[1].memory, len(image)) == image[half:] + image[:half]
        assert all(size <= STEP for _, _, size in bench.driver.copies)
        bench.close(*targets)


def test_adjacent_pieces_are_one_copy_and_both_streams_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(64)
    bench.driver.gate.clear()
    target = bench.whole()
    job = bench.copier.submit([target], bench.changed)
    with bench.copier._condition:  # so that all of it is there when the thread looks
        for page in (3, 1, 0, 2, 5, 4, 6, 7):
            bench.copier._condition.notify()
            unit = bench.view[page * PAGE : (page + 1) * PAGE]
            job._queued.append(copier_module._Piece(page * PAGE, address_of(unit), PAGE, copier_module._Unit(1, (unit,), None)))
        bench.copier.put(job, 8 * PAGE, [bench.view[8 * PAGE :]])
        bench.copier.finish(job)
    bench.driver.gate.set()
    assert bench.ended.wait(100)
    assert content(target.memory, 64 * PAGE) == bytes(bench.area)
    assert [size // PAGE for _, _, size in bench.driver.copies] == [16, 16, 16, 16]
    assert len(bench.driver.streams) == 2
    bench.close(target)


def test_nobody_waits_for_a_copy_and_layers_become_usable_in_order() -> None:
    bench = Bench(32)
    bench.driver.gate.clear()
    target = bench.whole()
    job = bench.copier.submit([target], bench.changed)
    bench.copier.put(job, 16 * PAGE, [bench.view[16 * PAGE :]])  # returns although no copy can be done
    bench.copier.finish(job)
    assert not bench.ended.wait(0.05)
    assert job.copied_bytes == 0
    bench.driver.gate.set()
    assert bench.ended.wait(100)
    assert (job.copied_bytes, job.usable_bytes) == (16 * PAGE, 0)  # the first half was never put
    assert job.missing(32 * PAGE) == [(0, 16 * PAGE)]
    bench.close(target)


@given(data=st.data())
@settings(max_examples=examples(80))
def test_whatever_fails_everything_unwinds(data: st.DataObject) -> None:
    bench = Bench(data.draw(st.integers(4, 64)))
    with closing(bench.copier):  # also when hypothesis gives an example up
        target = bench.whole()
        how = data.draw(st.sampled_from(["copy", "stream", "record", "asynchronous", "cancel", "close", "register"]))
        if how in ("copy", "stream", "record", "register"):
            bench.driver.failing[how] = data.draw(st.integers(1, 3))
        elif how == "asynchronous":
            bad = data.draw(st.integers(1, 4))

            def on_copy(number: int) -> None:
                if number == bad:
                    raise DeviceError("bad")

            bench.driver.on_copy = on_copy
        elif how == "cancel":
            bench.driver.slow_s = 0.001
        freed: list[int] = []
        job = bench.copier.submit([target], bench.changed)
        pages = list(range(0, bench.pages, 2))
        stop_at = data.draw(st.sampled_from(pages))
        for page in pages:
            if page == stop_at and how == "cancel":
                bench.copier.cancel(job)
            if page == stop_at and how == "close":
                bench.copier.close()
            bench.copier.put(
                job, page * PAGE, [bench.view[page * PAGE : (page + 2) * PAGE]], lambda page=page: freed.append(page)
            )
        bench.copier.finish(job)
        assert bench.ended.wait(100)
        assert sorted(freed) == pages
        if how == "register":
            assert job.error is None  # slower, and as right
            assert content(target.memory, len(bench.area)) == bytes(bench.area)
        elif how in ("cancel", "close"):
            assert isinstance(job.error, Cancelled)
        elif how != "asynchronous":
            assert isinstance(job.error, DeviceError)
        if job.error is None:
            assert content(target.memory, len(bench.area)) == bytes(bench.area)
        bench.close(target)


def test_a_job_of_higher_priority_goes_first_and_starves_nobody() -> None:
    bench = Bench(64)
    low, high = bench.whole(0), bench.whole(1)
    with bench.copier._condition:
        slow = CopyJob((low,), 2, lambda job: None)
        quick = CopyJob((high,), 0, lambda job: None)
        bench.copier._jobs += [slow, quick]
        for number in range(100):
            unit = copier_module._Unit(1, (), None)
            for job in (slow, quick):
                job._queued.append(copier_module._Piece(number * 0, address_of(bench.view), 64 << 20, unit))
        order = []
        for _ in range(100):
            taken = bench.copier._take()
            assert taken is not None
            order.append(taken[0])
        assert order.count(slow) in (1, 2, 3)
        bench.copier._jobs.clear()
    bench.close(low, high)


def test_the_copying_thread_says_so_when_it_fails_for_good() -> None:
    bench = Bench(4)
    target = bench.whole()
    job = bench.copier.submit([target], bench.changed)
    bench.copier.put(job, 0, [bench.view], lambda: 1 // 0)
    bench.copier.finish(job)
    assert bench.ended.wait(100)
    assert isinstance(job.error, SllmError)
    assert "ZeroDivisionError" in str(job.error)
    with pytest.raises(DeviceError, match="restart the store"):
        bench.copier.submit([target], bench.changed)
    bench.copier.close()


def test_ring_slots_come_and_go() -> None:
    ring = Ring(4, 2 * PAGE)
    first = ring.take(5 * PAGE)
    assert first is not None
    assert first[0] == (0, 1, 2)
    assert [len(view) // PAGE for view in first[1]] == [2, 2, 1]
    assert ring.take(3 * PAGE) is None
    ring.give(first[0])
    assert sorted(ring.free) == [0, 1, 2, 3]


def test_what_is_put_too_late_is_given_back_once_however_many_pieces_it_has() -> None:
    bench = Bench(40)
    target = bench.whole()
    job = bench.copier.submit([target], bench.changed)
    bench.copier.fail(job, Cancelled("nobody wants it any more"))
    assert bench.ended.wait(100)
    back: list[int] = []
    # Over three steps of pinned memory, so in three pieces at least.
    bench.copier.put(job, 0, [bench.view], lambda: back.append(1))
    assert back == [1]
    bench.close(target)
