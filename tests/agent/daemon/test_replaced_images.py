"""A node whose real store has the image of a copy that went bad, while a copy with another image comes: it goes neither too
soon nor too late."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from agent.config import NodeConfig
from agent.daemon.supervisor import spawn_process
from agent.store import catalog
from agent.store.residency import OF_NO_USE
from schema.link import (
    CancelOperation,
    Fetch,
    Ingest,
    InstanceTruth,
    InstanceUpdate,
    LoadCheckpoint,
    NodeEvent,
    OperationDone,
    PinTo,
    PlacementUpdate,
    Progress,
    RemoteCopy,
    SetPins,
    StartInstance,
    StopInstance,
    VerifyCheckpoint,
)
from schema.spec import PathSource
from schema.states import InstanceState, Tier, TierState
from tests.agent.daemon.late_look import look_held_back
from tests.agent.daemon.peers import Manager, Node, start_instance
from tests.agent.store.images import CHUNK, commit
from tests.remotes import NO_LIMIT, web_server

NUMBER = 7
IMAGE_BYTES = 2 * CHUNK
MAIN = "import sys; from agent.store.process import main; sys.exit(main(sys.argv[1]))"
SOUND = {Tier.DISK: TierState.RESIDENT, Tier.DRAM: TierState.RESIDENT}


class StoreNode(Node):
    """A node with a real store, whose arena holds eight chunks; zygote and workers are played. A remote has its checkpoint
    too, as another image."""

    def __init__(self) -> None:
        super().__init__(arena_bytes=8 * CHUNK, chunk_bytes=CHUNK)
        (Path(self.config.run_dir) / "node.json").write_bytes(msgspec.json.encode(self.config))  # as the agent's process does
        self.digest, self.local, _ = commit(self.config.checkpoints_path, NUMBER, IMAGE_BYTES)
        _, self.published, _ = commit(self.directory / "remote", NUMBER, IMAGE_BYTES // 2, partitions=2)
        self.url = f"file://{self.directory}/remote"
        self.store_pids: list[int] = []
        self.looks = 0

    def _spawn(self, config: NodeConfig, role: str) -> int:
        if role != "store":
            return super()._spawn(config, role)
        pid = spawn_process([sys.executable, "-c", MAIN, config.run_dir], self.directory / "data" / "log" / "store.log")
        self.store_pids.append(pid)
        self.pids.append(pid)
        return pid

    async def does(self, manager: Manager, operation: Fetch | Ingest | LoadCheckpoint | VerifyCheckpoint) -> OperationDone:
        manager.send(operation)
        return await manager.take(OperationDone, lambda m: m.op == operation.op)

    async def look(self, manager: Manager) -> None:
        """Let the agent read its disk again, by an ingest that comes to nothing."""
        self.looks += 1
        assert (await self.does(manager, Ingest(op=f"look {self.looks}", source=PathSource("/models/m")))).fault is not None

    async def lies(self) -> dict[Tier, TierState]:
        """Where the checkpoint lies, as a manager that dials anew is told."""
        (truth,) = (await self.manager()).truth.checkpoints
        return {each.tier: each.state for each in truth.placements}

    async def spoilt(self, *, loaded: bool = True) -> Manager:
        """A text file of its copy is wrong, so that no worker can be built over it; its image lies in memory, pinned."""
        manager = await self.manager()
        manager.send(SetPins(pins=(PinTo(digest=self.digest, tier=Tier.DRAM),)))
        if loaded:
            assert (await self.does(manager, LoadCheckpoint(op="load", digest=self.digest))).fault is None
        catalog.quarantine(self.local, f"{self.local}/manifest.json: bytes are wrong")
        await self.look(manager)
        return manager

    def start(self, url: str = "", instance: str = "inst_1") -> StartInstance:
        start = start_instance(instance, digest=self.digest)
        return msgspec.structs.replace(start, remote=RemoteCopy(url=url, layout="exec1") if url else None)


async def outcome(manager: Manager, start: StartInstance) -> InstanceTruth:
    """What becomes of a start: ready with all of its weights, or stopped."""

    def over(message: InstanceUpdate) -> bool:
        whole = message.truth.state is InstanceState.READY and message.truth.phases is not None
        return message.truth.instance == start.instance and (whole or message.truth.state is InstanceState.STOPPED)

    return (await manager.take(InstanceUpdate, over)).truth


def loaded(truth: InstanceTruth) -> tuple[Tier, int]:
    assert truth.fault is None
    assert truth.phases is not None
    assert truth.phases.loaded_from is not None
    return truth.phases.loaded_from, truth.phases.loaded_bytes


def rot(store: int, offset_bytes: int) -> None:
    """Change a byte of a store's arena."""
    arena = next(path for path in Path(f"/proc/{store}/fd").iterdir() if "sllmctl-arena" in str(path.readlink()))
    with arena.open("r+b") as memory, mmap.mmap(memory.fileno(), 0) as view:
        view[offset_bytes] ^= 1


@pytest.fixture
async def node() -> AsyncIterator[StoreNode]:
    async with StoreNode() as made:
        yield made


async def test_an_image_stays_while_the_remote_of_a_start_does_not_answer(node: StoreNode) -> None:
    manager = await node.spoilt()
    manager.send(start := node.start(f"file://{node.directory}/nowhere"))
    assert (await outcome(manager, start)).fault is not None
    catalog.release(node.local)  # its text was put right
    assert (await node.does(manager, VerifyCheckpoint(op="verify", digest=node.digest))).fault is None
    assert await node.lies() == SOUND


async def test_an_image_gives_way_to_the_one_that_a_start_has_fetched(node: StoreNode) -> None:
    manager = await node.spoilt()
    manager.send(start := node.start(node.url))
    assert loaded(await outcome(manager, start)) == (Tier.REMOTE, IMAGE_BYTES)
    attach = node.workers[-1].attach
    assert attach is not None
    assert attach.image_id == catalog.read_entry(node.local).manifest.image_id
    (told,) = [message for message in manager.seen if isinstance(message, NodeEvent)]
    assert (told.reason, told.digest) == ("Evicted", node.digest)
    assert told.message == f"from memory, {IMAGE_BYTES} bytes: {OF_NO_USE}"


async def test_a_start_serves_from_the_image_that_lay_there_if_that_is_what_it_fetches(node: StoreNode) -> None:
    shutil.rmtree(node.directory / "remote")
    commit(node.directory / "remote", NUMBER, IMAGE_BYTES)
    manager = await node.spoilt()
    manager.send(start := node.start(node.url))
    assert loaded(await outcome(manager, start)) == (Tier.REMOTE, 0)
    if await node.lies() != SOUND:
        await node.managers[-1].take(PlacementUpdate, lambda m: {p.tier: p.state for p in m.truth.placements} == SOUND)


async def test_an_image_gives_way_to_the_one_that_a_fetch_has_brought(node: StoreNode) -> None:
    manager = await node.spoilt()
    assert (await node.does(manager, Fetch(op="fetch", digest=node.digest, url=node.url, tier=Tier.DRAM))).fault is None
    assert await node.lies() == SOUND


async def test_a_start_does_not_fail_whose_store_dies_before_it_has_dropped_the_old_image(node: StoreNode) -> None:
    manager = await node.spoilt()
    os.kill(node.store_pids[-1], signal.SIGSTOP)
    code = (
        "import os, sys; from schema.link import *\n"
        f"os.rename({str(node.local)!r}, {str(node.directory / 'old')!r})\n"
        f"os.rename({str(node.published)!r}, {str(node.local)!r})\n"
        f"sys.stdout.buffer.write(encode_frame(OperationDone(op=sys.argv[1], digest={node.digest!r})))"
    )
    node.ingest_args = [sys.executable, "-c", code]
    assert (await node.does(manager, Ingest(op="ingest", source=PathSource("/models/m")))).fault is None
    manager.send(start := node.start())
    await manager.take(InstanceUpdate, lambda m: m.truth.state is InstanceState.STARTING)
    os.kill(node.store_pids[-1], signal.SIGKILL)
    assert loaded(await outcome(manager, start)) == (Tier.DISK, IMAGE_BYTES)


async def test_a_start_does_not_wait_for_a_look_to_replace_the_image_that_an_instance_has_left(
    node: StoreNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = await node.manager()
    manager.send(old := node.start())
    assert (await outcome(manager, old)).fault is None
    shutil.rmtree(node.local)
    node.published.rename(node.local)
    await node.look(manager)
    go, real = threading.Event(), catalog.look
    monkeypatch.setattr(catalog, "look", lambda path: go.wait(60) and real(path))
    manager.send(StopInstance(instance=old.instance, epoch=old.epoch))
    await outcome(manager, old)
    manager.send(new := node.start(instance="inst_2"))
    assert loaded(await outcome(manager, new)) == (Tier.DISK, IMAGE_BYTES)
    go.set()


async def test_a_start_waits_for_the_end_of_those_who_use_a_wrong_image_while_it_fetches(node: StoreNode) -> None:
    manager = await node.manager()
    manager.send(old := node.start())
    assert (await outcome(manager, old)).fault is None
    attach = node.workers[-1].attach
    assert attach is not None
    (extent, *_) = attach.extents
    rot(node.store_pids[-1], extent.offset_bytes)
    with (node.local / "partition_0.bin").open("r+b") as file:
        file.write(b"rot")
    assert (await node.does(manager, VerifyCheckpoint(op="verify", digest=node.digest))).fault is not None
    assert await node.lies() == {Tier.DISK: TierState.QUARANTINED, Tier.DRAM: TierState.QUARANTINED}
    manager = node.managers[-1]
    with web_server(node.directory / "remote") as web:
        web.limit_bytes = IMAGE_BYTES // 2
        manager.send(new := node.start(web.url, "inst_2"))
        await manager.take(Progress)
        manager.send(StopInstance(instance=old.instance, epoch=old.epoch))
        await outcome(manager, old)
        web.limit_bytes = NO_LIMIT
        assert loaded(await outcome(manager, new)) == (Tier.REMOTE, IMAGE_BYTES)


async def test_a_pinned_image_stays_between_the_commit_of_its_copy_and_the_look_that_finds_it(
    node: StoreNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = await node.spoilt(loaded=False)
    begun, go = look_held_back(monkeypatch)
    manager.send(Fetch(op="fetch", digest=node.digest, url=node.url, tier=Tier.DRAM))
    await node.until(begun.is_set)
    manager.send(CancelOperation(op="fetch"))
    await manager.take(OperationDone, lambda m: m.op == "fetch")
    go.set()
    monkeypatch.undo()
    await node.look(manager)
    await node.look(manager)
    assert await node.lies() == SOUND
