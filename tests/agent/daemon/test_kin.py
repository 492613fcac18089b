"""Store and zygote die and come back: the arena is handed back, holds and fills told again, workers go on."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import NodeConfig
from agent.daemon import agent
from agent.daemon.roster import Roster
from agent.daemon.supervisor import Kin
from schema.errors import SllmError
from schema.ids import epoch_of
from schema.link import (
    ArenaState,
    Evicted,
    InstanceUpdate,
    Inventory,
    InventoryUpdate,
    LoadCheckpoint,
    NodeEvent,
    Ping,
    PlacementUpdate,
    Pong,
    Refused,
    Shutdown,
    Submit,
    VerifyCheckpoint,
)
from schema.states import EndReason, InstanceState, Tier, TierState
from tests.agent.daemon.peers import DIGEST, WAIT_S, Node, alive, make_checkpoint, start_instance, submit

OTHER = "ef" * 32


async def test_a_killed_store_gets_its_arena_back_and_hears_who_uses_what(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    first = node.stores[0]
    first.kill()
    await node.until(lambda: len(node.stores) == 2 and DIGEST in node.stores[1].holds)
    second = node.stores[1]
    assert second.holds == {DIGEST: 1}
    assert second.fills == []
    (given,) = second.given
    assert os.fstat(given).st_ino == os.fstat(first.memory).st_ino
    manager.send(submit(epoch_of(1, 9), start))
    await worker.hear(Submit)
    assert not [m for m in manager.seen if isinstance(m, InstanceUpdate) and m.truth.state is InstanceState.STOPPED]


async def test_a_store_that_dies_while_it_loads_is_asked_again(node: Node) -> None:
    manager = await node.manager()
    first = node.stores[0]
    first.answers = False
    manager.send(start_instance())
    await first.until(lambda: len(first.fills) == 1)
    first.kill()
    await manager.instance(InstanceState.READY)
    second = node.stores[1]
    assert [fill.op for fill in second.fills] == [fill.op for fill in first.fills]
    assert node.workers[0].attach is not None


async def test_a_load_that_kills_the_store_is_given_up(node: Node) -> None:
    manager = await node.manager()
    node.stores[0].answers = False
    node.store_answers = False
    manager.send(start_instance())
    for life in range(3):
        await node.until(lambda life=life: len(node.stores) > life and bool(node.stores[life].fills))  # type: ignore[misc]
        node.stores[life].kill()
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.fault is not None
    assert "3 times" in truth.fault.message


async def test_extents_of_an_earlier_store_are_not_attached(node: Node) -> None:
    manager = await node.manager()
    node.zygotes[0].answers = False
    start = start_instance()
    manager.send(start)
    await manager.take(
        PlacementUpdate, lambda m: m.truth.placements[-1].state is TierState.RESIDENT and len(m.truth.placements) == 2
    )
    node.stores[0].kill()
    await node.until(lambda: len(node.stores) == 2 and bool(node.stores[1].fills))
    zygote = node.zygotes[0]
    zygote.fork(zygote.forks[0])
    truth = await manager.instance(InstanceState.READY)
    assert truth.phases is not None
    assert truth.phases.loaded_bytes == 4096


async def test_the_latest_look_at_the_disk_counts_and_is_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = await node.manager()
    means, real = manager.truth.inventory, asyncio.to_thread
    looks: list[asyncio.Future[Inventory]] = []

    async def to_thread(call: Any, *given: Any) -> Any:
        if call is not agent.inventory:
            return await real(call, *given)
        looks.append(asyncio.get_running_loop().create_future())
        return await looks[-1]

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    assert node.agent is not None
    for _ in range(2):
        node.agent.disk_changed()
    await node.until(lambda: bool(looks))
    for number, look in reversed([*enumerate(looks, 1)]):  # the later one would be over first
        look.set_result(msgspec.structs.replace(means, disk_used_bytes=number))
    await node.until(lambda: len(looks) == 2)
    if not looks[1].done():
        looks[1].set_result(msgspec.structs.replace(means, disk_used_bytes=2))
    await manager.take(InventoryUpdate, lambda m: m.inventory.disk_used_bytes == 2)
    assert (await node.manager()).truth.inventory.disk_used_bytes == 2


async def test_what_a_store_has_is_told_when_it_comes_and_as_it_gets_more() -> None:
    async with Node(adopt_s=0.01) as node:
        node.kin_dial = False
        manager = await node.manager()
        assert manager.truth.inventory.arena.id == ""
        await node.until(lambda: len(node.pids) == 2)
        node.play("store", node.pids[0])
        told = await manager.take(InventoryUpdate, lambda m: bool(m.inventory.arena.id))
        assert told.inventory.software.keys() == {"agent", "store"}
        more = msgspec.structs.replace(told.inventory.arena, faulted_bytes=told.inventory.arena.budget_bytes)
        node.stores[0].peer.send(ArenaState(arena=more))
        await manager.take(InventoryUpdate, lambda m: m.inventory.arena == more)


async def test_an_eviction_is_told(node: Node) -> None:
    manager = await node.manager()
    await node.ready(manager)
    node.stores[0].peer.send(Evicted(digest=DIGEST, why="to make room", for_digest=OTHER))
    update = await manager.take(PlacementUpdate, lambda m: all(p.tier is not Tier.DRAM for p in m.truth.placements))
    assert [p.tier for p in update.truth.placements] == [Tier.DISK]
    event = await manager.take(NodeEvent)
    assert (event.reason, event.digest, event.for_digest) == ("Evicted", DIGEST, OTHER)
    assert event.message == "from memory, 4096 bytes: to make room"


async def test_it_is_told_what_a_lost_store_leaves_to_the_next(node: Node) -> None:
    manager = await node.manager()
    await node.ready(manager)
    node.store_answers = node.stores[0].answers = False
    make_checkpoint(node.config.checkpoints_path, OTHER)
    manager.send(VerifyCheckpoint(op="op_2", digest=OTHER))  # which looks at the disk
    await node.until(lambda: bool(node.stores[0].verifies))
    manager.send(LoadCheckpoint(op="op_3", digest=OTHER))
    await node.until(lambda: len(node.stores[0].fills) == 2)
    node.stores[0].kill()
    lost, back = await manager.take(NodeEvent), await manager.take(NodeEvent)
    assert (lost.reason, lost.level, lost.digest) == ("StoreLost", "warning", "")
    assert f"{DIGEST[:12]} (memory), 4096 bytes waits for the next one; {OTHER[:12]} was being loaded" in lost.message
    assert (back.reason, back.level) == ("StoreBack", "info")
    assert f"kept: {DIGEST[:12]} (memory), 4096 bytes; what had come of {OTHER[:12]} in memory is loaded anew" in back.message
    await node.until(lambda: len(node.stores) == 2 and bool(node.stores[1].fills))
    node.stores[1].residents.clear()  # as an arena that could not be taken back
    node.stores[1].kill()
    lost, back = await manager.take(NodeEvent), await manager.take(NodeEvent)
    assert (back.reason, back.level) == ("StoreBack", "warning")
    assert f"kept: nothing; dropped: {DIGEST[:12]} (memory), 4096 bytes" in back.message


async def test_what_happens_while_no_manager_is_there_is_told_the_next_one(node: Node) -> None:
    manager = await node.manager()
    await node.ready(manager)
    manager.close()
    await node.until(lambda: node.agent is not None and not node.agent._manager.present)
    node.stores[0].peer.send(Evicted(digest=DIGEST, why="to make room", for_digest=OTHER))
    node.stores[0].kill()
    await node.until(lambda: len(node.stores) == 2 and node.stores[1].pinned is not None)
    manager = await node.manager(2)
    events = [await manager.take(NodeEvent) for _ in range(3)]
    assert [event.reason for event in events] == ["Evicted", "StoreLost", "StoreBack"]
    assert all(event.ago_s > 0 for event in events)


async def test_a_killed_zygote_is_made_again_and_forks_what_waited(node: Node) -> None:
    manager = await node.manager()
    _, worker = await node.ready(manager)
    zygote = node.zygotes[0]
    zygote.answers = False
    manager.send(start_instance("inst_2"))
    await node.until(lambda: len(zygote.forks) == 2)
    os.kill(zygote.pid, 9)
    await manager.instance(InstanceState.READY)
    assert node.zygotes[1].forks[0].nonce != zygote.forks[1].nonce
    assert alive(worker.pid)


async def test_kin_that_answers_no_more_is_ended_and_made_again() -> None:
    node = Node(hang_s=1.0)
    make_checkpoint(node.config.checkpoints_path)
    async with node:
        await node.until(lambda: bool(node.stores) and bool(node.zygotes))
        store, zygote = node.stores[0], node.zygotes[0]
        zygote.listens = False
        await node.until(lambda: len(node.zygotes) == 2)
        assert not alive(zygote.pid)
        assert alive(store.pid), "one that answers is left alone"
        store.listens = False
        await node.until(lambda: len(node.stores) == 2)
        assert not alive(store.pid)


async def test_a_worker_of_an_outdated_fork_is_killed(node: Node) -> None:
    manager = await node.manager()
    await node.ready(manager)
    zygote = node.zygotes[0]
    zygote.answers = False
    manager.send(start_instance("inst_2"))
    await node.until(lambda: len(zygote.forks) == 2)
    manager.send(start_instance("inst_2", epoch_of(1, 7)))
    await node.until(lambda: len(zygote.forks) == 3)
    late = zygote.fork(zygote.forks[1])
    await node.until(lambda: not alive(late.pid))
    zygote.fork(zygote.forks[2])
    assert (await manager.instance(InstanceState.READY)).epoch == epoch_of(1, 7)


async def test_a_deserted_node_ends_what_is_idle_and_then_what_was_busy() -> None:
    node = Node(manager_grace_s=0.1)
    make_checkpoint(node.config.checkpoints_path)
    async with node:
        manager = await node.manager()
        start, busy = await node.ready(manager)
        _, idle = await node.ready(manager, start_instance("inst_2"))
        manager.send(submit(epoch_of(1, 9), start))
        await busy.hear(Submit)
        manager.close()
        node.managers.remove(manager)
        await node.until(lambda: not alive(idle.pid))
        assert alive(busy.pid)
        busy.say(epoch_of(1, 9), (1, 2), EndReason.STOP)
        await node.until(lambda: not alive(busy.pid))
        again = await node.manager()
        assert {i.state for i in again.truth.instances} == {InstanceState.STOPPED}
        assert again.attempts[0].new_ids == (1, 2)


async def test_a_manager_that_comes_back_in_time_keeps_everything() -> None:
    node = Node(manager_grace_s=0.3)
    make_checkpoint(node.config.checkpoints_path)
    async with node:
        _, worker = await node.ready(await node.manager())
        for _ in range(3):
            again = await node.manager()
        assert node.agent is not None
        assert node.agent._grace_timer is None
        again.send(Ping(nonce=1))
        await again.take(Pong)
        assert alive(worker.pid)


async def test_a_store_that_cannot_be_made_for_hours_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, delays = asyncio.sleep, list[float]()

    async def sleep(delay_s: float) -> None:
        delays.append(delay_s)
        await real(0)

    def spawn(config: NodeConfig, role: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(asyncio, "sleep", sleep)
    kin = Kin("store", NodeConfig(run_dir=str(tmp_path), data_dir=str(tmp_path)), Roster(tmp_path / "roster.json"), spawn)
    task = kin.start()
    while len(delays) < 1100 and not task.done():
        await real(0)
    assert not task.done()
    assert (delays[:3], delays[-1]) == ([0.1, 0.2, 0.4], 10.0)
    await kin.stop()


async def test_an_agent_that_cannot_care_for_its_store_any_more_says_so_and_leaves_nothing_running() -> None:
    class Broken(Node):
        def _spawn(self, config: NodeConfig, role: str) -> int:
            if role == "store":
                raise RuntimeError("a mistake")
            return super()._spawn(config, role)

    async with Broken() as node:
        assert node.task is not None
        with pytest.raises(SllmError, match="supervise store: a mistake"):
            await asyncio.wait_for(asyncio.shield(node.task), WAIT_S)
        node.task = None
        assert node.zygotes
        assert not [pid for pid in node.pids if alive(pid)]
        assert not {path.name for path in (node.directory / "run").iterdir()} & {"agent.sock", "roster.json"}


async def test_a_shutdown_ends_everything_and_leaves_no_file(node: Node) -> None:
    manager = await node.manager()
    _, worker = await node.ready(manager)
    manager.send(Shutdown())
    await manager.instance(InstanceState.STOPPED)
    await manager.hangup()
    assert node.task is not None
    await node.task
    assert not [pid for pid in node.pids if alive(pid)]
    assert worker.pid in node.pids
    assert not {path.name for path in (node.directory / "run").iterdir()} & {"agent.sock", "roster.json"}


async def test_a_shutdown_with_grace_lets_attempts_finish(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    manager.send(submit(epoch_of(1, 9), start))
    await worker.hear(Submit)
    manager.send(Shutdown(grace_s=60))
    await manager.instance(InstanceState.DRAINING)
    worker.say(epoch_of(1, 9), (4,), EndReason.STOP)
    ids, end = await manager.tokens_until_end(epoch_of(1, 9))
    assert (ids, end.reason) == ([4], EndReason.STOP)
    assert node.task is not None
    await node.task


async def test_a_manager_that_dials_during_a_shutdown_is_to_dial_again(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    manager.send(submit(epoch_of(1, 9), start))
    await worker.hear(Submit)
    manager.send(Shutdown(grace_s=60))
    await manager.instance(InstanceState.DRAINING)
    following = await node.dial_manager(generation=2)
    assert (await following.take(Refused)).fault.code == "unreachable"
    worker.say(epoch_of(1, 9), (4,), EndReason.STOP)
    assert node.task is not None
    await node.task


async def test_what_the_zygote_says_of_this_nodes_numerics_is_stated_as_long_as_it_is_there(node: Node) -> None:
    manager = await node.manager()
    await node.until(lambda: bool(node.zygotes))
    if not manager.truth.inventory.numerics:
        await manager.take(InventoryUpdate, lambda m: m.inventory.numerics == "torch 1")
    assert (await node.manager()).truth.inventory.numerics == "torch 1"
    manager = node.managers[-1]
    node.zygote_imported.clear()
    node.numerics = "torch 2"
    os.kill(node.zygotes[0].pid, signal.SIGKILL)
    told = await manager.take(InventoryUpdate, lambda m: not m.inventory.numerics)  # others tell of the disk
    assert told.inventory.devices == manager.truth.inventory.devices
    await node.until(lambda: len(node.zygotes) == 2)
    node.zygote_imported.set()
    assert (await manager.take(InventoryUpdate, lambda m: bool(m.inventory.numerics))).inventory.numerics == "torch 2"
