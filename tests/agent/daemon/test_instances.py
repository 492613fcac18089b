"""An instance's life: made, served, drained, stopped, killed, replaced; told to the manager at each turn."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import time
from typing import Any

import msgspec
import pytest

from agent.daemon.agent import SOFTWARE
from schema.errors import Fault, SllmError
from schema.ids import epoch_of
from schema.link import (
    Arriving,
    Extent,
    FillArena,
    Forked,
    InstanceUpdate,
    LayersArrived,
    OperationDone,
    Ping,
    PlacementUpdate,
    Pong,
    StopInstance,
    Submit,
)
from schema.states import EndReason, InstanceState, Tier, TierState
from tests.agent.daemon.peers import DIGEST, Manager, Node, Worker, alive, make_checkpoint, start_instance, submit


async def test_an_instance_is_made_from_weights_and_worker(node: Node) -> None:
    manager = await node.manager()
    start = start_instance()
    manager.send(start)
    await manager.instance(InstanceState.STARTING)
    truth = await manager.instance(InstanceState.READY)
    (worker,) = node.workers
    assert (truth.instance, truth.epoch, truth.pid) == (start.instance, start.epoch, worker.pid)
    assert (truth.kv_capacity_tokens, truth.max_context_tokens) == (1000, 128)
    assert truth.phases is not None
    assert (truth.phases.loaded_from, truth.phases.loaded_bytes) == (Tier.DISK, 4096)
    assert (truth.phases.build_s, truth.phases.attach_s, truth.phases.warm_s) == (0.1, 0.2, 0.3)
    assert 0 < truth.phases.fork_s <= truth.phases.total_s
    assert worker.start == start
    assert worker.directories == (str(node.config.checkpoints_path / DIGEST / "l1"),)
    assert worker.attach is not None
    assert worker.attach.arena == "arena_1"
    states = [p.truth.placements[-1].state for p in manager.seen if isinstance(p, PlacementUpdate)]
    assert TierState.FILLING in states
    assert states[-1] is TierState.RESIDENT


async def test_a_worker_can_only_read_the_arena(node: Node) -> None:
    _, worker = await node.ready(await node.manager())
    assert worker.memory is not None
    assert fcntl.fcntl(worker.memory, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with pytest.raises(PermissionError):
        mmap.mmap(worker.memory, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


async def test_the_truth_states_what_each_process_runs(node: Node) -> None:
    manager = await node.manager()
    start, _ = await node.ready(manager)
    kin = {"agent": SOFTWARE, "store": "test", "zygote": "test"}
    assert (await node.manager()).truth.inventory.software == {**kin, start.instance: "test"}
    manager = await node.manager()
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch))
    await manager.instance(InstanceState.STOPPED)
    assert node.agent is not None
    assert node.agent._software == kin, "of what has ended nothing is kept until another manager comes"
    assert (await node.manager()).truth.inventory.software == kin


async def test_of_the_logs_of_instances_that_have_ended_the_latest_stay(node: Node) -> None:
    manager = await node.manager()
    start, _ = await node.ready(manager)
    logs = node.config.log_path / "instances"
    logs.mkdir(exist_ok=True)
    for number, instance in enumerate((start.instance, *(f"old{number}" for number in range(70)))):
        path = logs / f"m@{instance}.log"
        path.touch()
        os.utime(path, (number, number))
    manager.send(start_instance("inst_2"))
    await manager.take(InstanceUpdate, lambda m: m.truth.instance == "inst_2" and m.truth.state is InstanceState.READY)
    manager.send(StopInstance(instance="inst_2", epoch=start.epoch))
    await node.until(lambda: len(list(logs.iterdir())) == 65)
    quiet = logs / f"m@{start.instance}.log"
    assert quiet.exists(), "it runs, though it has said nothing for long"
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch))
    await node.until(lambda: len(list(logs.iterdir())) == 64)
    assert quiet.exists(), "it has ended last"


async def test_a_full_run_directory_keeps_no_instance_from_ending_or_starting(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = await node.manager()
    first, killed = await node.ready(manager)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("agent.daemon.roster.write_atomic", full)
        killed.kill()
        await manager.instance(InstanceState.STOPPED, first.epoch)
        second, worker = await node.ready(manager, start_instance(epoch=epoch_of(1, 2)))
    manager.send(StopInstance(instance=second.instance, epoch=second.epoch))
    await manager.instance(InstanceState.STOPPED, second.epoch)
    await node.until(lambda: "worker" not in {each["role"] for each in node.roster()})
    assert not alive(worker.pid)


async def test_a_start_told_twice_is_stated_again_and_made_once(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    manager.send(start)
    assert (await manager.instance(InstanceState.READY)).pid == worker.pid
    assert len(node.workers) == 1


async def test_an_older_start_is_dropped(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager, start_instance(epoch=epoch_of(1, 5)))
    manager.send(start_instance(epoch=epoch_of(1, 4)))
    manager.send(start)
    assert (await manager.instance_update()).pid == worker.pid


async def test_a_newer_start_ends_the_older_life_first(node: Node) -> None:
    manager = await node.manager()
    _, old = await node.ready(manager)
    _, new = await node.ready(manager, start_instance(epoch=epoch_of(1, 2)))
    assert not alive(old.pid)
    assert alive(new.pid)
    assert len(node.stores[0].fills) == 2
    await node.stores[0].until(lambda: node.stores[0].holds[DIGEST] == 1)


async def test_a_checkpoint_that_is_not_here_stops_the_instance_by_name(node: Node) -> None:
    manager = await node.manager()
    manager.send(start_instance(digest="cd" * 32))
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.fault is not None
    assert truth.fault.code == "not_found"


async def test_a_device_that_is_not_here_stops_the_instance(node: Node) -> None:
    manager = await node.manager()
    manager.send(start_instance(devices=(3,)))
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.fault is not None
    assert "3" in truth.fault.message


async def test_a_failed_load_stops_the_instance_and_its_worker(node: Node) -> None:
    manager = await node.manager()
    node.stores[0].answers = False
    start = start_instance()
    manager.send(start)
    await manager.instance(InstanceState.STARTING)
    store = node.stores[0]
    await store.until(lambda: bool(store.fills))
    store.peer.send(OperationDone(op=store.fills[0].op, digest=DIGEST, fault=Fault("out_of_space", "the arena is full")))
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.fault == Fault("out_of_space", "the arena is full")
    await store.until(lambda: store.holds[DIGEST] == 0)
    await node.until(lambda: bool(node.workers) and not alive(node.workers[0].pid))


async def arriving(node: Node, manager: Manager) -> tuple[FillArena, Worker]:
    """A start whose weights have not come, and its worker, which was told where they will lie."""
    store = node.stores[0]
    store.answers = False
    manager.send(start_instance())
    await store.until(lambda: bool(store.fills))
    fill = store.fills[0]
    await node.until(lambda: bool(node.workers) and node.workers[0].start is not None)
    store.peer.send(Arriving(op=fill.op, digest=DIGEST, extents=(Extent(0, 4096),), image_bytes=4096, layers=1))
    worker = node.workers[0]
    heard = await worker.hear(Arriving)
    assert (heard.arena, heard.extents, heard.layers) == ("arena_1", (Extent(0, 4096),), 1)
    assert worker.memory is not None
    return fill, worker


async def test_a_worker_may_serve_before_its_last_weights_have_come(node: Node) -> None:
    manager = await node.manager()
    fill, worker = await arriving(node, manager)
    store = node.stores[0]
    store.peer.send(LayersArrived(op=fill.op, layers=3))
    assert (await worker.hear(LayersArrived)).layers == 3
    worker.peer.send(InstanceUpdate(truth=msgspec.structs.replace(worker.truth(InstanceState.READY), phases=None)))
    early = await manager.instance(InstanceState.READY)
    assert early.phases is None
    manager.send(submit(epoch_of(1, 9), start_instance()))
    await worker.hear(Submit)
    store.answer(fill)
    whole = await manager.instance(InstanceState.READY)
    assert worker.attach is not None
    assert whole.phases is not None
    assert (whole.phases.loaded_bytes, whole.phases.build_s) == (4096, 0.1)
    assert whole.phases.total_s >= whole.phases.load_s > 0


async def test_a_worker_that_dials_again_while_its_weights_come_hears_of_them_again(node: Node) -> None:
    manager = await node.manager()
    fill, worker = await arriving(node, manager)
    worker.memory = None
    await worker.redial()
    assert (await worker.hear(Arriving)).layers == 1
    assert worker.memory is not None
    node.stores[0].answer(fill)
    await manager.instance(InstanceState.READY)
    assert worker.attach is not None


async def test_a_load_that_fails_under_an_instance_that_serves_ends_it_and_loses_its_attempts(node: Node) -> None:
    manager = await node.manager()
    fill, worker = await arriving(node, manager)
    worker.peer.send(InstanceUpdate(truth=msgspec.structs.replace(worker.truth(InstanceState.READY), phases=None)))
    await manager.instance(InstanceState.READY)
    manager.send(submit(epoch_of(1, 9), start_instance()))
    await worker.hear(Submit)
    fault = Fault("invalid_checkpoint", "a chunk is wrong")
    node.stores[0].peer.send(OperationDone(op=fill.op, digest=DIGEST, fault=fault))
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.fault == fault
    assert worker.attach is None
    ids, end = await manager.tokens_until_end(epoch_of(1, 9))
    assert (ids, end.reason) == ([], EndReason.LOST)


async def test_a_start_says_how_long_it_waited_for_a_zygote_that_still_imports() -> None:
    node = Node()
    node.zygote_imported.clear()
    make_checkpoint(node.config.checkpoints_path)
    async with node:
        manager = await node.manager()
        manager.send(start_instance())
        await manager.instance(InstanceState.STARTING)
        await manager.take(PlacementUpdate, lambda m: m.truth.placements[-1].state is TierState.RESIDENT)
        node.zygote_imported.set()
        truth = await manager.instance(InstanceState.READY)
        assert truth.phases is not None
        assert truth.phases.load_s < truth.phases.zygote_s <= truth.phases.fork_s
        manager.send(start_instance("inst_2"))
        warm = await manager.take(InstanceUpdate, lambda m: m.truth.instance == "inst_2" and m.truth.phases is not None)
        assert warm.truth.phases.zygote_s == 0


async def test_a_failed_fork_stops_the_instance(node: Node) -> None:
    manager = await node.manager()
    await node.ready(manager)
    zygote = node.zygotes[0]
    zygote.answers = False
    manager.send(start_instance("inst_2"))
    await manager.instance(InstanceState.STARTING)
    await node.until(lambda: len(zygote.forks) == 2)
    zygote.peer.send(Forked(nonce=zygote.forks[1].nonce, fault=Fault.of(SllmError("no memory"))))
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.instance == "inst_2"
    assert truth.fault is not None
    assert "no memory" in truth.fault.message


async def test_a_stop_without_grace_ends_the_worker_and_is_forgotten(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    manager.send(submit(epoch_of(1, 9), start))
    await worker.hear(Submit)
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch))
    await manager.instance(InstanceState.STOPPING)
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.fault is None
    assert not alive(worker.pid)
    _, end = await manager.tokens_until_end(epoch_of(1, 9))
    assert end.reason is EndReason.LOST
    again = await node.manager()
    assert again.truth.instances == ()
    assert [entry["role"] for entry in node.roster()] == ["agent", "store", "zygote"]


async def test_a_stop_with_grace_lets_attempts_finish_and_takes_no_more(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    first, second = epoch_of(1, 9), epoch_of(1, 10)
    manager.send(submit(first, start))
    await worker.hear(Submit)
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch, grace_s=60))
    await manager.instance(InstanceState.DRAINING)
    manager.send(submit(second, start))
    assert (await manager.tokens_until_end(second))[1].reason is EndReason.LOST
    assert alive(worker.pid)
    worker.say(first, (7, 8), EndReason.STOP)
    ids, end = await manager.tokens_until_end(first)
    assert (ids, end.reason) == ([7, 8], EndReason.STOP)
    await manager.instance(InstanceState.STOPPED)
    assert not alive(worker.pid)


async def test_the_end_of_the_grace_ends_what_still_runs(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    manager.send(submit(epoch_of(1, 9), start))
    await worker.hear(Submit)
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch, grace_s=0.05))
    await manager.instance(InstanceState.DRAINING)
    await manager.instance(InstanceState.STOPPED)
    assert (await manager.tokens_until_end(epoch_of(1, 9)))[1].reason is EndReason.LOST


async def test_a_stop_of_what_is_not_here_is_answered_as_stopped(node: Node) -> None:
    manager = await node.manager()
    manager.send(StopInstance(instance="inst_x", epoch=epoch_of(1, 3)))
    truth = await manager.instance(InstanceState.STOPPED)
    assert (truth.instance, truth.epoch) == ("inst_x", epoch_of(1, 3))


async def test_a_killed_worker_loses_its_attempts_and_is_stated_until_it_is_stopped(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    manager.send(submit(epoch_of(1, 9), start))
    await worker.hear(Submit)
    worker.say(epoch_of(1, 9), (5,))
    worker.kill()
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.fault is not None
    assert "SIGKILL" in truth.fault.message
    _, end = await manager.tokens_until_end(epoch_of(1, 9))
    assert (end.reason, end.position) == (EndReason.LOST, 1)
    await node.stores[0].until(lambda: node.stores[0].holds[DIGEST] == 0)
    again = await node.manager()
    assert [i.state for i in again.truth.instances] == [InstanceState.STOPPED]
    again.send(StopInstance(instance=start.instance, epoch=start.epoch))
    await again.instance(InstanceState.STOPPED)
    assert (await node.manager()).truth.instances == ()


async def test_the_last_words_of_a_dying_worker_are_heard(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    attempt = epoch_of(1, 9)
    manager.send(submit(attempt, start))
    await worker.hear(Submit)
    fault = Fault("out_of_space", "no memory for the KV cache")
    worker.kill()
    worker.say(attempt, range(500))
    worker.peer.send(InstanceUpdate(truth=msgspec.structs.replace(worker.truth(InstanceState.STOPPED), fault=fault)))
    assert (await manager.instance(InstanceState.STOPPED)).fault == fault
    _, end = await manager.tokens_until_end(attempt)
    assert (end.position, end.reason) == (500, EndReason.LOST)


async def test_a_worker_that_ignores_its_stop_is_killed(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    worker.obeys = False
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch))
    await manager.instance(InstanceState.STOPPED)
    assert not alive(worker.pid)


async def test_a_worker_that_never_becomes_ready_times_out() -> None:
    node = Node(start_s=0.2)
    node.worker_becomes_ready = False
    make_checkpoint(node.config.checkpoints_path)
    async with node:
        manager = await node.manager()
        manager.send(start_instance())
        truth = await manager.instance(InstanceState.STOPPED)
        assert truth.fault is not None
        assert truth.fault.code == "timed_out"
        assert not alive(node.workers[0].pid)


async def test_a_worker_that_never_comes_times_out() -> None:
    node = Node()
    node.zygote_answers = False
    make_checkpoint(node.config.checkpoints_path)
    async with node:
        manager = await node.manager()
        node.change(spawn_s=0.3)
        manager.send(start_instance())
        truth = await manager.instance(InstanceState.STOPPED)
        assert truth.fault is not None
        assert truth.fault.code == "timed_out"
        await node.stores[0].until(lambda: node.stores[0].holds[DIGEST] == 0)


async def test_a_worker_that_answers_no_more_is_ended_and_what_it_ran_is_lost() -> None:
    node = Node(hang_s=1.0)
    make_checkpoint(node.config.checkpoints_path)
    async with node:
        manager = await node.manager()
        start, worker = await node.ready(manager)
        await worker.redial()
        for _ in range(6):
            await worker.hear(Ping)
        assert alive(worker.pid), "one that answers is left alone, however little it says"
        manager.send(submit(epoch_of(1, 9), start))
        await worker.hear(Submit)
        worker.answers = False
        truth = await manager.instance(InstanceState.STOPPED)
        assert truth.fault is not None
        assert "has not answered" in truth.fault.message
        assert (await manager.tokens_until_end(epoch_of(1, 9)))[1].reason is EndReason.LOST
        assert not alive(worker.pid)


async def test_a_worker_whose_answer_the_agent_itself_was_late_for_is_left_alone() -> None:
    node = Node(hang_s=0.4)
    make_checkpoint(node.config.checkpoints_path)
    async with node:
        _, worker = await node.ready(await node.manager())
        answer = worker.peer.send

        def late(message: Any) -> None:
            """The machine stands still, and the worker has its turn after the agent."""
            if isinstance(message, Pong):
                time.sleep(node.config.hang_s + 0.1)
                asyncio.get_running_loop().call_later(0.01, answer, message)

        worker.peer.send = late  # type: ignore[assignment, method-assign]
        for _ in range(4):
            await worker.hear(Ping)
        assert alive(worker.pid)


async def test_a_ready_worker_that_never_dials_again_is_ended() -> None:
    node = Node()
    make_checkpoint(node.config.checkpoints_path)
    async with node:
        manager = await node.manager()
        _, worker = await node.ready(manager)
        node.change(spawn_s=0.3)
        await worker.hang_up()
        truth = await manager.instance(InstanceState.STOPPED)
        assert truth.fault is not None
        assert "did not dial" in truth.fault.message
        assert not alive(worker.pid)
