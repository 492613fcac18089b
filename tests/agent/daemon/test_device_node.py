"""A node with fake devices in real processes: weights there outlive store, worker and agent, and workers serve from them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from schema.checkpoint import IN_PLACE
from schema.ids import Epoch, epoch_of
from schema.link import (
    DropCheckpoint,
    EngineOptions,
    Ingest,
    LoadCheckpoint,
    NodeTruth,
    OperationDone,
    Placement,
    PlacementUpdate,
    Publish,
    RemoteCopy,
    StartInstance,
    StopInstance,
    VerifyCheckpoint,
)
from schema.spec import PathSource
from schema.states import EndReason, InstanceState, Tier, TierState
from tests.agent.daemon.peers import Manager
from tests.agent.daemon.test_processes import LONG, ROOT, WAIT_S, Machine, Stream, ended, job
from tests.checkpoints import make_llama_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # of which most is the import of torch

DEVICE_BYTES = 64 << 20


class FakeMachine(Machine):
    devices = 1

    def spawn(self) -> subprocess.Popen[bytes]:
        config = msgspec.json.encode(self.config).decode()
        args = [sys.executable, "-m", "tests.agent.fake_cuda", "agent", "--config-json", config]
        environment = {**os.environ, "FAKE_CUDA_BYTES": ",".join([str(DEVICE_BYTES)] * self.devices), "PYTHONPATH": str(ROOT)}
        with (self.directory / "agent.log").open("ab") as log:
            return subprocess.Popen(
                args, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True, env=environment
            )


@pytest.fixture
async def machine() -> AsyncIterator[FakeMachine]:
    made = FakeMachine(Path(tempfile.mkdtemp(dir="/tmp", prefix="sl")))
    try:
        yield made
    finally:
        made.close()


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def on_device(placements: tuple[Placement, ...]) -> list[tuple[TierState, int]]:
    return [(each.state, each.users) for each in placements if each.tier is Tier.DEVICE]


def stated(truth: NodeTruth) -> list[tuple[TierState, int]]:
    return on_device(truth.checkpoints[0].placements)


async def placed(manager: Manager, state: TierState, users: int) -> None:
    await manager.take(PlacementUpdate, lambda m: on_device(m.truth.placements) == [(state, users)], WAIT_S)


async def reply(manager: Manager, start: StartInstance, attempt: Epoch) -> list[int]:
    stream = Stream(attempt)
    manager.send(job(start, attempt, 12))
    await stream.read(manager, ended)
    assert stream.reason is EndReason.LENGTH
    return stream.ids


async def test_weights_on_a_device_outlive_everybody(machine: FakeMachine) -> None:
    machine.start()
    manager = await machine.manager()
    (device,) = manager.truth.inventory.devices
    assert (device.kind, device.name, device.memory_bytes) == ("cuda", "Fake 0", DEVICE_BYTES // 10 * 9)
    machine.digest = await machine.ingest(manager)

    # The worker maps what the store has loaded, and answers from it.
    start = await machine.ready(manager, epoch_of(1, 1))
    worker = machine.roster()["worker"]
    assert "memfd:fake-device-0" in maps(worker)
    assert "memfd:sllmctl-arena" not in maps(worker)
    tokens = await reply(manager, start, epoch_of(1, 1))

    # The store is killed: the next one has its device memory back, and the worker has not noticed.
    store = machine.kill("store")
    await machine.until(lambda: machine.roster().get("store", store) != store)
    await placed(manager, TierState.RESIDENT, 1)
    assert await reply(manager, start, epoch_of(1, 2)) == tokens
    manager.close()
    manager = await machine.manager()
    assert stated(manager.truth) == [(TierState.RESIDENT, 1)]
    (instance,) = manager.truth.instances
    assert instance.phases is not None
    assert instance.phases.loaded_from is Tier.DISK
    assert instance.phases.loaded_bytes > 0

    # The worker is killed: the next life attaches to the same weights, and nothing is read.
    machine.kill("worker")
    while (truth := await manager.instance_update(WAIT_S)).state is not InstanceState.STOPPED:
        pass
    assert truth.fault is not None
    # And so it does when those on the device are the only ones left that are right.
    await placed(manager, TierState.RESIDENT, 0)
    manager.send(DropCheckpoint(op="op_a", digest=machine.digest, tier=Tier.DRAM))
    assert (await manager.take(OperationDone, lambda m: m.op == "op_a", WAIT_S)).fault is None
    (partition,) = machine.config.checkpoints_path.glob(f"{machine.digest}/*/partition_0.bin")
    with partition.open("r+b") as file:
        file.write(b"rot")
    manager.send(VerifyCheckpoint(op="op_b", digest=machine.digest))
    done = await manager.take(OperationDone, lambda m: m.op == "op_b", WAIT_S)
    assert done.fault is not None
    assert done.fault.code == "invalid_checkpoint"
    start = await machine.ready(manager, epoch_of(2, 1))
    assert await reply(manager, start, epoch_of(2, 1)) == tokens

    # The agent is killed: the store offers its descriptors to the next one.
    machine.kill("agent")
    machine.start()
    manager = await machine.manager()
    assert stated(manager.truth) == [(TierState.RESIDENT, 1)]
    (instance,) = manager.truth.instances
    assert instance.phases is not None
    assert (instance.phases.loaded_from, instance.phases.loaded_bytes) == (Tier.DEVICE, 0)
    assert await reply(manager, start, epoch_of(3, 1)) == tokens

    # They stay when the instance stops, until they are dropped.
    manager.send(DropCheckpoint(op="op_2", digest=machine.digest, tier=Tier.DEVICE))
    done = await manager.take(OperationDone, timeout_s=WAIT_S)
    assert done.fault is not None
    assert done.fault.code == "conflict"
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch))
    await placed(manager, TierState.RESIDENT, 0)
    manager.send(DropCheckpoint(op="op_3", digest=machine.digest, tier=Tier.DEVICE))
    done = await manager.take(OperationDone, lambda m: m.op == "op_3", WAIT_S)
    assert done.fault is None

    manager.close()
    manager = await machine.manager()
    assert stated(manager.truth) == []
    assert await machine.stop() == 0
    await machine.until(lambda: not machine.left())


async def test_weights_come_to_a_device_ahead_of_a_start(machine: FakeMachine) -> None:
    machine.start()
    manager = await machine.manager()
    machine.digest = await machine.ingest(manager)
    manager.send(LoadCheckpoint(op="op_a", digest=machine.digest, tier=Tier.DEVICE, device=7))
    done = await manager.take(OperationDone, lambda m: m.op == "op_a", WAIT_S)
    assert done.fault is not None
    assert "no device 7" in done.fault.message
    manager.send(LoadCheckpoint(op="op_b", digest=machine.digest, tier=Tier.DEVICE, device=0))
    done = await manager.take(OperationDone, lambda m: m.op == "op_b", WAIT_S)
    assert done.fault is None
    assert done.read_bytes > 0
    manager.close()
    manager = await machine.manager()
    assert stated(manager.truth) == [(TierState.RESIDENT, 0)]
    await machine.ready(manager, epoch_of(1, 1))
    manager.close()
    (instance,) = (await machine.manager()).truth.instances
    assert instance.phases is not None
    assert (instance.phases.loaded_from, instance.phases.loaded_bytes) == (Tier.DEVICE, 0)
    assert await machine.stop() == 0


async def test_each_place_has_the_image_of_a_copy_that_can_be_used_there(machine: FakeMachine) -> None:
    """The user's own files, which are written to, and a copy that is ingested then: two images of one checkpoint."""
    machine.devices = 2
    machine.start()
    manager = await machine.manager()
    source = make_llama_dir(machine.directory / "model", eos=False, context=LONG)

    async def does(operation: Ingest | LoadCheckpoint | DropCheckpoint) -> OperationDone:
        manager.send(operation)
        done = await manager.take(OperationDone, lambda m: m.op == operation.op, WAIT_S)
        assert done.fault is None, (done, machine.log())
        return done

    async def tokens(epoch: int, device: int) -> list[int]:
        options = EngineOptions(kv_bytes=8 << 20)
        words = {"instance": "inst_1", "model": "m", "digest": digest, "options": options}
        start = StartInstance(epoch=epoch_of(epoch, 1), devices=(device,), **words)
        manager.send(start)
        while (truth := await manager.instance_update(WAIT_S)).state is not InstanceState.READY:
            assert truth.fault is None, (truth, machine.log())
        found = await reply(manager, start, epoch_of(epoch, 2))
        manager.send(StopInstance(instance=start.instance, epoch=start.epoch))
        await manager.instance(InstanceState.STOPPED)
        return found

    digest = (await does(Ingest(op="op_1", source=PathSource(str(source), in_place=True)))).digest
    await does(LoadCheckpoint(op="op_2", digest=digest, tier=Tier.DEVICE, device=0))
    undisturbed = await tokens(1, 0)
    await does(DropCheckpoint(op="op_3", digest=digest, tier=Tier.DRAM))
    (source / "model.safetensors").touch()
    assert (await does(Ingest(op="op_4", source=PathSource(str(source))))).digest == digest

    # Where the first one lies it is started from all the same; elsewhere the other one comes.
    await does(LoadCheckpoint(op="op_5", digest=digest))
    assert await tokens(2, 1) == undisturbed
    assert await tokens(3, 0) == undisturbed

    # Once the first has left the disk its weights go, though in memory and on the other device the second lies.
    shutil.rmtree(machine.config.checkpoints_path / digest / IN_PLACE)
    manager.send(VerifyCheckpoint(op="op_6", digest=digest))  # which finds that out
    await manager.take(OperationDone, lambda m: m.op == "op_6", WAIT_S)
    manager.close()
    manager = await machine.manager()
    if [each.device for each in manager.truth.checkpoints[0].placements if each.tier is Tier.DEVICE] != [1]:
        await manager.take(
            PlacementUpdate, lambda m: [each.device for each in m.truth.placements if each.tier is Tier.DEVICE] == [1], WAIT_S
        )
    assert await tokens(4, 0) == undisturbed
    assert await machine.stop() == 0


async def test_weights_of_a_bad_copy_give_way_to_those_that_a_start_has_fetched(machine: FakeMachine) -> None:
    machine.start()
    manager = await machine.manager()
    source = make_llama_dir(machine.directory / "model", eos=False, context=LONG)
    remote = machine.directory / "remote"
    remote.mkdir()

    async def does(operation: Ingest | LoadCheckpoint | DropCheckpoint | Publish | VerifyCheckpoint) -> OperationDone:
        manager.send(operation)
        return await manager.take(OperationDone, lambda m: m.op == operation.op, WAIT_S)

    digest = (await does(Ingest(op="op_1", source=PathSource(str(source))))).digest
    published = await does(Publish(op="op_2", digest=digest, url=f"file://{remote}"))
    assert published.fault is None
    assert (await does(DropCheckpoint(op="op_3", digest=digest, tier=Tier.DISK))).fault is None
    assert (await does(Ingest(op="op_4", source=PathSource(str(source), in_place=True)))).digest == digest
    assert (await does(LoadCheckpoint(op="op_5", digest=digest, tier=Tier.DEVICE, device=0))).fault is None
    bad = machine.config.checkpoints_path / digest / IN_PLACE
    (bad / "tokenizer.json").write_bytes(b"rot")
    assert (await does(VerifyCheckpoint(op="op_6", digest=digest))).fault is not None

    options = EngineOptions(kv_bytes=8 << 20)
    start = StartInstance(instance="inst_1", epoch=epoch_of(1, 1), model="m", digest=digest, devices=(0,), options=options)
    manager.send(msgspec.structs.replace(start, remote=RemoteCopy(url=f"file://{remote}", layout=published.layout)))
    while (truth := await manager.instance_update(WAIT_S)).state is not InstanceState.READY:
        assert truth.fault is None, (truth, machine.log())
    assert truth.phases is not None
    assert truth.phases.loaded_from is Tier.REMOTE
    assert truth.phases.loaded_bytes > 0
    assert len(await reply(manager, start, epoch_of(1, 2))) == 12
    manager.close()
    manager = await machine.manager()
    assert stated(manager.truth) == [(TierState.RESIDENT, 1)]
    assert await machine.stop() == 0
