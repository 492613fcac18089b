"""Ingest, load, drop and reading files: one end each, kept until acknowledged, refused in words."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import msgspec
import pytest

from agent.daemon import zygote
from agent.daemon.pins import Pins
from agent.store import catalog
from agent.store.catalog import mark_verified, quarantine, release, unmark_verified
from schema.checkpoint import LAYOUT, AssetEntry, decode_manifest, encode_manifest
from schema.errors import Fault
from schema.ids import epoch_of
from schema.link import (
    CancelOperation,
    DiskCopy,
    DropCheckpoint,
    Extent,
    FileChunk,
    Ingest,
    InstanceUpdate,
    LoadCheckpoint,
    OperationDone,
    OperationsAcked,
    PinTo,
    PlacementUpdate,
    Progress,
    ReadFile,
    Resident,
    SetPins,
    StopInstance,
    VerifyCheckpoint,
)
from schema.spec import PathSource
from schema.states import InstanceState, Tier, TierState
from tests.agent.daemon.late_look import look_held_back
from tests.agent.daemon.peers import DIGEST, WAIT_S, Manager, Node, alive, make_checkpoint, start_instance

SOURCE = PathSource("/models/m")


def child(node: Node, body: str, *, forked: bool = False) -> None:
    """Let an ingest be this program; it gets the op as its argument. ``forked``: it is a child of the zygote's."""
    prelude = (
        "import os, sys, time\n"
        "from schema.link import *\n"
        "op = sys.argv[1]\n"
        "def say(m):\n    sys.stdout.buffer.write(encode_frame(m)); sys.stdout.buffer.flush()\n"
    )
    arguments = [sys.executable, "-c", prelude + body]
    node.ingest_args, node.forked_args = (["/bin/false"], arguments) if forked else (arguments, [])


def in_quarantine(fault: Fault) -> Fault:
    return Fault(fault.code, f"{fault.message}; the copy is in quarantine")


async def done(manager: Manager, op: str) -> OperationDone:
    return await manager.take(OperationDone, lambda m: m.op == op)


async def test_an_ingest_tells_progress_the_placement_and_its_end(node: Node) -> None:
    manager = await node.manager()
    other = "ef" * 32
    make_checkpoint(node.directory / "made", other)
    there = node.config.checkpoints_path / other
    child(
        node,
        "say(Progress(op=op, stage='convert', done_bytes=1, total_bytes=2))\n"
        f"os.rename({str(node.directory / 'made' / other)!r}, {str(there)!r})\n"
        f"say(OperationDone(op=op, digest={other!r}))\n",
    )
    manager.send(Ingest(op="op_1", source=SOURCE))
    assert (await manager.take(Progress)).stage == "convert"
    placement = (await manager.take(PlacementUpdate)).truth
    assert (placement.digest, placement.image_bytes, placement.kv_token_bytes) == (other, 4096, 32)
    assert [(p.tier, p.state) for p in placement.placements] == [(Tier.DISK, TierState.RESIDENT)]
    assert (await done(manager, "op_1")).digest == other
    child(node, "sys.exit(1)")
    manager.send(Ingest(op="op_1", source=SOURCE))
    assert (await done(manager, "op_1")).digest == other
    again = await node.manager()
    assert [d.op for d in again.truth.done] == ["op_1"]
    assert {c.digest for c in again.truth.checkpoints} == {DIGEST, other}
    again.send(OperationsAcked(ops=("op_1",)))
    assert (await node.manager()).truth.done == ()


FORKED = pytest.mark.parametrize("forked", [False, True])


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("sys.exit(3)", "status 3"),
        ("os.kill(os.getpid(), 9)", "SIGKILL without an answer; ask for it again"),
        ("sys.stdout.write('hello, this is no frame at all')", "frame"),
        ("say(OperationDone(op='another', digest=''))", "another"),
    ],
)
@FORKED
async def test_an_ingest_that_ends_without_an_answer_fails_with_how(
    node: Node, monkeypatch: pytest.MonkeyPatch, body: str, word: str, forked: bool
) -> None:
    monkeypatch.setattr(zygote, "_STATUS_S", WAIT_S)  # it says it surely, if the system does not
    manager = await node.manager()
    child(node, body, forked=forked)
    await node.ready(manager)  # so that there is a zygote that forks
    manager.send(Ingest(op="op_1", source=SOURCE))
    fault = (await done(manager, "op_1")).fault
    assert fault is not None
    assert word in fault.message


@FORKED
async def test_a_cancelled_ingest_is_killed_and_says_so(node: Node, forked: bool) -> None:
    manager = await node.manager()
    say = "say(Progress(op=op, stage=str(os.getpid()), done_bytes=0, total_bytes=0))\ntime.sleep(600)"
    child(node, say, forked=forked)
    await node.ready(manager)
    manager.send(Ingest(op="op_1", source=SOURCE))
    pid = int((await manager.take(Progress)).stage)
    assert {entry["role"] for entry in node.roster()} >= {"ingest"}
    assert (await node.manager()).truth.ops == ("op_1",)
    manager = node.managers[-1]
    manager.send(CancelOperation(op="op_1"))
    fault = (await done(manager, "op_1")).fault
    assert fault is not None
    assert fault.code == "cancelled"
    assert not alive(pid)
    assert "ingest" not in {entry["role"] for entry in node.roster()}


@pytest.mark.parametrize("looks", [False, True])
async def test_a_cancel_comes_too_late_for_an_ingest_that_has_brought_a_checkpoint(
    node: Node, monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    manager = await node.manager()
    other = "ef" * 32
    make_checkpoint(node.directory / "made", other)
    child(
        node,
        f"os.rename({str(node.directory / 'made' / other)!r}, {str(node.config.checkpoints_path / other)!r})\n"
        "told = (Progress(op=op, stage='commit', done_bytes=1, total_bytes=1), "
        f"OperationDone(op=op, digest={other!r}))\n"
        "sys.stdout.buffer.write(b''.join(map(encode_frame, told))); sys.stdout.buffer.flush()\n"
        + ("" if looks else "time.sleep(600)"),
    )
    begun, go = look_held_back(monkeypatch)
    manager.send(Ingest(op="op_1", source=SOURCE))
    await manager.take(Progress, lambda m: m.stage == "commit")
    if looks:  # the disk is just being looked at; else the child has yet to end
        await node.until(begun.is_set)
    manager.send(CancelOperation(op="op_1"))
    ended = await done(manager, "op_1") if looks else None
    go.set()
    told = await manager.take(PlacementUpdate, lambda m: m.truth.digest == other)
    assert [(p.tier, p.state) for p in told.truth.placements] == [(Tier.DISK, TierState.RESIDENT)]
    ended = ended or await done(manager, "op_1")
    assert (ended.digest, ended.fault) == (other, None)


@pytest.mark.parametrize("how", ["killed", "cancelled"])
@pytest.mark.parametrize("there", [True, False])
async def test_what_is_ended_while_it_commits_has_ended_well_if_its_checkpoint_is_there(
    node: Node, how: str, there: bool
) -> None:
    manager = await node.manager()
    other = "ef" * 32
    make_checkpoint(node.directory / "made", other, LAYOUT)
    rename = f"os.rename({str(node.directory / 'made' / other)!r}, {str(node.config.checkpoints_path / other)!r})\n"
    child(
        node,
        f"say(Committing(op=op, digest={other!r}))\nsay(Progress(op=op, stage='ingest', done_bytes=1, total_bytes=1))\n"
        + (rename if there else "")
        + ("os.kill(os.getpid(), 9)" if how == "killed" else "time.sleep(600)"),
    )
    manager.send(Ingest(op="op_1", source=SOURCE))
    if how == "cancelled":
        await node.until((node.config.checkpoints_path / other).exists if there else lambda: True)
        await manager.take(Progress)
        manager.send(CancelOperation(op="op_1"))
    if there:
        told = await manager.take(PlacementUpdate, lambda m: m.truth.digest == other)
        assert [(p.tier, p.state) for p in told.truth.placements] == [(Tier.DISK, TierState.RESIDENT)]
    ended = await done(manager, "op_1")
    assert (ended.digest, ended.fault is None) == ((other, True) if there else ("", False))


async def test_what_an_ingest_tells_of_its_commit_is_believed_though_its_checkpoint_is_there(node: Node) -> None:
    """The disk may have refused to make it durable, and takes that for told."""
    manager = await node.manager()
    other = "ef" * 32
    make_checkpoint(node.directory / "made", other, LAYOUT)
    child(
        node,
        "from schema.errors import Fault\n"
        f"say(Committing(op=op, digest={other!r}))\n"
        f"os.rename({str(node.directory / 'made' / other)!r}, {str(node.config.checkpoints_path / other)!r})\n"
        "say(OperationDone(op=op, fault=Fault('internal', 'Input/output error')))",
    )
    manager.send(Ingest(op="op_1", source=SOURCE))
    ended = await done(manager, "op_1")
    assert (ended.digest, ended.fault) == ("", Fault("internal", "Input/output error"))


async def test_an_ingest_is_forked_by_the_zygote_and_outlives_it(node: Node) -> None:
    manager = await node.manager()
    go_on = node.directory / "go-on"
    body = f"say(Progress(op=op, stage='here', done_bytes=0, total_bytes=0))\nwhile not os.path.exists({str(go_on)!r}):\n    "
    child(node, f"{body}time.sleep(0.01)\nsay(OperationDone(op=op, digest={DIGEST!r}))", forked=True)
    await node.ready(manager)
    manager.send(Ingest(op="op_1", source=SOURCE))
    await manager.take(Progress, lambda m: m.stage == "here")
    (fork,) = node.zygotes[0].ingests
    assert (fork.op, fork.source) == ("op_1", SOURCE)
    os.kill(node.zygotes[0].pid, signal.SIGKILL)
    await node.until(lambda: len(node.zygotes) == 2)
    go_on.touch()
    assert (await done(manager, "op_1")).digest == DIGEST


async def test_an_ingest_waits_for_a_zygote_that_still_imports(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote, "_ABSENT_S", 0.1)
    manager = await node.manager()
    child(node, f"say(OperationDone(op=op, digest={DIGEST!r}))", forked=True)
    await node.ready(manager)
    node.kin_dial = False
    os.kill(node.zygotes[0].pid, signal.SIGKILL)
    first = node.zygotes[0].pid
    await node.until(lambda: any(one["role"] == "zygote" and one["pid"] != first for one in node.roster()))
    (imports,) = [one["pid"] for one in node.roster() if one["role"] == "zygote"]
    manager.send(Ingest(op="op_1", source=SOURCE))
    late = time.monotonic() + 0.5
    await node.until(lambda: time.monotonic() > late)
    node.play("zygote", imports)
    assert (await done(manager, "op_1")).digest == DIGEST
    assert [fork.op for fork in node.zygotes[1].ingests] == ["op_1"]


async def test_a_child_that_nobody_waits_for_any_more_is_ended(node: Node) -> None:
    manager = await node.manager()
    child(node, "time.sleep(600)", forked=True)
    await node.ready(manager)
    node.zygotes[0].answers = False
    manager.send(Ingest(op="op_1", source=SOURCE))
    await node.until(lambda: bool(node.zygotes[0].ingests))
    manager.send(CancelOperation(op="op_1"))
    assert (await done(manager, "op_1")).fault is not None
    node.zygotes[0].fork_ingest(node.zygotes[0].ingests[0])
    await node.until(lambda: not alive(node.pids[-1]))


async def test_a_cancel_of_what_is_not_under_way_is_answered(node: Node) -> None:
    manager = await node.manager()
    manager.send(CancelOperation(op="op_9"))
    assert (await done(manager, "op_9")).fault is not None


async def test_a_load_makes_resident_without_users(node: Node) -> None:
    manager = await node.manager()
    manager.send(LoadCheckpoint(op="op_1", digest=DIGEST))
    assert (await done(manager, "op_1")).fault is None
    store = node.stores[0]
    await store.until(lambda: store.holds.get(DIGEST) == 0)
    assert DIGEST in store.residents


async def test_a_load_that_is_cancelled_lets_go(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    store.answers = False
    manager.send(LoadCheckpoint(op="op_1", digest=DIGEST))
    await store.until(lambda: store.holds.get(DIGEST) == 1 and bool(store.fills))
    assert store.fills[0].priority == 1
    manager.send(CancelOperation(op="op_1"))
    fault = (await done(manager, "op_1")).fault
    assert fault is not None
    assert fault.code == "cancelled"
    await store.until(lambda: store.holds[DIGEST] == 0)


@pytest.mark.parametrize("digest", ["cd" * 32, "../../etc", ""])
async def test_loads_and_drops_of_what_is_not_here_are_refused(node: Node, digest: str) -> None:
    manager = await node.manager()
    manager.send(LoadCheckpoint(op="op_1", digest=digest))
    manager.send(DropCheckpoint(op="op_2", digest=digest, tier=Tier.DISK))
    manager.send(LoadCheckpoint(op="op_3", digest=DIGEST, tier=Tier.REMOTE))
    codes: dict[str, str] = {}
    while len(codes) < 3:
        answer = await manager.take(OperationDone)
        assert answer.fault is not None
        codes[answer.op] = answer.fault.code
    assert codes == {"op_1": "not_found", "op_2": "not_found", "op_3": "invalid_input"}


async def test_a_drop_takes_every_layout_from_the_disk(node: Node) -> None:
    layouts = node.config.checkpoints_path / DIGEST
    for name in ("l2", "l3"):
        shutil.copytree(layouts / "l1", layouts / name)
        manifest = decode_manifest((layouts / name / "manifest.json").read_bytes())
        (layouts / name / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, layout=name)))
    (layouts / "l3" / "manifest.json").write_text("damaged")
    manager = await node.manager()
    manager.send(Ingest(op="look", source=SOURCE))  # which comes to nothing: the agent may have looked before
    assert (await done(manager, "look")).fault is not None
    manager.send(DropCheckpoint(op="op_1", digest=DIGEST, tier=Tier.DISK))
    assert (await manager.take(OperationDone)).fault is None
    assert not layouts.exists()


async def test_what_is_used_is_not_dropped_and_what_is_not_is(node: Node) -> None:
    manager = await node.manager()
    start, _ = await node.ready(manager)
    for number, tier in enumerate((Tier.DRAM, Tier.DISK)):
        manager.send(DropCheckpoint(op=f"op_{number}", digest=DIGEST, tier=tier))
        fault = (await done(manager, f"op_{number}")).fault
        assert fault is not None
        assert fault.code == "conflict"
        assert start.instance in fault.message
    manager.send(StopInstance(instance=start.instance, epoch=start.epoch))
    await manager.instance(InstanceState.STOPPED)
    manager.send(DropCheckpoint(op="op_2", digest=DIGEST, tier=Tier.DRAM))
    assert (await done(manager, "op_2")).fault is None
    manager.send(DropCheckpoint(op="op_3", digest=DIGEST, tier=Tier.DISK))
    update = await manager.take(PlacementUpdate, lambda m: not m.truth.placements)
    assert update.truth.digest == DIGEST
    assert (await done(manager, "op_3")).fault is None
    assert not (node.config.checkpoints_path / DIGEST).exists()
    manager.send(start.__class__(**{f: getattr(start, f) for f in start.__struct_fields__} | {"epoch": epoch_of(1, 50)}))
    truth = await manager.instance(InstanceState.STOPPED)
    assert truth.fault is not None
    assert truth.fault.code == "not_found"


async def test_whether_a_copy_is_verified_is_told_once_a_load_has_found_out(node: Node) -> None:
    """The store writes it beside the copy, behind the agent's back."""
    directory = node.config.checkpoints_path / DIGEST / "l1"
    manager = await node.manager()
    (disk,) = manager.truth.checkpoints[0].placements
    copy = DiskCopy(layout="l1", state=TierState.RESIDENT, verified=False, size_bytes=4096)
    assert disk.copies == (copy,)
    store = node.stores[0]
    store.answers = False

    async def told() -> DiskCopy:
        def changed(message: PlacementUpdate) -> bool:
            return message.truth.placements[0].copies != (copy,)

        return (await manager.take(PlacementUpdate, changed)).truth.placements[0].copies[0]

    manager.send(LoadCheckpoint(op="op_1", digest=DIGEST))
    await store.until(lambda: len(store.fills) == 1)
    mark_verified(directory)
    store.answer(store.fills[0])
    copy = await told()
    assert copy.verified
    manager.send(DropCheckpoint(op="op_2", digest=DIGEST, tier=Tier.DRAM))
    await done(manager, "op_2")
    manager.send(LoadCheckpoint(op="op_3", digest=DIGEST))
    await store.until(lambda: len(store.fills) == 2)
    unmark_verified(directory)
    store.peer.send(OperationDone(op=store.fills[1].op, digest=DIGEST, fault=Fault("internal", "the disk cannot be read")))
    copy = await told()
    assert not copy.verified
    quarantine(directory, "a byte is wrong")
    await node.agent._checkpoints.scan()  # type: ignore[union-attr]
    (disk,) = (await node.manager(2)).truth.checkpoints[0].placements
    assert [(each.state, each.verified) for each in disk.copies] == [(TierState.QUARANTINED, False)]


async def test_a_copy_that_the_store_puts_in_quarantine_is_told_and_not_loaded_again(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    store.answers = False
    manager.send(LoadCheckpoint(op="op_1", digest=DIGEST))
    await store.until(lambda: bool(store.fills))
    quarantine(node.config.checkpoints_path / DIGEST / "l1", "part-0: chunk 0 is wrong")
    fault = Fault("invalid_checkpoint", "part-0: chunk 0 is wrong")
    store.peer.send(OperationDone(op=store.fills[0].op, digest=DIGEST, fault=fault))
    placed = await manager.take(PlacementUpdate, lambda m: m.truth.placements[0].state is TierState.QUARANTINED)
    assert placed.truth.digest == DIGEST
    manager.send(LoadCheckpoint(op="op_2", digest=DIGEST))
    again = (await done(manager, "op_2")).fault
    assert again is not None
    assert "quarantine" in again.message


async def test_a_copy_whose_manifest_is_damaged_is_in_quarantine_verified_replaced_and_removed(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manifest = node.config.checkpoints_path / DIGEST / "l1" / "manifest.json"
    sound = manifest.read_bytes()
    manifest.write_bytes(sound[:-1])
    store.answers = False
    manager.send(LoadCheckpoint(op="op_1", digest=DIGEST))
    await store.until(lambda: bool(store.fills))
    fault = Fault("invalid_checkpoint", f"{manifest}: it is cut short")
    store.peer.send(OperationDone(op=store.fills[0].op, digest=DIGEST, fault=fault))
    truth = (await manager.take(PlacementUpdate, lambda m: m.truth.placements[0].state is TierState.QUARANTINED)).truth
    (placed,) = truth.placements
    assert (truth.architecture, placed.tier) == ("LlamaForCausalLM", Tier.DISK)
    assert 4096 <= placed.size_bytes <= 3 * 4096
    assert str(manifest) in placed.reason
    manager.send(LoadCheckpoint(op="op_2", digest=DIGEST))
    again = (await done(manager, "op_2")).fault
    assert again is not None
    assert "quarantine" in again.message

    manager.send(VerifyCheckpoint(op="op_3", digest=DIGEST))
    await store.until(lambda: bool(store.verifies))
    assert store.verifies[0].directory == f"{DIGEST}/l1"
    manifest.write_bytes(sound)
    store.peer.send(OperationDone(op=store.verifies[0].op, digest=DIGEST))
    (placed,) = (
        await manager.take(PlacementUpdate, lambda m: m.truth.placements[0].state is TierState.RESIDENT)
    ).truth.placements
    assert (await done(manager, "op_3")).read_bytes == 4096

    manifest.write_bytes(b"")
    manager.send(VerifyCheckpoint(op="op_4", digest=DIGEST))
    await store.until(lambda: len(store.verifies) == 2)
    store.peer.send(OperationDone(op=store.verifies[1].op, digest=DIGEST, fault=fault))
    assert (await done(manager, "op_4")).fault == in_quarantine(fault)
    again_manager = await node.manager()
    (checkpoint,) = again_manager.truth.checkpoints
    assert [one.state for one in checkpoint.placements] == [TierState.QUARANTINED]
    again_manager.send(DropCheckpoint(op="op_5", digest=DIGEST, tier=Tier.DISK))
    assert (await done(again_manager, "op_5")).fault is None
    assert not manifest.parent.exists()


async def test_a_small_file_that_a_worker_could_not_use_puts_the_copy_into_quarantine(node: Node) -> None:
    manager = await node.manager()
    directory = node.config.checkpoints_path / DIGEST / "l1"
    index = b"the text side"
    manifest = decode_manifest((directory / "manifest.json").read_bytes())
    assets = (AssetEntry("tokenizer.json", len(index), hashlib.sha256(index).hexdigest()),)
    (directory / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, assets=assets)))
    (directory / "tokenizer.json").write_bytes(index[::-1])
    store = node.stores[0]
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))
    await store.until(lambda: bool(store.verifies))
    store.peer.send(OperationDone(op=store.verifies[0].op, digest=DIGEST))  # it looked before the file went bad
    await done(manager, "op_1")
    node.worker_becomes_ready = False
    manager.send(start_instance())
    await node.until(lambda: bool(node.workers) and node.workers[-1].start is not None)
    fault = Fault("invalid_checkpoint", "tokenizer.json is not what was ingested")
    worker = node.workers[-1]
    worker.peer.send(InstanceUpdate(truth=msgspec.structs.replace(worker.truth(InstanceState.STOPPED), fault=fault)))
    told = await manager.take(PlacementUpdate, lambda m: m.truth.placements[0].state is TierState.QUARANTINED)
    assert str(directory / "tokenizer.json") in told.truth.placements[0].reason
    stopped = await manager.instance(InstanceState.STOPPED)
    assert stopped.fault == fault, "it is told after what the manager plans anew by"


async def test_the_manifest_is_read_in_parts(node: Node) -> None:
    manager = await node.manager()
    manager.send(ReadFile(op="r", digest=DIGEST, file="manifest.json"))
    chunk = await manager.take(FileChunk)
    assert chunk.size_bytes == len(chunk.data)
    assert decode_manifest(chunk.data).digest == DIGEST
    manager.send(ReadFile(op="r", digest=DIGEST, file="manifest.json", offset_bytes=10))
    assert (await manager.take(FileChunk)).data == chunk.data[10:]
    manager.send(ReadFile(op="r", digest=DIGEST, file="manifest.json", offset_bytes=1 << 40))
    assert (await manager.take(FileChunk)).data == b""


@pytest.mark.parametrize("file", ["part-0", "../l1/manifest.json", "/etc/passwd", "", "tokenizer.json"])
async def test_other_files_are_not_read(node: Node, file: str) -> None:
    manager = await node.manager()
    manager.send(ReadFile(op="r", digest=DIGEST, file=file))
    chunk = await manager.take(FileChunk)
    assert chunk.fault is not None
    assert chunk.fault.code == "not_found"
    assert chunk.data == b""


async def test_a_verification_is_the_stores_and_what_it_found_is_told_before_its_end(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))
    await store.until(lambda: bool(store.verifies))
    asked = store.verifies[0]
    directory = node.config.checkpoints_path / asked.directory
    store.peer.send(Progress(op=asked.op, stage="verify disk", done_bytes=1, total_bytes=4096))
    told = await manager.take(Progress)
    assert (told.op, told.stage) == ("op_1", "verify disk")
    why = f"{directory}/partition_0.bin: the 4096 bytes at offset 0 are not what was ingested"
    quarantine(directory, why)
    store.peer.send(OperationDone(op=asked.op, digest=DIGEST, fault=Fault("invalid_checkpoint", why)))
    (placement,) = (await manager.take(PlacementUpdate)).truth.placements
    assert (placement.tier, placement.state, placement.reason) == (Tier.DISK, TierState.QUARANTINED, why)
    assert (await done(manager, "op_1")).fault == in_quarantine(Fault("invalid_checkpoint", why))
    manager.send(VerifyCheckpoint(op="op_2", digest=DIGEST))
    await store.until(lambda: len(store.verifies) == 2)
    release(directory)
    store.peer.send(OperationDone(op=store.verifies[1].op, digest=DIGEST))
    (placement,) = (await manager.take(PlacementUpdate)).truth.placements
    assert (placement.state, placement.reason) == (TierState.RESIDENT, "")
    assert (await done(manager, "op_2")).fault is None


async def test_a_verification_is_asked_again_of_the_next_store_and_given_up_when_cancelled(node: Node) -> None:
    manager = await node.manager()
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))
    await node.stores[0].until(lambda: bool(node.stores[0].verifies))
    node.stores[0].kill()
    await node.until(lambda: len(node.stores) == 2 and bool(node.stores[1].verifies))
    store = node.stores[1]
    manager.send(CancelOperation(op="op_1"))
    fault = (await done(manager, "op_1")).fault
    assert fault is not None
    assert fault.code == "cancelled"
    await store.until(lambda: store.cancelled == [store.verifies[0].op])


async def test_a_verification_of_what_is_not_here_is_refused(node: Node) -> None:
    manager = await node.manager()
    manager.send(VerifyCheckpoint(op="op_1", digest="cd" * 32))
    fault = (await done(manager, "op_1")).fault
    assert fault is not None
    assert fault.code == "not_found"


async def test_a_bad_image_is_in_quarantine_and_the_next_store_hears_of_it(node: Node) -> None:
    manager = await node.manager()
    await node.ready(manager)
    store = node.stores[0]
    bad = Resident(digest=DIGEST, extents=(Extent(0, 4096),), image_bytes=4096, users=1, condemned="it is wrong")
    store.peer.send(bad)
    told = await manager.take(PlacementUpdate, lambda m: m.truth.placements[-1].state is TierState.QUARANTINED)
    assert told.truth.placements[-1].tier is Tier.DRAM
    assert told.truth.placements[-1].reason == "it is wrong"
    store.kill()
    await node.until(lambda: len(node.stores) == 2 and node.stores[1].condemned.get(DIGEST) == "it is wrong")


async def test_weights_in_memory_start_instances_though_the_copy_on_disk_went_bad(node: Node) -> None:
    manager = await node.manager()
    manager.send(LoadCheckpoint(op="op_1", digest=DIGEST))
    assert (await done(manager, "op_1")).fault is None
    directory = next((node.config.checkpoints_path / DIGEST).iterdir())
    quarantine(directory, f"{directory}/partition_0.bin: bytes are wrong")
    manager.send(VerifyCheckpoint(op="op_2", digest=DIGEST))
    store = node.stores[0]
    await store.until(lambda: bool(store.verifies))
    store.peer.send(OperationDone(op=store.verifies[0].op, digest=DIGEST, fault=Fault("invalid_checkpoint", "wrong")))
    await done(manager, "op_2")
    await node.ready(manager)
    manager = await node.manager()
    states = {one.tier: one.state for one in manager.truth.checkpoints[0].placements}
    assert states == {Tier.DISK: TierState.QUARANTINED, Tier.DRAM: TierState.RESIDENT}


async def test_pins_reach_every_store_and_outlast_agent_and_manager(node: Node) -> None:
    manager = await node.manager()
    await node.stores[0].until(lambda: node.stores[0].pinned == ())
    pins = (PinTo(digest=DIGEST, tier=Tier.DRAM), PinTo(digest=DIGEST, tier=Tier.DISK))
    for _ in range(2):
        manager.send(SetPins(pins=pins))
    await node.stores[0].until(lambda: node.stores[0].pinned == (DIGEST,))
    node.stores[0].kill()
    await node.until(lambda: len(node.stores) == 2 and node.stores[1].pinned == (DIGEST,))
    manager.send(DropCheckpoint(op="op_1", digest=DIGEST, tier=Tier.DISK))
    fault = (await done(manager, "op_1")).fault
    assert fault is not None
    assert fault.code == "conflict"
    path = node.config.checkpoints_path.parent / "pins.json"
    await node.until(path.exists)
    kept = Pins(path)
    kept.load()
    assert kept.tiers(DIGEST) == {Tier.DRAM, Tier.DISK}
    manager.send(SetPins())
    manager.send(DropCheckpoint(op="op_2", digest=DIGEST, tier=Tier.DISK))
    assert (await done(manager, "op_2")).fault is None


def test_a_file_of_pins_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    path = tmp_path / "pins.json"
    for content in (b"", b"{", b'[{"digest": 3}]', b"\xff"):
        path.write_bytes(content)
        pins = Pins(path)
        pins.load()
        assert pins.on(Tier.DRAM) == ()


def resident(image_id: str, users: int = 0) -> Resident:
    return Resident(digest=DIGEST, image_id=image_id, extents=(Extent(0, 4096),), image_bytes=4096, users=users)


def second_copy(node: Node, layout: str) -> tuple[Path, str]:
    """Another copy of the checkpoint on the disk, and its image's id."""
    directory = make_checkpoint(node.config.checkpoints_path, layout=layout)
    return directory, decode_manifest((directory / "manifest.json").read_bytes()).image_id


async def test_of_two_copies_the_one_that_lies_in_memory_is_started_from(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    directory, image_id = second_copy(node, "l2")
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))  # so that the disk is read again
    await store.until(lambda: bool(store.verifies))
    manager.send(CancelOperation(op="op_1"))
    await done(manager, "op_1")
    store.residents[DIGEST] = resident(image_id)
    store.peer.send(store.residents[DIGEST])
    await manager.take(PlacementUpdate, lambda m: len(m.truth.placements) == 2)
    manager.send(start_instance())
    await store.until(lambda: bool(store.fills))
    assert (store.fills[0].directory, store.fills[0].image_id) == (f"{DIGEST}/l2", image_id)
    await node.until(lambda: bool(node.workers) and node.workers[0].start is not None)
    assert node.workers[0].directories == (str(directory),)


async def judge(node: Node, number: int, fault: Fault | None) -> str:
    """The store's answer to what it was asked to verify as its ``number``-th; the layout that it was."""
    store = node.stores[-1]
    await store.until(lambda: len(store.verifies) > number)
    asked = store.verifies[number]
    directory = node.config.checkpoints_path / asked.directory
    if fault is not None and fault.code == "invalid_checkpoint":
        quarantine(directory, fault.message)
    store.peer.send(OperationDone(op=asked.op, digest=DIGEST, fault=fault))
    return directory.name


async def test_every_copy_is_verified_a_damaged_one_too_and_each_bad_one_is_named(node: Node) -> None:
    manager = await node.manager()
    second_copy(node, "l2")
    damaged, _ = second_copy(node, "l3")
    (damaged / "manifest.json").write_bytes(b"{")
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))
    wrong, unreadable = Fault("invalid_checkpoint", "part-0 is wrong"), Fault("invalid_checkpoint", "it is cut short")
    judged = [await judge(node, number, fault) for number, fault in enumerate([None, wrong, unreadable])]
    assert judged == ["l1", "l2", "l3"]
    told = "l2 (part-0 is wrong; the copy is in quarantine); l3 (it is cut short; the copy is in quarantine)"
    assert (await done(manager, "op_1")).fault == Fault("invalid_checkpoint", f"2 of 3 copies: {told}")


async def test_a_copy_that_could_not_be_read_is_named_beside_one_that_is_wrong(node: Node) -> None:
    manager = await node.manager()
    second_copy(node, "l2")
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))
    await judge(node, 0, Fault("internal", "Input/output error"))
    await judge(node, 1, Fault("invalid_checkpoint", "part-0 is wrong"))
    told = "2 of 2 copies: l1 (Input/output error); l2 (part-0 is wrong; the copy is in quarantine)"
    assert (await done(manager, "op_1")).fault == Fault("invalid_checkpoint", told)


async def test_a_copy_that_stays_in_quarantine_though_it_is_right_is_told(node: Node) -> None:
    manager = await node.manager()
    quarantine(node.config.checkpoints_path / DIGEST / "l1", "part-0 is wrong")
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))
    await judge(node, 0, None)  # the store could not take the mark away
    fault = (await done(manager, "op_1")).fault
    assert fault == Fault("internal", "its bytes are right, but it is in quarantine still: part-0 is wrong")


async def test_what_the_agent_could_not_write_down_of_a_copy_ends_when_that_is_found_right(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = await node.manager()
    directory = node.config.checkpoints_path / DIGEST / "l1"

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as failing:
        failing.setattr(Path, "write_text", fail)
        assert not catalog.mark(quarantine, directory, catalog.identity(directory), "tokenizer.json is wrong")
    assert catalog.read_entry(directory).quarantined == "tokenizer.json is wrong"
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))
    await judge(node, 0, None)
    assert (await done(manager, "op_1")).fault is None
    assert catalog.read_entry(directory).quarantined is None


async def test_what_was_found_of_one_copy_counts_though_the_verification_of_the_next_is_cancelled(node: Node) -> None:
    manager = await node.manager()
    second_copy(node, "l2")
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))
    await judge(node, 0, Fault("invalid_checkpoint", "part-0 is wrong"))
    placed = await manager.take(PlacementUpdate)
    assert "copy l1 is in quarantine: part-0 is wrong" in placed.truth.placements[0].reason
    await node.stores[0].until(lambda: len(node.stores[0].verifies) == 2)
    manager.send(CancelOperation(op="op_1"))
    assert (await done(manager, "op_1")).fault == Fault("cancelled", "the operation was cancelled")
    manager.send(LoadCheckpoint(op="op_2", digest=DIGEST))
    assert (await done(manager, "op_2")).fault is None
    assert node.stores[0].fills[0].directory == f"{DIGEST}/l2"


async def test_what_an_earlier_agent_asked_of_one_copy_is_no_answer_for_another(node: Node) -> None:
    manager = await node.manager()
    second_copy(node, "l2")
    store = node.stores[0]
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))
    await judge(node, 0, None)
    await judge(node, 1, None)
    await done(manager, "op_1")
    first, second = (asked.op for asked in store.verifies)
    manager.send(OperationsAcked(ops=("op_1",)))
    manager.send(VerifyCheckpoint(op="op_1", digest=DIGEST))  # as after a restart of the agent, in the midst of the second
    await store.until(lambda: len(store.verifies) == 3)
    assert store.verifies[2].op == first
    store.peer.send(OperationDone(op=second, digest=DIGEST))
    await judge(node, 2, Fault("invalid_checkpoint", "it is wrong"))
    await judge(node, 3, None)
    fault = (await done(manager, "op_1")).fault
    assert fault is not None
    assert fault.message.startswith("1 of 2 copies: l1 (it is wrong")


async def test_an_image_that_no_copy_on_the_disk_has_goes_once_nobody_uses_it(node: Node) -> None:
    manager = await node.manager()
    store = node.stores[0]
    store.residents[DIGEST] = resident("9" * 32)
    store.peer.send(store.residents[DIGEST])
    await store.until(lambda: not store.residents)
    manager.send(LoadCheckpoint(op="op_1", digest=DIGEST))
    assert (await done(manager, "op_1")).fault is None
    assert store.fills[0].image_id == store.residents[DIGEST].image_id != "9" * 32


async def test_an_image_left_by_a_fetch_that_came_to_nothing_goes(node: Node) -> None:
    await node.manager()
    store = node.stores[0]
    left = "ab" * 32
    store.residents[left] = msgspec.structs.replace(resident("9" * 32), digest=left)
    store.peer.send(store.residents[left])
    await store.until(lambda: not store.residents)
