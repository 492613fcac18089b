"""Real processes over a disk or a remote that stops where a test says: requests computed while weights come, and loads that end
badly."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.store import catalog
from schema.ids import Epoch, epoch_of
from schema.link import (
    DropCheckpoint,
    EngineOptions,
    Ingest,
    InstanceLoad,
    InstanceTruth,
    InstanceUpdate,
    OperationDone,
    RemoteCopy,
    StartInstance,
    StopInstance,
    Tokens,
)
from schema.remote import RemoteSettings
from schema.spec import PathSource
from schema.states import EndReason, InstanceState, Tier, TierState
from tests.agent.daemon.peers import Manager
from tests.agent.daemon.test_processes import ROOT, WAIT_S, Machine, Stream, ended, job
from tests.checkpoints import make_llama_dir
from tests.remotes import web_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # of which most is the import of torch


class GatedMachine(Machine):
    def spawn(self) -> subprocess.Popen[bytes]:
        config = msgspec.json.encode(self.config).decode()
        args = [sys.executable, "-m", "tests.agent.gated_disk", "agent", "--config-json", config]
        with (self.directory / "agent.log").open("ab") as log:
            return subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)

    @property
    def gate(self) -> Path:
        return Path(self.config.run_dir) / "gate"

    async def ingest(self, manager: Manager) -> str:
        source = make_llama_dir(self.directory / "model", hidden=512, layers=3, heads=8, kv_heads=2, eos=False)
        manager.send(Ingest(op="op_1", source=PathSource(str(source))))
        done = await manager.take(OperationDone, timeout_s=WAIT_S)
        assert done.fault is None, done
        return done.digest

    async def early(self, manager: Manager, epoch: Epoch, remote: RemoteCopy | None = None) -> StartInstance:
        """An instance that is ready although the gate is closed, and its first step, in which it waits."""
        options = EngineOptions(kv_bytes=8 << 20)
        start = StartInstance(
            instance="inst_1", epoch=epoch, model="m", digest=self.digest, devices=(0,), options=options, remote=remote
        )
        manager.send(start)
        while (truth := await manager.instance_update(WAIT_S)).state is not InstanceState.READY:
            assert truth.fault is None, (truth, self.log())
        assert truth.phases is None
        manager.send(job(start, epoch, 12))
        await manager.take(InstanceLoad, lambda load: load.running == 1, WAIT_S)
        self.roster()
        return start

    async def dropped(self, manager: Manager, op: str) -> None:
        manager.send(DropCheckpoint(op=op, digest=self.digest, tier=Tier.DRAM))
        assert (await manager.take(OperationDone, lambda m: m.op == op, WAIT_S)).fault is None


@pytest.fixture
async def machine() -> AsyncIterator[GatedMachine]:
    made = GatedMachine(Path(tempfile.mkdtemp(dir="/tmp", prefix="sl")))
    try:
        yield made
    finally:
        made.close()


async def stopped(manager: Manager, attempt: Epoch | None = None) -> InstanceTruth:
    """The instance's end; before or after it this attempt ends as lost, and never has a token."""
    truth: InstanceTruth | None = None
    told: list[Tokens] = []
    while truth is None or (attempt is not None and not any(frame.ends for frame in told)):
        message = await manager.take(InstanceUpdate | Tokens, timeout_s=WAIT_S)  # type: ignore[arg-type]
        if isinstance(message, Tokens):
            told.append(message)
        elif message.truth.state is InstanceState.STOPPED:
            truth = message.truth
    assert not any(frame.runs for frame in told)
    if attempt is not None:
        ends = [(end.attempt, end.position, end.reason) for frame in told for end in frame.ends]
        assert ends == [(attempt, 0, EndReason.LOST)]
    return truth


async def test_requests_are_computed_while_weights_come_and_told_when_all_have(machine: GatedMachine) -> None:
    machine.start()
    manager = await machine.manager()
    machine.digest = await machine.ingest(manager)
    (directory,) = (machine.config.checkpoints_path / machine.digest).iterdir()
    (partition,) = catalog.read_entry(directory).manifest.partitions
    half, tail = len(partition.chunk_xxh3) // 2, partition.size_bytes - 1
    assert half > 2

    # Of the first load after the ingest, half is there and right; a request is being computed on it.
    machine.gate.write_text(str(half))
    start = await machine.early(manager, epoch_of(1, 1))
    assert not catalog.is_verified(directory)
    machine.gate.unlink()
    while (truth := await manager.instance_update(WAIT_S)).phases is None:
        pass
    assert truth.state is InstanceState.READY
    assert truth.phases.loaded_bytes == partition.size_bytes
    first, again = Stream(epoch_of(1, 1)), Stream(epoch_of(1, 2))
    await first.read(manager, ended)
    manager.send(job(start, epoch_of(1, 2), 12))
    await again.read(manager, ended)
    assert first.reason is EndReason.LENGTH
    assert first.ids == again.ids

    # Nobody wants it any more in the middle of its load.
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch))
    await stopped(manager)
    await machine.dropped(manager, "op_2")
    machine.gate.write_text(str(1))
    start = await machine.early(manager, epoch_of(2, 1))
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch))
    assert (await stopped(manager, epoch_of(2, 1))).fault is None

    # The last byte on the disk is another by now, and looked at again: what was computed until then is nobody's.
    path = catalog.partition_path(directory, partition)
    data = bytearray(path.read_bytes())
    data[tail] ^= 1
    path.write_bytes(data)
    catalog.unmark_verified(directory)
    machine.gate.write_text(str(half))
    await machine.early(manager, epoch_of(3, 1))
    machine.gate.unlink()
    truth = await stopped(manager, epoch_of(3, 1))
    assert truth.fault is not None
    assert truth.fault.code == "invalid_checkpoint"
    assert catalog.read_entry(directory).quarantined is not None
    assert await machine.stop() == 0
    await machine.until(lambda: not machine.left())


@pytest.mark.parametrize("dies", ["", "agent", "store"])
async def test_a_start_that_fetches_serves_before_its_last_bytes_are_fetched(machine: GatedMachine, dies: str) -> None:
    machine.config = msgspec.structs.replace(machine.config, remote=RemoteSettings(streams=1, part_bytes=4 << 20))
    machine.start()
    manager = await machine.manager()
    machine.digest = await machine.ingest(manager)
    (directory,) = (machine.config.checkpoints_path / machine.digest).iterdir()
    (partition,) = catalog.read_entry(directory).manifest.partitions
    shutil.copytree(directory.parent, machine.directory / "remote" / machine.digest)
    manager.send(DropCheckpoint(op="op_2", digest=machine.digest, tier=Tier.DISK))
    assert (await manager.take(OperationDone, lambda m: m.op == "op_2", WAIT_S)).fault is None
    go = threading.Event()

    def hold_the_end(handler: Any, path: str, _: int) -> bool:
        if path.endswith(partition.file) and handler.headers["Range"].endswith(f"-{partition.size_bytes - 1}"):
            assert go.wait(WAIT_S)
        return False

    with web_server(machine.directory / "remote") as web:
        web.fault = hold_the_end
        try:
            start = await machine.early(manager, epoch_of(1, 1), RemoteCopy(url=web.url))
            if dies:
                machine.kill(dies)
            if dies == "agent":
                machine.start()
                manager = await machine.manager()
                (truth,) = manager.truth.instances
                assert (truth.state, truth.phases) == (InstanceState.READY, None)
            assert not directory.exists()
        finally:
            go.set()
        while (truth := await manager.instance_update(WAIT_S)).phases is None:
            assert truth.fault is None, (truth, machine.log())
        assert (truth.phases.loaded_from, truth.phases.loaded_bytes) == (Tier.REMOTE, partition.size_bytes)
        first, again = Stream(epoch_of(1, 1)), Stream(epoch_of(1, 2))
        await first.read(manager, ended)
        manager.send(job(start, epoch_of(1, 2), 12))
        await again.read(manager, ended)
        assert (first.reason, first.ids) == (EndReason.LENGTH, again.ids)
        sound = {(Tier.DISK, TierState.RESIDENT), (Tier.DRAM, TierState.RESIDENT)}
        found: set[tuple[Tier, TierState]] = set()
        async with asyncio.timeout(WAIT_S):
            while found != sound:  # each newer manager is told all of it
                (told,) = (await machine.manager()).truth.checkpoints
                found = {(placement.tier, placement.state) for placement in told.placements}
        assert catalog.read_entry(directory).quarantined is None
    assert await machine.stop() == 0
    await machine.until(lambda: not machine.left())
