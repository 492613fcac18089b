"""An agent that comes after a killed one: it waits for what the roster names, adopts it, and speaks only then."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import msgspec
import pytest

from agent.daemon.files import FileLock, is_locked
from agent.daemon.process import start_ticks
from agent.daemon.roster import RosterEntry
from agent.daemon.supervisor import spawn_process
from schema.checkpoint import LAYOUT, decode_manifest
from schema.errors import Conflict
from schema.ids import epoch_of
from schema.link import Attach, Cancel, Extent, Fork, OperationDone, RemoteCopy, StartPhases, StopInstance, Submit, Welcome
from schema.states import EndReason, InstanceState
from tests.agent.daemon.peers import DIGEST, Node, Worker, alive, make_checkpoint, start_instance, submit

A = epoch_of(1, 9)
START = start_instance()


def write_roster(node: Node, entries: Iterable[RosterEntry]) -> None:
    document = {"processes": [msgspec.to_builtins(entry) for entry in entries]}
    (node.directory / "run" / "roster.json").write_bytes(msgspec.json.encode(document))


def entry(role: str, pid: int, **fields: object) -> RosterEntry:
    ticks = start_ticks(pid)
    assert ticks is not None
    return RosterEntry(role=role, pid=pid, ticks=ticks, **fields)  # type: ignore[arg-type]


def left_worker(node: Node) -> tuple[Worker, RosterEntry]:
    """A ready worker of an earlier life of the agent, with one attempt under way."""
    worker = Worker(node, node.sleeper(), Fork(instance=START.instance, epoch=START.epoch, nonce=77))
    worker.start = START
    worker.attach = Attach(arena="arena_1", extents=(Extent(0, 4096),), image_bytes=4096)
    worker.submits[A] = submit(A, START)
    worker.generated[A] = [4, 5]
    node.workers.append(worker)
    phases = StartPhases(load_s=1.0, total_s=2.0)
    words = {"instance": START.instance, "epoch": START.epoch, "nonce": 77, "start": START, "phases": phases}
    return worker, entry("worker", worker.pid, **words)


@pytest.fixture
async def after() -> AsyncIterator[Node]:
    """A node whose agent has not begun; tests write the roster that it finds."""
    node = Node()
    make_checkpoint(node.config.checkpoints_path)
    try:
        yield node
    finally:
        await node.__aexit__()


async def test_everything_alive_is_adopted_with_its_attempts(after: Node) -> None:
    worker, left = left_worker(after)
    store, zygote = after.sleeper(), after.sleeper()
    write_roster(after, [RosterEntry(role="agent", pid=1), left, entry("store", store), entry("zygote", zygote)])
    after.begin()
    manager = await after.dial_manager()
    await manager.take(Welcome)
    after.play("store", store)
    after.play("zygote", zygote)
    worker.begin()
    truth = await manager.whole_truth()
    (instance,) = truth.instances
    assert (instance.state, instance.pid, instance.epoch) == (InstanceState.READY, worker.pid, START.epoch)
    assert instance.phases == StartPhases(load_s=1.0, total_s=2.0)
    assert [(attempt.submit.attempt, attempt.new_ids) for attempt in manager.attempts] == [(A, (4, 5))]
    assert len(after.pids) == 3, "nothing was made anew"
    await after.stores[0].until(lambda: after.stores[0].holds == {DIGEST: 1})
    worker.say(A, (6,), EndReason.STOP)
    ids, end = await manager.tokens_until_end(A)
    assert (ids, end.position) == ([6], 3)
    assert after.zygotes[0].forks == []
    assert {p["role"]: p["pid"] for p in after.roster()} == {
        "agent": os.getpid(),
        "store": store,
        "zygote": zygote,
        "worker": worker.pid,
    }


async def test_a_start_that_was_fetching_goes_on_with_its_fetch(after: Node) -> None:
    start = msgspec.structs.replace(START, digest="cd" * 32, remote=RemoteCopy(url="s3://b/c", layout="l1"))
    worker = Worker(after, after.sleeper(), Fork(instance=start.instance, epoch=start.epoch, nonce=77))
    after.workers.append(worker)
    store = after.sleeper()
    left = entry("worker", worker.pid, instance=start.instance, epoch=start.epoch, nonce=77, start=start, fetching=True)
    write_roster(after, [left, entry("store", store), entry("zygote", zygote := after.sleeper())])
    op = f"fetch {start.instance}"
    after.begin()
    after.play("store", store)
    after.play("zygote", zygote)
    worker.begin()
    manager = await after.manager()
    assert [instance.state for instance in manager.truth.instances] == [InstanceState.STARTING]
    assert any(each.get("fetching") for each in after.roster()), "the agent after this one must know it too"
    await after.stores[0].until(lambda: bool(after.stores[0].fetches))
    (fetch,) = after.stores[0].fetches
    assert fetch.op.startswith(op)
    assert (fetch.digest, fetch.url, fetch.in_memory, fetch.users) == (start.digest, "s3://b/c", True, 1)
    make_checkpoint(after.config.checkpoints_path, start.digest)
    after.stores[0].peer.send(OperationDone(op=fetch.op, digest=start.digest, layout="l1"))
    await manager.instance(InstanceState.READY)
    assert worker.start == start


async def test_a_worker_that_was_built_over_one_copy_gets_no_other_ones_weights(after: Node) -> None:
    worker = Worker(after, after.sleeper(), Fork(instance=START.instance, epoch=START.epoch, nonce=77))
    worker.start = START
    after.workers.append(worker)
    directory = make_checkpoint(after.config.checkpoints_path, layout="l2")
    image_id = decode_manifest((directory / "manifest.json").read_bytes()).image_id
    words = {"instance": START.instance, "epoch": START.epoch, "nonce": 77, "start": START}
    left = entry("worker", worker.pid, directory=f"{DIGEST}/l2", image_id=image_id, **words)
    write_roster(after, [left, entry("store", store := after.sleeper()), entry("zygote", zygote := after.sleeper())])
    after.begin()
    after.play("store", store)
    after.play("zygote", zygote)
    worker.begin()
    await after.until(lambda: bool(after.stores) and bool(after.stores[0].fills))
    (fill,) = after.stores[0].fills
    assert (fill.directory, fill.image_id) == (f"{DIGEST}/l2", image_id)


async def test_the_copy_of_a_worker_is_written_down(after: Node) -> None:
    after.begin()
    await after.ready(await after.manager())
    (left,) = (each for each in after.roster() if each["role"] == "worker")
    assert left["directory"] == f"{DIGEST}/l1"
    assert left["image_id"] == after.stores[0].fills[0].image_id


async def test_an_instance_that_serves_while_its_copy_comes_to_the_disk_goes_on(after: Node) -> None:
    worker, left = left_worker(after)
    shutil.rmtree(after.config.checkpoints_path / START.digest)
    left = msgspec.structs.replace(left, start=msgspec.structs.replace(START, remote=RemoteCopy(url="s3://b/c")), fetching=True)
    write_roster(after, [left, entry("store", store := after.sleeper()), entry("zygote", zygote := after.sleeper())])
    after.store_fetching = (op := f"fetch {START.instance}/{START.epoch}",)
    after.begin()
    after.play("store", store)
    after.play("zygote", zygote)
    worker.begin()
    manager = await after.manager()
    assert [instance.state for instance in manager.truth.instances] == [InstanceState.READY]
    kin = after.stores[0]
    await kin.until(lambda: [fetch.op for fetch in kin.fetches] == [op])
    assert kin.cancelled == []
    make_checkpoint(after.config.checkpoints_path, START.digest)
    kin.peer.send(OperationDone(op=op, digest=START.digest, layout="l1"))
    await after.until(lambda: not any(each.get("fetching") for each in after.roster()))
    worker.say(A, [6], EndReason.LENGTH)
    ids, end = await manager.tokens_until_end(A)
    assert (ids, end.position) == ([6], 3)


async def test_the_truth_does_not_wait_for_a_zygote_that_still_imports(after: Node) -> None:
    worker, left = left_worker(after)
    write_roster(after, [left, entry("zygote", zygote := after.sleeper())])
    after.begin()
    worker.begin()
    manager = await after.dial_manager()
    await manager.take(Welcome)
    truth = await manager.whole_truth()
    assert [(instance.state, instance.pid) for instance in truth.instances] == [(InstanceState.READY, worker.pid)]
    after.play("zygote", zygote)
    assert {p["role"]: p["pid"] for p in after.roster()}["zygote"] == zygote


async def test_what_died_meanwhile_is_stated_as_stopped(after: Node) -> None:
    worker, left = left_worker(after)
    worker.kill()
    await after.until(lambda: not alive(worker.pid))
    write_roster(after, [left])
    after.begin()
    manager = await after.manager()
    (instance,) = manager.truth.instances
    assert instance.state is InstanceState.STOPPED
    assert instance.fault is not None
    assert manager.attempts == []
    manager.send(StopInstance(instance=START.instance, epoch=START.epoch))
    await manager.instance(InstanceState.STOPPED)
    assert (await after.manager()).truth.instances == ()
    assert "worker" not in {p["role"] for p in after.roster()}


async def test_another_process_of_the_same_pid_is_left_alone(after: Node) -> None:
    worker, left = left_worker(after)
    write_roster(
        after, [msgspec.structs.replace(left, ticks=left.ticks + 1), RosterEntry(role="store", pid=worker.pid, ticks=1)]
    )
    after.begin()
    manager = await after.manager()
    assert manager.truth.instances[0].state is InstanceState.STOPPED
    assert alive(worker.pid)


async def test_the_truth_does_not_wait_for_ever_and_what_comes_late_is_not_run_twice() -> None:
    node = Node(adopt_s=0.2)
    make_checkpoint(node.config.checkpoints_path)
    worker, left = left_worker(node)
    write_roster(node, [left])
    async with node:
        manager = await node.manager()
        assert [i.state for i in manager.truth.instances] == [InstanceState.STARTING]
        assert manager.attempts == []
        worker.begin()
        assert (await manager.instance(InstanceState.READY)).pid == worker.pid
        assert (await worker.hear(Cancel)).attempt == A


async def test_a_worker_that_never_dials_again_is_ended() -> None:
    node = Node(adopt_s=0.1, spawn_s=0.3)
    make_checkpoint(node.config.checkpoints_path)
    worker, left = left_worker(node)
    write_roster(node, [left])
    async with node:
        manager = await node.manager()
        (truth,) = manager.truth.instances
        if truth.state is not InstanceState.STOPPED:
            truth = await manager.instance(InstanceState.STOPPED)
        assert truth.fault is not None
        assert truth.fault.code == "timed_out"
        assert not alive(worker.pid)


async def test_kin_that_an_earlier_agent_has_just_made_has_its_time_to_dial() -> None:
    node = Node(adopt_s=0.2)
    make_checkpoint(node.config.checkpoints_path)
    zygote = node.sleeper()
    write_roster(node, [entry("zygote", zygote)])
    async with node:
        manager = await node.manager()  # hears the truth without it
        late = time.monotonic() + 5 * node.config.adopt_s
        await node.until(lambda: time.monotonic() > late)
        node.play("zygote", zygote)
        manager.send(START)
        await manager.instance(InstanceState.READY)
        assert [each.pid for each in node.zygotes] == [zygote]
        assert alive(zygote)


async def test_kin_that_does_not_dial_again_is_ended_and_made_anew() -> None:
    node = Node(adopt_s=0.2, spawn_s=0.4)
    make_checkpoint(node.config.checkpoints_path)
    zygote = node.sleeper()
    write_roster(node, [entry("zygote", zygote)])
    async with node:
        await node.until(lambda: bool(node.zygotes))
        assert not alive(zygote)
        assert node.zygotes[0].pid != zygote


async def test_a_fork_that_was_not_answered_is_made_anew(after: Node) -> None:
    _, left = left_worker(after)
    write_roster(after, [msgspec.structs.replace(left, pid=0, ticks=0, phases=None)])
    after.begin()
    manager = await after.manager()
    if manager.truth.instances[0].state is not InstanceState.READY:
        await manager.instance(InstanceState.READY)
    (fork,) = after.zygotes[0].forks
    assert fork.nonce != 77


async def test_a_stop_that_was_under_way_goes_on(after: Node) -> None:
    worker, left = left_worker(after)
    write_roster(after, [msgspec.structs.replace(left, stop_grace_s=60.0)])
    after.begin()
    worker.begin()
    manager = await after.manager()
    assert manager.truth.instances[0].state is InstanceState.DRAINING
    worker.say(A, (6,), EndReason.STOP)
    assert (await manager.tokens_until_end(A))[0] == [6]
    await manager.instance(InstanceState.STOPPED)


async def test_an_ingest_of_an_earlier_life_is_ended(after: Node) -> None:
    pid = after.sleeper()
    write_roster(after, [entry("ingest", pid, instance="op_1")])
    after.begin()
    assert (await after.manager()).truth.ops == ()
    assert not alive(pid)


async def test_what_an_ingest_of_an_earlier_life_commits_as_it_is_ended_is_stated(after: Node) -> None:
    other, made, ready = "ef" * 32, after.directory / "made", after.directory / "ready"
    make_checkpoint(made, other, LAYOUT)
    rename = f"os.rename({str(made / other)!r}, {str(after.config.checkpoints_path / other)!r})"
    program = (
        "import os, pathlib, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        f"signal.sigwait({{signal.SIGTERM}})\n{rename}"
    )
    pid = spawn_process([sys.executable, "-c", program], after.directory / "data" / "log" / "ingest.log")
    after.pids.append(pid)
    await after.until(ready.exists)
    write_roster(after, [entry("ingest", pid, instance="op_1")])
    after.begin()
    assert {each.digest for each in (await after.manager()).truth.checkpoints} == {DIGEST, other}


async def test_what_killed_processes_have_left_on_the_disk_goes(after: Node) -> None:
    left, kept, data = list[Path](), list[Path](), after.directory / "data"
    for place in ("tmp", "partial"):
        for name, where in (("left", left), ("fetch+key", kept)):
            where.append(data / place / name)
            where[-1].mkdir(parents=True)
            (where[-1] / "file").write_bytes(b"x")
    after.begin()
    await after.until(lambda: not any(path.exists() for path in left))
    assert all(path.exists() for path in kept), "another try goes on with these"


async def test_an_unreadable_roster_is_an_empty_one(after: Node, caplog: pytest.LogCaptureFixture) -> None:
    (after.directory / "run" / "roster.json").write_text("{{")
    after.begin()
    assert (await after.manager()).truth.instances == ()
    assert "roster" in caplog.text


async def test_a_submit_goes_to_an_adopted_worker(after: Node) -> None:
    worker, left = left_worker(after)
    write_roster(after, [left])
    after.begin()
    worker.begin()
    manager = await after.manager()
    manager.send(submit(epoch_of(2, 1), START))
    assert (await worker.hear(Submit)).attempt == epoch_of(2, 1)


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "agent.lock"
    assert not is_locked(path)
    lock = FileLock.take(path, "agent")
    assert is_locked(path)
    with pytest.raises(Conflict, match="stop it first"):
        FileLock.take(path, "agent", timeout_s=0.05)
    lock.release()
    assert not path.exists()
    FileLock.take(path, "agent").release()
