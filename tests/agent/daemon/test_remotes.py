"""Publish and fetch as the agent carries them out: a child that publishes, a store that fetches, one end each."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from agent.config import NodeConfig
from agent.daemon import operations
from agent.store.catalog import quarantine
from schema.checkpoint import decode_manifest, encode_manifest
from schema.errors import Fault
from schema.link import (
    CancelOperation,
    DropCheckpoint,
    Extent,
    Fetch,
    Fetching,
    FetchStored,
    LoadCheckpoint,
    OperationDone,
    Placement,
    PlacementUpdate,
    Progress,
    Publish,
    Resident,
)
from schema.states import Tier, TierState
from tests.agent.daemon.late_look import look_held_back
from tests.agent.daemon.peers import DIGEST, Manager, Node, make_checkpoint

OTHER = "ef" * 32


async def done(manager: Manager, op: str) -> OperationDone:
    return await manager.take(OperationDone, lambda m: m.op == op)


def right(directory: Path) -> bytes:
    """Give the copy the checksum of what is in it; its manifest."""
    path = directory / "manifest.json"
    sum_ = xxhash.xxh3_64_intdigest((directory / "part-0").read_bytes())
    path.write_bytes(path.read_bytes().replace(b"[\n    0\n   ]", b"[%d]" % sum_))
    data = encode_manifest(decode_manifest(path.read_bytes()))
    assert str(sum_).encode() in data
    return path.read_bytes()


@pytest.mark.slow
async def test_a_publish_is_a_child_of_the_agent(node: Node, tmp_path: Path) -> None:
    manifest = right(node.config.checkpoints_path / DIGEST / "l1")
    (Path(node.config.run_dir) / "node.json").write_bytes(msgspec.json.encode(node.config))  # as the agent's process does
    manager = await node.manager()
    manager.send(Publish(op="op_1", digest=DIGEST, url=f"file://{tmp_path}/share"))
    fault = (await done(manager, "op_1")).fault
    assert fault is not None
    assert fault.code == "not_found"
    assert "mount the share" in fault.message
    (tmp_path / "share").mkdir()
    manager.send(Publish(op="op_2", digest=DIGEST, url=f"file://{tmp_path}/share"))
    end = await done(manager, "op_2")
    assert (end.fault, end.digest, end.layout, end.read_bytes) == (None, DIGEST, "l1", 4096)
    assert (tmp_path / "share" / DIGEST / "l1" / "manifest.json").read_bytes() == manifest
    for url, digest, code in (
        (f"file://{tmp_path}/share", OTHER, "not_found"),
        ("http://127.0.0.1:9", DIGEST, "unreachable"),
        ("nonsense", DIGEST, "invalid_input"),
    ):
        manager.send(Publish(op=f"op {url}", digest=digest, url=url))
        fault = (await done(manager, f"op {url}")).fault
        assert fault is not None
        assert fault.code in (code, "invalid_input"), fault


async def test_a_publish_keeps_its_copy_on_the_disk_and_nothing_in_memory(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def publishes(config: NodeConfig, message: Publish, *_: Any) -> OperationDone:
        begun.set()
        await go.wait()
        return OperationDone(op=message.op, digest=message.digest)

    monkeypatch.setattr(operations, "run_publish", publishes)
    manager = await node.manager()
    manager.send(LoadCheckpoint(op="op_1", digest=DIGEST))
    assert (await done(manager, "op_1")).fault is None
    manager.send(Publish(op="op_2", digest=DIGEST, url="s3://b/c"))
    await begun.wait()
    manager.send(DropCheckpoint(op="op_3", digest=DIGEST, tier=Tier.DISK))
    fault = (await done(manager, "op_3")).fault
    assert fault is not None
    assert (fault.code, "op_2" in fault.message) == ("conflict", True)
    manager.send(DropCheckpoint(op="op_4", digest=DIGEST, tier=Tier.DRAM))
    assert (await done(manager, "op_4")).fault is None
    go.set()
    assert (await done(manager, "op_2")).fault is None
    manager.send(DropCheckpoint(op="op_5", digest=DIGEST, tier=Tier.DISK))
    assert (await done(manager, "op_5")).fault is None


async def test_a_fetch_is_the_stores_and_its_copy_is_told_before_its_end(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(Fetch(op="op_1", digest=OTHER, url="s3://b/c", layout="l1"))
    await store.until(lambda: bool(store.fetches))
    assert store.fetches == [FetchStored(op="op_1", digest=OTHER, url="s3://b/c", layout="l1")]
    store.peer.send(Progress(op="op_1", stage="fetch", done_bytes=1, total_bytes=4096))
    assert (await manager.take(Progress)).stage == "fetch"
    make_checkpoint(node.config.checkpoints_path, OTHER)
    store.peer.send(OperationDone(op="op_1", digest=OTHER, layout="l1", read_bytes=1024))
    truth = (await manager.take(PlacementUpdate, lambda m: m.truth.digest == OTHER)).truth
    assert [(p.tier, p.state) for p in truth.placements] == [(Tier.DISK, TierState.RESIDENT)]
    end = await done(manager, "op_1")
    assert (end.fault, end.layout, end.read_bytes) == (None, "l1", 1024)
    manager.send(Fetch(op="op_2", digest=OTHER, url="s3://b/c"))  # it is here, which tells nothing of that remote
    end = await done(manager, "op_2")
    assert (end.layout, end.read_bytes) == ("", 0)
    quarantine(node.config.checkpoints_path / OTHER / "l1", "a test")
    manager.send(DropCheckpoint(op="op_3", digest=OTHER, tier=Tier.DISK))
    await done(manager, "op_3")
    manager.send(Fetch(op="op_4", digest=OTHER, url="s3://b/c"))
    await store.until(lambda: len(store.fetches) == 2)
    store.peer.send(OperationDone(op="op_4", digest=OTHER, fault=Fault("unreachable", "down")))
    assert (await done(manager, "op_4")).fault == Fault("unreachable", "down")


async def test_a_fetch_to_memory_loads_what_came(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(Fetch(op="op_1", digest=OTHER, url="s3://b/c", tier=Tier.DRAM))
    await store.until(lambda: bool(store.fetches))
    assert (store.fetches[0].in_memory, store.fetches[0].users) == (True, 1)
    make_checkpoint(node.config.checkpoints_path, OTHER)
    store.peer.send(OperationDone(op="op_1", digest=OTHER, layout="l1", read_bytes=1024))
    end = await done(manager, "op_1")
    assert (end.fault, end.read_bytes) == (None, 1024)
    assert [fill.digest for fill in store.fills] == [OTHER]


def fetching(*, in_memory: bool = True) -> Fetching:
    return Fetching(op="op_1", digest=OTHER, layout="l1", directory="partial/x", in_memory=in_memory, image_bytes=8192)


async def test_what_comes_to_memory_by_a_fetch_is_stated_as_filling_until_that_ends(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(Fetch(op="op_1", digest=OTHER, url="s3://b/c", tier=Tier.DRAM))
    await store.until(lambda: bool(store.fetches))
    store.peer.send(fetching())
    filling = Placement(tier=Tier.DRAM, state=TierState.FILLING, size_bytes=8192, users=1)
    told = await manager.take(PlacementUpdate, lambda m: m.truth.digest == OTHER and m.truth.placements != ())
    assert (told.truth.placements, told.truth.image_bytes) == ((filling,), 8192)
    manager = await node.manager(2)
    (truth,) = [one for one in manager.truth.checkpoints if one.digest == OTHER]
    assert truth.placements == (filling,), "a manager that comes later hears of it too"
    store.peer.send(fetching(in_memory=False))  # as a store says that came after it and has no room
    told = await manager.take(PlacementUpdate, lambda m: m.truth.digest == OTHER)
    assert told.truth.placements == ()
    store.peer.send(fetching())
    told = await manager.take(PlacementUpdate, lambda m: m.truth.digest == OTHER)
    assert told.truth.placements == (filling,)
    manager.send(CancelOperation(op="op_1"))
    await manager.take(PlacementUpdate, lambda m: m.truth.digest == OTHER and not m.truth.placements)
    await done(manager, "op_1")
    assert OTHER not in {one.digest for one in (await node.manager(3)).truth.checkpoints}


async def test_a_fetch_is_asked_again_of_the_next_store_and_given_up_when_cancelled(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(Fetch(op="op_1", digest=OTHER, url="s3://b/c"))
    await store.until(lambda: bool(store.fetches))
    store.kill()
    await node.until(lambda: len(node.stores) == 2)
    store = node.stores[1]
    await store.until(lambda: bool(store.fetches))
    assert store.fetches[0].op == "op_1"
    manager.send(CancelOperation(op="op_1"))
    await store.until(lambda: "op_1" in store.cancelled)
    fault = (await done(manager, "op_1")).fault
    assert fault is not None
    assert fault.code == "cancelled"


async def test_what_a_cancelled_fetch_has_brought_after_all_is_told(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(Fetch(op="op_1", digest=OTHER, url="s3://b/c", tier=Tier.DRAM))
    await store.until(lambda: bool(store.fetches) and store.holds.get(OTHER) == 1)
    manager.send(CancelOperation(op="op_1"))
    await store.until(lambda: "op_1" in store.cancelled and store.holds[OTHER] == 0)
    await done(manager, "op_1")
    make_checkpoint(node.config.checkpoints_path, OTHER)
    store.peer.send(OperationDone(op="", digest=OTHER, layout="l1"))
    store.peer.send(Resident(digest=OTHER, extents=(Extent(0, 4096),), image_bytes=4096))
    told = await manager.take(PlacementUpdate, lambda m: m.truth.digest == OTHER and len(m.truth.placements) == 2)
    assert (told.truth.architecture, told.truth.kv_token_bytes) == ("LlamaForCausalLM", 32)
    assert [(p.tier, p.state) for p in told.truth.placements] == [
        (Tier.DISK, TierState.RESIDENT), (Tier.DRAM, TierState.RESIDENT)
    ]  # fmt: skip


async def test_what_a_fetch_has_brought_that_is_cancelled_while_the_disk_is_looked_at_is_told(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(Fetch(op="op_1", digest=OTHER, url="s3://b/c"))
    await store.until(lambda: bool(store.fetches))
    make_checkpoint(node.config.checkpoints_path, OTHER)
    begun, go = look_held_back(monkeypatch)
    store.peer.send(OperationDone(op="op_1", digest=OTHER, layout="l1"))
    await node.until(begun.is_set)
    manager.send(CancelOperation(op="op_1"))
    fault = (await done(manager, "op_1")).fault
    assert fault is not None
    assert fault.code == "cancelled"
    go.set()
    told = await manager.take(PlacementUpdate, lambda m: m.truth.digest == OTHER)
    assert [(p.tier, p.state) for p in told.truth.placements] == [(Tier.DISK, TierState.RESIDENT)]


async def test_a_fetch_that_nobody_asked_this_agent_for_is_given_up_and_keeps_what_came(node: Node) -> None:
    manager = await node.manager()
    manager.send(Fetch(op="op_1", digest=OTHER, url="s3://b/c"))
    await node.stores[0].until(lambda: bool(node.stores[0].fetches))
    node.store_fetching = ("op_1", "op_0")
    node.stores[0].kill()
    await node.until(lambda: len(node.stores) == 2)
    store = node.stores[1]
    await store.until(lambda: bool(store.fetches))
    assert (store.cancelled, store.kept) == (["op_0"], ["op_0"])
