"""Starts of checkpoints that lie on a remote alone: built while they are fetched, serving before the disk has all of it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.daemon import agent
from agent.store import catalog
from schema.errors import Fault
from schema.link import (
    DeviceInfo,
    Evicted,
    Extent,
    Fetching,
    InstanceUpdate,
    LayersArrived,
    OperationDone,
    Placement,
    PlacementUpdate,
    Progress,
    RemoteCopy,
    Resident,
    StartInstance,
    StopInstance,
)
from schema.states import InstanceState, Tier, TierState
from tests.agent.daemon.peers import Manager, Node, Store, make_checkpoint, start_instance

OTHER = "ef" * 32
PARTIAL = f"partial/{OTHER}+l1"


def start_of_other() -> StartInstance:
    return msgspec.structs.replace(start_instance(digest=OTHER), remote=RemoteCopy(url="s3://b/c", layout="l1"))


async def test_a_start_fetches_what_is_not_on_the_disk(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(start_of_other())
    await store.until(lambda: bool(store.fetches))
    asked = store.fetches[0]
    assert (asked.digest, asked.url, asked.layout, asked.in_memory, asked.users) == (OTHER, "s3://b/c", "l1", True, 1)
    store.peer.send(Progress(op=asked.op, stage="fetch", done_bytes=1, total_bytes=4096))
    assert (await manager.take(Progress)).op == "inst_1"
    await node.until(lambda: bool(node.workers))
    assert node.workers[0].start is None
    make_checkpoint(node.config.checkpoints_path, OTHER)
    store.peer.send(OperationDone(op=asked.op, digest=OTHER, layout="l1"))
    truth = await manager.instance(InstanceState.READY)
    assert truth.phases is not None
    assert (truth.phases.loaded_from, truth.phases.loaded_bytes) == (Tier.REMOTE, 4096)
    assert truth.phases.load_s > 0
    assert node.workers[0].directories == (str(node.config.checkpoints_path / OTHER / "l1"),)


async def test_a_start_whose_fetch_fails_ends_with_why(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(start_of_other())
    await store.until(lambda: bool(store.fetches))
    store.peer.send(OperationDone(op=store.fetches[0].op, digest=OTHER, fault=Fault("unreachable", "it is down")))
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.fault == Fault("unreachable", "it is down")
    await store.until(lambda: store.holds.get(OTHER) == 0)


async def test_a_start_that_is_stopped_gives_its_fetch_up_but_not_what_has_come(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    start = start_of_other()
    manager.send(start)
    await store.until(lambda: bool(store.fetches))
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch))
    await store.until(lambda: store.fetches[0].op in store.cancelled)
    assert store.kept == [store.fetches[0].op]
    await manager.instance(InstanceState.STOPPED)


async def test_what_has_come_for_a_life_that_ends_by_itself_is_kept_for_the_next(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(start := start_of_other())
    op = await fetched(store, in_memory=True)
    await manager.instance(InstanceState.READY)
    node.workers[0].kill()
    assert (await manager.instance(InstanceState.STOPPED)).fault is not None
    await store.until(lambda: store.kept == [op])
    manager.send(msgspec.structs.replace(start, epoch=start.epoch + 1))
    await store.until(lambda: len(store.fetches) == 2)
    assert store.fetches[1].op != op


@pytest.mark.parametrize("of_the_worker", [True, False])
async def test_a_remote_is_named_for_what_is_its_fault_alone(node: Node, of_the_worker: bool) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(start_of_other())
    op = await fetched(store, in_memory=False)
    why = Fault("invalid_checkpoint", "it is wrong")
    if of_the_worker:
        await node.until(lambda: bool(node.workers) and node.workers[0].start is not None)
        (worker,) = node.workers
        worker.peer.send(InstanceUpdate(truth=msgspec.structs.replace(worker.truth(InstanceState.STOPPED), fault=why)))
    else:
        store.peer.send(OperationDone(op=op, digest=OTHER, fault=why))
    truth = await manager.instance(InstanceState.STOPPED)
    assert (truth.fault, truth.remote) == (why, "" if of_the_worker else "s3://b/c")
    if of_the_worker:
        await store.until(lambda: store.cancelled == [op])
        assert store.kept == [], "no other life could use it"


async def fetched(store: Store, **fields: Any) -> str:
    """Wait for the fetch that a start asks for, and say that all but its weights is there. Returns its op."""
    await store.until(lambda: bool(store.fetches))
    op = store.fetches[-1].op
    store.peer.send(Fetching(op=op, digest=OTHER, layout="l1", directory=PARTIAL, **fields))
    return op


async def placed(manager: Manager, *expected: tuple[Tier, TierState]) -> None:
    """Wait until the last that was told of where OTHER lies is this; it may have been told already."""

    def holds(message: Any) -> bool:
        placements = message.truth.placements
        return [(placement.tier, placement.state) for placement in placements] == [*expected]

    told = [each for each in manager.seen if isinstance(each, PlacementUpdate) and each.truth.digest == OTHER]
    if not (told and holds(told[-1])):
        await manager.take(PlacementUpdate, lambda m: m.truth.digest == OTHER and holds(m))


async def test_a_start_serves_before_its_copy_on_the_disk_is_whole(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(start_of_other())
    op = await fetched(store, in_memory=True)
    truth = await manager.instance(InstanceState.READY)
    assert store.fills[0].directory == f"{OTHER}/l1"
    assert truth.phases is not None
    assert (truth.phases.loaded_from, truth.phases.loaded_bytes) == (Tier.REMOTE, 4096)
    (worker,) = node.workers
    assert worker.directories == (f"{node.config.data_dir}/{PARTIAL}", f"{node.config.checkpoints_path}/{OTHER}/l1")
    await placed(manager, (Tier.DRAM, TierState.FILLING))  # nobody else can start from it yet
    (entry,) = (each for each in node.roster() if each["role"] == "worker")
    assert entry["fetching"]
    make_checkpoint(node.config.checkpoints_path, OTHER)
    store.peer.send(OperationDone(op=op, digest=OTHER, layout="l1"))
    await placed(manager, (Tier.DISK, TierState.RESIDENT), (Tier.DRAM, TierState.RESIDENT))
    await node.until(lambda: not any(each.get("fetching") for each in node.roster()))
    assert len(store.fills) == 1
    manager.send(StopInstance(instance="inst_1", epoch=start_of_other().epoch))
    assert (await manager.instance(InstanceState.STOPPED)).fault is None


async def test_what_is_fetched_for_a_device_has_its_room_in_memory_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = DeviceInfo(index=0, kind="cuda", name="", memory_bytes=1 << 30)
    monkeypatch.setattr(agent, "devices", lambda config: (gpu,))
    async with Node() as node:
        manager = await node.manager()
        manager.send(start_of_other())
        await fetched(node.stores[0], in_memory=True, image_bytes=4096)
        told = await manager.take(PlacementUpdate, lambda m: m.truth.digest == OTHER and bool(m.truth.placements))
        assert told.truth.placements == (Placement(tier=Tier.DRAM, state=TierState.FILLING, size_bytes=4096, users=1),)
        assert node.stores[0].fetches[-1].users == 0, "who it is for is counted on the device"


async def test_a_copy_that_comes_to_nothing_ends_the_life_that_serves_from_it(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(start_of_other())
    op = await fetched(store, in_memory=True)
    await manager.instance(InstanceState.READY)
    store.peer.send(OperationDone(op=op, digest=OTHER, fault=Fault("error", "the disk has gone")))
    assert (await manager.instance(InstanceState.STOPPED)).fault == Fault("error", "the disk has gone")
    await store.until(lambda: store.holds.get(OTHER) == 0)
    store.peer.send(Evicted(digest=OTHER))
    await placed(manager)


async def test_without_room_in_the_arena_the_weights_are_read_from_the_disk(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(start_of_other())
    op = await fetched(store, in_memory=False)
    await node.until(lambda: bool(node.workers) and node.workers[0].start is not None)
    assert store.fills == [], "there is nothing to be read yet"
    make_checkpoint(node.config.checkpoints_path, OTHER)
    store.peer.send(OperationDone(op=op, digest=OTHER, layout="l1"))
    truth = await manager.instance(InstanceState.READY)
    assert truth.phases is not None
    assert truth.phases.loaded_from is Tier.REMOTE
    assert [fill.directory for fill in store.fills] == [f"{OTHER}/l1"]


async def test_a_worker_gets_the_weights_of_the_copy_that_it_was_built_over(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(start_of_other())
    op = await fetched(store, in_memory=False)
    await node.until(lambda: bool(node.workers) and node.workers[0].start is not None)
    for layout in ("l0", "l1"):  # the first came meanwhile by an ingest, and is as good
        make_checkpoint(node.config.checkpoints_path, OTHER, layout)
    store.peer.send(OperationDone(op=op, digest=OTHER, layout="l1"))
    await store.until(lambda: bool(store.fills))
    assert store.fills[0].directory == f"{OTHER}/l1"


async def test_a_start_ends_with_why_if_its_copy_has_come_and_the_disk_cannot_be_read(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(start_of_other())
    op = await fetched(store, in_memory=False)

    def fails(root: Path) -> catalog.Found:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(catalog, "look", fails)
    store.peer.send(OperationDone(op=op, digest=OTHER, layout="l1"))
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.fault is not None
    assert "was fetched" in truth.fault.message


async def test_a_store_that_dies_while_it_fetches_says_anew_where_the_weights_come(node: Node) -> None:
    manager = await node.manager()
    first = node.stores[0]
    node.store_answers = first.answers = False
    manager.send(start_of_other())
    await fetched(first, in_memory=True)
    await first.until(lambda: bool(first.fills))
    first.kill()
    await node.until(lambda: len(node.stores) == 2 and bool(node.stores[1].fetches))
    store = node.stores[1]
    assert store.fetches == first.fetches
    assert store.fills == [], "what is not on the disk cannot be read"
    await fetched(store, in_memory=True)
    await store.until(lambda: bool(store.fills))
    assert store.fills[0].op != first.fills[0].op
    store.peer.send(LayersArrived(op=first.fills[0].op, layers=1))  # of a fill that nobody waits for
    store.answer(store.fills[0])
    await manager.instance(InstanceState.READY)


async def test_a_fetch_that_is_over_at_once_came_from_the_remote_all_the_same(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    store.residents[OTHER] = Resident(digest=OTHER, extents=(Extent(0, 4096),), image_bytes=4096)
    manager.send(start_of_other())
    await fetched(store, in_memory=True)  # whole before the fill is asked for, which so reads nothing
    truth = await manager.instance(InstanceState.READY)
    assert truth.phases is not None
    assert (truth.phases.loaded_from, truth.phases.loaded_bytes) == (Tier.REMOTE, 4096)


async def test_what_lay_in_memory_already_says_nothing_of_how_fast_a_remote_is(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(start_of_other())
    await fetched(store, in_memory=True)
    await manager.instance(InstanceState.READY)
    manager.send(msgspec.structs.replace(start_of_other(), instance="inst_2"))
    await store.until(lambda: len(store.fetches) == 2)
    await fetched(store, in_memory=True)
    ready = await manager.take(
        InstanceUpdate, lambda m: m.truth.instance == "inst_2" and m.truth.state is InstanceState.READY and m.truth.phases
    )
    truth = ready.truth
    assert truth.phases is not None
    assert (truth.phases.loaded_from, truth.phases.loaded_bytes) == (Tier.REMOTE, 0)
