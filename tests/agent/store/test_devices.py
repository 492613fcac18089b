"""The device tier over a fake driver: loads by every way, room and eviction, adoption, and nothing left over whatever fails."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.native.address import address_of
from agent.native.arena import Arena
from agent.native.device import DeviceError
from agent.native.reader import Priority
from agent.store import catalog
from agent.store.devices import DeviceStore
from agent.store.remote.fetches import Fetches
from agent.store.residency import OF_NO_USE
from schema.errors import Conflict, Fault, NotFound, TimedOut
from schema.link import DeviceWeights, Fetching
from schema.states import Tier
from tests.agent.native.fake_driver import FakeDriver
from tests.agent.store.fetching import SETTINGS, make_source
from tests.agent.store.images import CHUNK, Bench, commit
from tests.examples import examples
from tests.remotes import NO_LIMIT, web_server

MIB = 1 << 20


@dataclass
class Answer:
    weights: tuple[DeviceWeights, ...]
    source: Tier
    read_bytes: int


@dataclass
class Devices:
    """A store with an arena and fake devices; plays the agent: keeps descriptors, lets go of them when told."""

    arena_bytes: int = 16 * MIB
    sizes: tuple[int, ...] = (16 * MIB, 16 * MIB)
    releasing: bool = True
    answers: dict[str, Answer] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    steps: list[tuple[str, int, int]] = field(default_factory=list)
    sources: dict[str, set[Tier]] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    kept: dict[str, tuple[DeviceWeights, int]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    evictions: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.driver = FakeDriver(self.sizes)
        self.bench = Bench(Arena.create(self.arena_bytes, CHUNK))
        self.store = self.open()

    def open(self) -> DeviceStore:
        budgets = dict(enumerate(self.sizes))
        host = ((address_of(self.bench.arena.memory), self.bench.arena.memory.nbytes),)
        return DeviceStore(self.driver, budgets, self.bench.store, host, self, lambda: os.eventfd_write(self.bench._event, 1))

    def copying(self, op: str, done_bytes: int, total_bytes: int, source: Tier) -> None:
        self.steps.append((op, done_bytes, total_bytes))
        self.sources.setdefault(op, set()).add(source)

    def failed(self, op: str, digest: str, fault: Fault) -> None:
        assert op not in self.answers.keys() | self.faults.keys(), f"{op} was answered twice"
        self.faults[op] = fault

    def loaded(self, weights: DeviceWeights, descriptor: int) -> None:
        self.kept[weights.id] = weights, os.dup(descriptor)

    def on_device(self, op: str, digest: str, weights: tuple[DeviceWeights, ...], source: Tier, read_bytes: int) -> None:
        assert op not in self.answers.keys() | self.faults.keys(), f"{op} was answered twice"
        assert all(each.id in self.kept for each in weights)
        self.answers[op] = Answer(weights, source, read_bytes)

    def evicting(self, weights: DeviceWeights, why: str, for_digest: str) -> None:
        self.gone.append(weights.id)
        self.evictions.append((weights.digest, why, for_digest))

    def layers_usable(self, digest: str, count: int) -> None:
        self.layers.append(count)

    def release(self) -> None:
        gone, self.gone = self.gone, []
        for name in gone:
            os.close(self.kept.pop(name)[1])
            self.store.released(name)

    def fill(self, op: str, made: tuple[str, Path, bytes], *devices: int, users: int = 1) -> None:
        self.store.fill(op, made[0], made[1], devices or (0,), users, Priority.REQUEST)

    def pump(self, timeout_s: float = 0.0) -> None:
        select.select([self.bench._event], [], [], timeout_s)
        self.bench.store.pump()
        self.store.pump()
        if self.releasing:
            self.release()

    def wait(self, *ops: str) -> None:
        deadline = time.monotonic() + 100
        while not all(op in self.answers or op in self.faults for op in ops):
            assert time.monotonic() < deadline, f"{ops} were not answered"
            self.pump(0.02)

    def quiet(self) -> None:
        """Pump until nothing is under way."""
        deadline = time.monotonic() + 100
        while self.store._loads or self.store.filling or self.gone or self.bench.store._fills:
            assert time.monotonic() < deadline
            self.pump(0.02)

    def content(self, weights: DeviceWeights) -> bytes:
        memory = self.driver.attach(weights.device, self.kept[weights.id][1], weights.size_bytes)
        data = ctypes.string_at(memory.address, weights.image_bytes)
        self.driver.free(memory)
        return data

    def check_unwound(self) -> None:
        """Nothing is held but what is resident."""
        assert not self.store._loads
        assert not self.driver.allocations
        assert not self.driver.events
        assert self.store._streams.free_slots == self.store._streams._shape[0]
        assert not self.bench.store._residency._lent
        assert {weights.id for weights in self.store.weights} == set(self.kept)
        for device in range(len(self.sizes)):
            assert self.driver.used(device) == sum(each.size_bytes for each in self.store.weights if each.device == device)

    def close(self) -> None:
        self.store.close()
        self.bench.close()
        for _, descriptor in self.kept.values():
            os.close(descriptor)
        assert not self.driver.leaked
        assert not self.driver.registered
        assert not any(self.driver.used(device) for device in range(len(self.sizes)))


@pytest.fixture
def node() -> Iterator[Devices]:
    made = Devices()
    yield made
    made.close()


def test_by_way_of_dram_then_straight_from_it_then_it_is_there(node: Devices, tmp_path: Path) -> None:
    made = commit(tmp_path, 1, 5 * MIB + 123, partitions=2)
    node.fill("a", made)
    node.wait("a")
    first = node.answers["a"]
    assert (first.source, first.read_bytes) == (Tier.DISK, len(made[2]))
    assert node.content(first.weights[0]) == made[2]
    assert [resident.digest for resident in node.bench.store.residents()] == [made[0]]
    assert node.bench.store.residents()[0].users == 0  # it may go as soon as room is needed
    node.fill("b", made, 1)
    node.wait("b")
    assert (node.answers["b"].source, node.answers["b"].read_bytes) == (Tier.DRAM, 0)
    assert node.content(node.answers["b"].weights[0]) == made[2]
    node.fill("c", made, 0, 1, users=2)
    node.wait("c")
    assert node.answers["c"].source is Tier.DEVICE
    assert [each.users for each in node.answers["c"].weights] == [2, 2]
    assert node.sources == {"a": {Tier.DISK}, "b": {Tier.DRAM}}
    assert node.steps[0] == ("a", 0, len(made[2]))
    assert ("a", len(made[2]), len(made[2])) in node.steps
    node.check_unwound()


@pytest.mark.parametrize("verified", [True, False])
def test_an_image_larger_than_dram_streams_through_the_ring(tmp_path: Path, verified: bool) -> None:
    node = Devices(arena_bytes=2 * CHUNK, sizes=(64 * MIB,))
    node.store._streams._shape = 3, MIB  # a ring of less than two of its chunks
    made = commit(tmp_path, 1, 17 * MIB + 5000, partitions=2, checksum_bytes=2 * MIB)
    if verified:
        catalog.mark_verified(made[1])
    node.fill("a", made)
    node.wait("a")
    assert "a" not in node.faults
    assert node.answers["a"].read_bytes == len(made[2])
    assert node.content(node.answers["a"].weights[0]) == made[2]
    assert not node.bench.store.residents()
    assert catalog.is_verified(made[1])
    node.check_unwound()
    node.close()


def test_each_byte_is_read_once_for_two_devices(node: Devices, tmp_path: Path) -> None:
    made = commit(tmp_path, 1, 6 * MIB)
    node.fill("a", made, 0, 1)
    node.fill("late", made, 1)
    node.wait("a", "late")
    assert node.answers["a"].read_bytes == len(made[2])
    for weights in node.answers["a"].weights:
        assert node.content(weights) == made[2]
    assert node.answers["late"].weights[0].id == node.answers["a"].weights[1].id


def test_idle_weights_go_oldest_first_and_only_when_released(node: Devices, tmp_path: Path) -> None:
    made = [commit(tmp_path, number, 6 * MIB) for number in range(4)]
    for number in (0, 1):
        node.fill(f"f{number}", made[number])
        node.wait(f"f{number}")
        node.store.hold(made[number][0], 0, 0)
    node.store.hold(made[0][0], 0, 0)  # used last
    node.releasing = False
    node.fill("f2", made[2])
    for _ in range(5):
        node.pump(0.01)
    assert node.gone == [node.answers["f1"].weights[0].id]
    assert node.evictions == [(made[1][0], "to make room", made[2][0])]
    assert "f2" not in node.answers  # the agent still holds it
    assert node.store.evicting == (node.answers["f1"].weights[0].id,)
    node.releasing = True
    node.wait("f2")
    assert node.content(node.answers["f2"].weights[0]) == made[2][2]
    node.store.hold(made[0][0], 0, 1)
    node.fill("f3", made[3])
    node.wait("f3")
    assert node.faults["f3"].code == "out_of_space"
    assert "device 0" in node.faults["f3"].message
    assert {weights.digest for weights in node.store.weights} == {made[0][0], made[2][0]}
    node.check_unwound()


def test_kv_caches_make_idle_weights_go_and_keep_others_out(node: Devices, tmp_path: Path) -> None:
    made = [commit(tmp_path, number, 6 * MIB) for number in range(2)]
    node.fill("a", made[0])
    node.wait("a")
    node.store.hold(made[0][0], 0, 0)
    node.store.reserve(0, 11 * MIB)
    assert node.gone == [node.answers["a"].weights[0].id]
    assert node.evictions == [(made[0][0], "to make room for KV caches", "")]
    node.fill("b", made[1])
    node.wait("b")
    assert node.faults["b"].code == "out_of_space"
    assert str(11 * MIB) in node.faults["b"].message
    node.store.reserve(0, 10 * MIB)
    node.fill("c", made[1])
    node.wait("c")
    assert "c" in node.answers
    node.store.reserve(0, 12 * MIB)  # more than is left beside weights in use
    node.fill("d", made[1])
    node.wait("d")
    assert node.faults["d"].code == "out_of_space"


def test_drop_frees_idle_copies_and_says_why_not(node: Devices, tmp_path: Path) -> None:
    made = commit(tmp_path, 1, MIB)
    with pytest.raises(NotFound):
        node.store.drop(made[0])
    node.driver.gate.clear()
    node.fill("a", made, 0, 1)
    with pytest.raises(Conflict, match="being loaded"):
        node.store.drop(made[0])
    node.driver.gate.set()
    node.wait("a")
    with pytest.raises(Conflict, match="users"):
        node.store.drop(made[0])
    node.store.hold(made[0], 1, 0)
    node.store.drop(made[0])
    assert [weights.device for weights in node.store.weights] == [0]
    (image_id,) = {weights.image_id for weights in node.store.weights}
    for image, device in (("9" * 32, 0), (image_id, 1)):
        with pytest.raises(NotFound):
            node.store.let_go(made[0], image, device)
    node.store.let_go(made[0], image_id, 0)
    assert node.store.weights == (), "who is counted there waits for others"
    assert node.evictions[-1] == (made[0], OF_NO_USE, "")
    node.quiet()
    node.check_unwound()


def test_what_a_dead_store_loaded_is_taken_back_by_its_descriptors(node: Devices, tmp_path: Path) -> None:
    made = commit(tmp_path, 1, 5 * MIB)
    node.fill("a", made)
    node.wait("a")
    node.store.close()
    assert node.driver.used(0) == node.answers["a"].weights[0].size_bytes
    node.store = node.open()
    weights, descriptor = node.kept[node.answers["a"].weights[0].id]
    assert node.store.adopt(weights, os.dup(descriptor))
    assert node.store.adopt(weights, os.dup(descriptor))  # said again over a new connection
    other = DeviceWeights(id="f" * 32, digest=made[0], device=0, size_bytes=2 * MIB, image_bytes=1)
    assert not node.store.adopt(other, os.dup(descriptor))
    node.fill("b", made)
    node.wait("b")
    assert node.answers["b"].source is Tier.DEVICE
    assert node.content(node.answers["b"].weights[0]) == made[2]
    node.check_unwound()


def test_a_read_that_does_not_come_back_ends_the_load_and_keeps_its_slots(tmp_path: Path) -> None:
    node = Devices(arena_bytes=2 * CHUNK)
    node.store._streams._shape = 1, CHUNK
    node.driver.gate.clear()
    made = commit(tmp_path, 1, 9 * MIB)
    node.fill("a", made)
    (load,) = node.store._loads
    assert load.load is not None
    assert load.load._stream is not None
    read = load.load._stream.read
    assert read is not None
    node.bench.store.pool._reader.queue.stall(read, TimedOut("the disk does not answer"))
    node.driver.gate.set()
    node.wait("a")
    assert node.faults["a"].message == "the disk does not answer"
    assert not node.driver.allocations
    node.bench.store.pool.cancel(read)  # it comes back after all
    deadline = time.monotonic() + 100
    while node.store._streams.free_slots == 0:
        assert time.monotonic() < deadline
        node.pump(0.01)
    node.check_unwound()
    node.close()


@pytest.mark.parametrize("arena_bytes", [16 * MIB, 2 * CHUNK])
def test_a_prefetch_that_a_start_comes_to_wait_for_is_raised(tmp_path: Path, arena_bytes: int) -> None:
    node = Devices(arena_bytes=arena_bytes)
    node.driver.gate.clear()
    made = commit(tmp_path, 1, 9 * MIB)
    node.store.fill("ahead", made[0], made[1], (0,), 1, Priority.PREFETCH)
    (load,) = node.store._loads
    assert load.load is not None
    jobs = [load.load._job, *(each.job for each in node.bench.store._fills.values())]
    if load.load._stream is not None:
        jobs.append(load.load._stream.read)
    assert len(jobs) == 2
    assert {each.priority for each in jobs if each is not None} == {Priority.PREFETCH}
    node.fill("start", made)
    assert {each.priority for each in jobs if each is not None} == {Priority.REQUEST}
    node.store.fill("ahead too", made[0], made[1], (0,), 1, Priority.PREFETCH)
    assert {each.priority for each in jobs if each is not None} == {Priority.REQUEST}
    node.driver.gate.set()
    node.wait("ahead", "start", "ahead too")
    assert not node.faults
    node.close()


def test_a_good_image_of_a_copy_in_quarantine_is_used_and_only_that(node: Devices, tmp_path: Path) -> None:
    made = commit(tmp_path, 1, 5 * MIB)
    node.bench.store.fill("image", made[0], made[1], users=0)
    node.bench.wait("image")
    catalog.quarantine(made[1], "a test")
    node.fill("a", made)
    node.wait("a")
    assert (node.answers["a"].source, node.answers["a"].read_bytes) == (Tier.DRAM, 0)
    assert node.content(node.answers["a"].weights[0]) == made[2]
    node.bench.store.hold(made[0], 1, condemned="the image is wrong too")
    node.fill("b", made, 1)
    node.wait("b")
    assert node.faults["b"].code == "invalid_checkpoint"
    node.bench.store.hold(made[0], 0)
    assert node.bench.store.residents() == ()
    node.fill("c", made, 1)
    node.wait("c")
    assert "quarantined: a test" in node.faults["c"].message
    node.quiet()
    node.check_unwound()


def test_a_wrong_byte_puts_the_copy_in_quarantine(tmp_path: Path) -> None:
    node = Devices(arena_bytes=2 * CHUNK)
    made = commit(tmp_path, 1, 9 * MIB)
    data = bytearray((made[1] / "partition_0.bin").read_bytes())
    data[7 * MIB] ^= 1
    (made[1] / "partition_0.bin").write_bytes(data)
    node.fill("a", made)
    node.wait("a")
    assert node.faults["a"].code == "invalid_checkpoint"
    assert "offset 6291456" in node.faults["a"].message
    assert catalog.quarantine_reason(made[1])
    node.check_unwound()
    node.close()


@pytest.mark.parametrize(("in_dram", "replaced"), [(True, False), (True, True), (False, True)])
def test_past_dram_the_copy_that_was_meant_is_read_or_none(tmp_path: Path, in_dram: bool, replaced: bool) -> None:
    node = Devices(sizes=(6 * MIB,), releasing=False)
    before = commit(tmp_path / "before", 2, 4 * MIB)
    node.fill("before", before)
    node.wait("before")
    node.store.hold(before[0], 0, 0)
    meant, other = commit(tmp_path / "meant", 1, 4 * MIB), commit(tmp_path / "other", 1, 2 * MIB, partitions=2)
    if in_dram:
        node.bench.store.fill("other", *other[:2])
        node.bench.wait("other")
    node.fill("a", meant)
    assert node.gone, "it waits for room"
    if replaced:
        meant[1].rename(tmp_path / "gone")
        shutil.copytree(other[1], meant[1])
    node.releasing = True
    node.wait("a")
    if replaced:
        assert node.faults["a"].code == "conflict"
        assert "it was replaced" in node.faults["a"].message
    else:
        assert node.content(node.answers["a"].weights[0]) == meant[2]
    node.check_unwound()
    node.close()


def test_another_copy_waits_for_a_load_that_was_given_up(node: Devices, tmp_path: Path) -> None:
    given_up, other = commit(tmp_path / "given up", 1, 4 * MIB), commit(tmp_path / "other", 1, 2 * MIB, partitions=2)
    node.driver.gate.clear()
    node.fill("a", given_up)
    node.store.hold(given_up[0], 0, 0)
    (load,) = node.store._loads
    assert load.given_up
    image_id = catalog.read_entry(other[1]).manifest.image_id
    node.store.fill("b", other[0], other[1], (0,), 1, Priority.REQUEST, image_id)
    node.driver.gate.set()
    node.wait("b")
    assert node.faults.keys() == {"a"}
    assert node.content(node.answers["b"].weights[0]) == other[2]
    node.quiet()
    node.check_unwound()


@given(data=st.data())
@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_everything_unwinds(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("images")
    arena_bytes = data.draw(st.sampled_from([2 * CHUNK, 16 * MIB]))
    node = Devices(arena_bytes=arena_bytes)
    with closing(node.store):  # also when hypothesis gives an example up
        made = [commit(root, number, data.draw(st.sampled_from([4096, 3 * MIB, 7 * MIB]))) for number in range(3)]
        if data.draw(st.booleans()):
            bad = data.draw(st.integers(1, 6))

            def on_copy(number: int) -> None:
                if number == bad:
                    raise DeviceError("bad")

            node.driver.on_copy = on_copy
        ops = 0
        for _ in range(data.draw(st.integers(2, 12))):
            what = data.draw(st.sampled_from(["fill", "fill", "hold", "pump", "fail", "drop", "reserve"]))
            image = data.draw(st.sampled_from(made))
            device = data.draw(st.integers(0, 1))
            if what == "fill":
                ops += 1
                node.fill(f"op{ops}", image, *data.draw(st.sampled_from([(0,), (1,), (0, 1)])))
            elif what == "hold":
                node.store.hold(image[0], device, data.draw(st.integers(0, 1)))
            elif what == "pump":
                node.pump(data.draw(st.sampled_from([0.0, 0.005])))
            elif what == "fail":
                call = data.draw(st.sampled_from(["allocate", "export", "copy", "record", "stream", "register"]))
                node.driver.failing[call] = 1
            elif what == "reserve":
                node.store.reserve(device, data.draw(st.integers(0, 8)) * MIB)
            else:
                try:
                    node.store.drop(image[0])
                except (Conflict, NotFound):
                    continue
        node.quiet()
        assert node.answers.keys() | node.faults.keys() == {f"op{number + 1}" for number in range(ops)}
        node.check_unwound()
        images = {digest: image for digest, _, image in made}
        for weights in node.store.weights:
            assert node.content(weights) == images[weights.digest]
        if data.draw(st.booleans()):  # it ends in the middle of a load
            node.fill("last", made[0])
        node.close()


@pytest.mark.parametrize("breaks", [False, True])
def test_a_fetch_goes_on_to_a_device_as_it_comes(tmp_path: Path, breaks: bool) -> None:
    digest, _, image = make_source(tmp_path / "remote")
    node = Devices(arena_bytes=64 * MIB, sizes=(64 * MIB, 64 * MIB))
    with closing(node), web_server(tmp_path / "remote") as web:
        told: dict[str, Fault | None] = {}

        class Listener:
            def coming(self, message: Fetching) -> None: ...

            def fetching(self, op: str, done_bytes: int, total_bytes: int) -> None: ...

            def fetched(self, op: str, digest: str, layout: str, fault: Fault | None, came_bytes: int) -> None:
                told[op] = fault

        checkpoints = tmp_path / "data" / "checkpoints"
        fetches = Fetches(
            tmp_path / "data", checkpoints, SETTINGS, node.bench.store, Listener(),
            lambda: os.eventfd_write(node.bench._event, 1), follow=node.store.follow,
        )  # fmt: skip

        def until(true: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 100
            while not true():
                assert time.monotonic() < deadline
                node.pump(0.02)
                fetches.pump()

        with closing(fetches):
            node.store.hold(digest, 0, 1)
            web.limit_bytes = len(image) * 2 // 3
            fetches.begin("fetch", digest, web.url, in_memory=True, devices=(0, 1))
            until(lambda: any(each.load is not None and each.load.done_bytes > CHUNK for each in node.store._loads))
            assert not told, "bytes are on the device, and the fetch goes on"
            (load,) = node.store._loads
            assert load.devices == (0,), "nobody waits for it on the other one"
            assert 0 < load.load.done_bytes < len(image)  # type: ignore[union-attr]
            if breaks:
                fetches.cancel("fetch")
                until(lambda: not node.store._loads and node.bench.store.arena.used_bytes == 0)
                assert not node.store.weights
            else:
                web.limit_bytes = NO_LIMIT
                until(lambda: "fetch" in told)
                assert told == {"fetch": None}
                node.fill("a", (digest, checkpoints / digest / "exec1", image), 0)
                node.wait("a")
                assert node.content(node.answers["a"].weights[0]) == image
                assert web.sent_bytes < len(image) * 1.1
            node.check_unwound()
