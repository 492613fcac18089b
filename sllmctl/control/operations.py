"""What operators ask of checkpoints: brought into memory, verified, dropped; each an operation of one node, with one end.

They are live only: a node goes on with them while its manager is away, and a manager that was restarted ends those that it does
not know. Over a broken link they last: what a node's next truth does not know of is asked for again, under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass

from schema.admin import OperationKind
from schema.errors import Cancelled, Conflict, Fault, NotFound, OutOfSpace, Unreachable
from schema.link import (
    CancelOperation,
    DropCheckpoint,
    Fetch,
    LoadCheckpoint,
    NodeTruth,
    OperationDone,
    OperationsAcked,
    Publish,
    VerifyCheckpoint,
)
from schema.states import NodeState, Tier, TierState
from sllmctl.cluster.records import Checkpoint, Node, Operation, PlacementRecord
from sllmctl.control import disk, remotes
from sllmctl.control.events import EndOperation, Operate
from sllmctl.control.references import checkpoint_called, missing, node_called
from sllmctl.control.turn import Turn

__all__ = ["begin", "cancel", "done", "restate", "told_again"]

_DROPPED = (Tier.DEVICE, Tier.DRAM, Tier.DISK)
"""The tiers that a checkpoint can be dropped from, in the order in which that is done."""
_NO_REMOTES = (OutOfSpace.code, Cancelled.code, Conflict.code)
"""Faults of a fetch that every remote would meet."""
_KEPT = 1000
"""So many operations are remembered."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an operation works: a tier of a node and, on the device tier, which of its devices."""

    node: Node
    tier: Tier
    device: int = 0


def begin(turn: Turn, event: Operate) -> None:
    """Begin the operations that were asked for: all of them, or none. Raises NotFound, Conflict, InvalidInput."""
    fetching = event.kind == "fetch"
    checkpoint = remotes.called(turn, event) if fetching else checkpoint_called(turn.view, event.reference)
    node = node_called(turn.view, event.node) if event.node is not None else None
    match event.kind:
        case "prefetch":
            places = [_prefetch_place(turn, checkpoint, node, event.tier)]
        case "verify":
            places = _verify_places(turn, checkpoint, node)
        case "publish":
            places = [_Place(remotes.publisher(turn, checkpoint, node), Tier.REMOTE)]
        case "fetch":
            places = [_Place(remotes.fetcher(turn, checkpoint, node, event.tier), event.tier or Tier.DISK)]
        case _:
            places = _drop_places(turn, checkpoint, node, event.tier)
    url, layout = remotes.address(turn, checkpoint.digest, event) if event.kind in ("publish", "fetch") else ("", "")
    for place in places:
        _begin(turn, event, checkpoint, place, url, layout)


def cancel(turn: Turn, event: EndOperation) -> None:
    """End an operation early; its node says when. Raises NotFound, Conflict for one that has ended, and for a removal."""
    operation = turn.view.operations.get(event.id)
    if operation is None:
        raise missing("operation", event.id)
    if operation.ended_at is not None:
        raise Conflict(f"operation {operation.id} has ended")
    if operation.kind == "drop":
        raise Conflict(f"operation {operation.id} is a removal, which is not ended half way")
    operation.cancelled = True
    if turn.view.nodes[operation.node].state is NodeState.READY:
        turn.send(operation.node, CancelOperation(op=operation.id))


def done(turn: Turn, said: OperationDone) -> bool:
    """An operation has ended; False if it was none of an operator's."""
    operation = turn.view.operations.get(said.op)
    if operation is None:
        return False
    if operation.ended_at is None and not _fetch_again(turn, operation, said) and not _fetch_elsewhere(turn, operation, said):
        # What somebody else dropped in the meantime is gone, as was asked for.
        operation.read_bytes, operation.note = said.read_bytes, said.note
        gone = operation.kind == "drop" and said.fault is not None and said.fault.code == NotFound.code
        _end(turn, operation, None if gone else said.fault)
        if operation.url and said.fault is None:
            remotes.note(turn, operation, said.layout)
        elif said.fault is not None and _remote_failed(turn, operation):
            remotes.doubt(turn, operation.digest, operation.url, said.fault)
    return True


def _fetch_again(turn: Turn, operation: Operation, said: OperationDone) -> bool:
    """A fetch would have passed the disk's budget: ask again, once, without what can be had again, if that will do."""
    fault = said.fault
    if operation.kind != "fetch" or fault is None or not fault.short_bytes or operation.made_room or operation.cancelled:
        return False
    if not disk.make_room(turn, operation.node, fault.short_bytes, f"checkpoint {operation.digest[:16]}"):
        return False
    operation.made_room = True
    _try_again(turn, operation, fault)
    return True


def _fetch_elsewhere(turn: Turn, operation: Operation, said: OperationDone) -> bool:
    """A fetch has failed at a remote that nobody named: ask the next one that has the checkpoint."""
    fault = said.fault
    if fault is None or not operation.others or operation.cancelled or fault.code in _NO_REMOTES:
        return False
    if not _remote_failed(turn, operation):
        return False
    remotes.doubt(turn, operation.digest, operation.url, fault)
    where = _where(turn, operation)
    (operation.url, operation.layout), *others = operation.others
    operation.others = tuple(others)
    told = f"{where}: {fault.message}; trying {operation.url}"
    turn.event("checkpoint", operation.digest, "FetchFailed", told, level="warning")
    _try_again(turn, operation, fault)
    return True


def _remote_failed(turn: Turn, operation: Operation) -> bool:
    """A fetch has failed: True if at its remote, False if its node has the checkpoint on the disk and could not load it."""
    here = operation.copied or operation.node in turn.view.nodes_with(operation.digest, Tier.DISK)
    return operation.kind == "fetch" and not here


def _try_again(turn: Turn, operation: Operation, fault: Fault) -> None:
    """Ask for the next try of a fetch, under the same name: the node has to forget the end of the last one first."""
    operation.tried = fault
    turn.send(operation.node, OperationsAcked(ops=(operation.id,)))
    _send(turn, operation)


def told_again(turn: Turn, said: OperationDone) -> bool:
    """True if a node's truth tells the end of a try that the next one was asked for after already, as that was lost with the
    link: it is no end of the next one, which `restate` asks for again."""
    operation = turn.view.operations.get(said.op)
    if operation is None or operation.ended_at is not None or said.fault is None or said.fault != operation.tried:
        return False
    if said.fault.short_bytes:
        operation.made_room = False  # what was to be dropped may not have been heard of either
    turn.send(operation.node, OperationsAcked(ops=(operation.id,)))
    return True


def restate(turn: Turn, node: Node, truth: NodeTruth) -> set[str]:
    """A node has stated what it does: ask again for what it does not know of. Returns what is still to be done there."""
    wanted = set()
    for operation in turn.view.operations.values():
        if operation.node == node.id and operation.ended_at is None:
            wanted.add(operation.id)
            _note_load(turn, operation)
            if operation.cancelled:
                turn.send(node.id, CancelOperation(op=operation.id))
            elif operation.id not in truth.ops:
                _send(turn, operation)
    return wanted


def _begin(turn: Turn, event: Operate, checkpoint: Checkpoint, place: _Place, url: str, layout: str) -> None:
    node = place.node
    op = turn.core.ids("op")
    known = turn.view.operations
    operation = Operation(
        op, event.ticket, event.kind, checkpoint.digest, node.id, place.tier, checkpoint.image_bytes, turn.now,
        url=url, layout=layout, others=remotes.others(turn, checkpoint.digest, event, url), device=place.device,
    )  # fmt: skip
    known[op] = operation
    for old in [old for old in known.values() if old.ended_at is not None][: max(0, len(known) - _KEPT)]:
        del known[old.id]
    if node.state is not NodeState.READY:
        _end(turn, operation, Fault.of(Unreachable(f"node {node.name} is {node.state.value}")))
        return
    turn.event("checkpoint", checkpoint.digest, _BEGUN[event.kind], f"{_where(turn, operation)}, as an operator asked")
    _note_load(turn, operation)
    _send(turn, operation)


_BEGUN: dict[OperationKind, str] = {
    "prefetch": "Prefetching", "verify": "Verifying", "drop": "Dropping", "publish": "Publishing", "fetch": "Fetching",
}  # fmt: skip
_ENDED: dict[OperationKind, str] = {
    "prefetch": "Prefetched", "verify": "Verified", "drop": "Dropped", "publish": "Published", "fetch": "Fetched",
}  # fmt: skip


def _send(turn: Turn, operation: Operation) -> None:
    op, digest = operation.id, operation.digest
    match operation.kind:
        case "prefetch":
            turn.send(operation.node, LoadCheckpoint(op=op, digest=digest, tier=operation.tier, device=operation.device))
        case "verify":
            turn.send(operation.node, VerifyCheckpoint(op=op, digest=digest))
        case "publish":
            turn.send(operation.node, Publish(op=op, digest=digest, url=operation.url))
        case "fetch":
            url, layout = operation.url, operation.layout
            operation.copied = operation.node in turn.view.nodes_with(digest, Tier.DISK)
            turn.send(operation.node, Fetch(op=op, digest=digest, url=url, layout=layout, tier=operation.tier))
        case _:
            turn.send(operation.node, DropCheckpoint(op=op, digest=digest, tier=operation.tier))


def _note_load(turn: Turn, operation: Operation) -> None:
    """A load takes its share of the node's disk, as those do that are read ahead unasked."""
    core, op = turn.core, operation.id
    if operation.kind == "prefetch" and op not in core.prefetches and operation.digest in turn.view.checkpoints:
        node = turn.view.nodes[operation.node]
        core.prefetches[op] = (node.id, operation.digest)
        turn.touch(operation.digest, node.id)
        core.estimates.began(op, node, turn.view.checkpoints[operation.digest], (), Tier.DISK, "", turn.now)


def _end(turn: Turn, operation: Operation, fault: Fault | None) -> None:
    operation.ended_at, operation.fault = turn.now, fault
    where = _where(turn, operation)
    if fault is None:
        told = f"{where}; {operation.note}" if operation.note else where
        level = "warning" if operation.note else "info"
        turn.event("checkpoint", operation.digest, _ENDED[operation.kind], told, level=level)
    else:
        reason = f"{operation.kind.capitalize()}Failed"
        turn.event("checkpoint", operation.digest, reason, f"{where}: {fault.message}", level="warning")


def _where(turn: Turn, operation: Operation) -> str:
    name = turn.view.nodes[operation.node].name
    if operation.kind == "publish":
        return f"to {operation.url} from node {name}"
    device = f" {operation.device}" if operation.kind == "prefetch" and operation.tier is Tier.DEVICE else ""
    return f"{operation.tier.value}{device} of node {name}" + (f" from {operation.url}" if operation.url else "")


# --- which copies are meant ---


def _prefetch_place(turn: Turn, checkpoint: Checkpoint, node: Node | None, tier: Tier | None) -> _Place:
    if tier is Tier.DEVICE:
        return _prefetch_device(turn, checkpoint, node)
    if tier not in (None, Tier.DRAM):
        raise Conflict(f"a checkpoint can be brought to {Tier.DRAM} or {Tier.DEVICE}, not to {tier}")
    return _Place(_prefetch_node(turn, checkpoint, node), Tier.DRAM)


def _prefetch_node(turn: Turn, checkpoint: Checkpoint, node: Node | None) -> Node:
    """The node to bring a checkpoint into the memory of: the one named, or the one with most free memory of those with it."""
    view, digest = turn.view, checkpoint.digest
    holders = view.nodes_with(digest, Tier.DISK)
    if node is not None:
        if node.id not in holders and node.id not in view.nodes_with(digest, Tier.DRAM):
            raise Conflict(f"checkpoint {digest[:16]} is not on the disk of node {node.name}; {_lies(turn, digest)}")
        _check_arena(checkpoint, node)
        return _ready(node)
    ready = [each for each in map(view.nodes.__getitem__, holders) if each.state is NodeState.READY]
    if not ready:
        raise Conflict(f"no node that is ready has checkpoint {digest[:16]} on its disk; {_lies(turn, digest)}")
    there = view.nodes_with(digest, Tier.DRAM)

    def preference(each: Node) -> tuple[bool, bool, int, str]:
        arena = each.inventory.arena if each.inventory is not None else None
        free = arena.budget_bytes - view.memory.dram_bytes.get(each.id, 0) if arena is not None else 0
        return (each.id in there, not each.cordoned, free, each.id)

    best = max(ready, key=preference)
    _check_arena(checkpoint, best)
    return best


def _prefetch_device(turn: Turn, checkpoint: Checkpoint, node: Node | None) -> _Place:
    """The device to bring a checkpoint onto, of the node named or of any that has it: where it lies, else that with most free
    memory. Nothing is evicted for it."""
    view, digest, size = turn.view, checkpoint.digest, checkpoint.image_bytes
    holders = {*view.nodes_with(digest, Tier.DISK), *view.nodes_with(digest, Tier.DRAM), *view.nodes_with(digest, Tier.DEVICE)}
    if node is not None and node.id not in holders:
        raise Conflict(f"checkpoint {digest[:16]} is not on node {node.name}; {_lies(turn, digest)}")
    nodes = [_ready(node)] if node is not None else [view.nodes[holder] for holder in sorted(holders)]
    lying = {
        (record.node, record.device)
        for record in view.placements_of(digest).values()
        if record.tier is Tier.DEVICE and record.state is TierState.RESIDENT
    }
    choices = [
        ((each.id, device.index) in lying, not each.cordoned, view.memory.free_bytes(each.id, device), each.id, device.index)
        for each in nodes
        if each.state is NodeState.READY and each.inventory is not None
        for device in each.inventory.devices
        if device.kind != "cpu"
    ]
    if not choices:
        if node is not None:
            raise Conflict(
                f"node {node.name} has no device with memory of its own; on a CPU weights are used where they lie in DRAM"
            )
        raise Conflict(f"no node that is ready and has checkpoint {digest[:16]} has a device with memory of its own")
    there, _, free, best, index = max(choices)
    if not there and free < size:
        raise Conflict(
            f"checkpoint {digest[:16]} has {size} bytes; of the devices that it could go to, device {index} of node "
            f"{view.nodes[best].name} has most free, {max(0, free)}"
        )
    return _Place(view.nodes[best], Tier.DEVICE, index)


def _check_arena(checkpoint: Checkpoint, node: Node) -> None:
    budget = node.inventory.arena.budget_bytes if node.inventory is not None else checkpoint.image_bytes
    if checkpoint.image_bytes > budget:
        raise Conflict(
            f"checkpoint {checkpoint.digest[:16]} has {checkpoint.image_bytes} bytes; "
            f"the arena of node {node.name} holds {budget}"
        )


def _verify_places(turn: Turn, checkpoint: Checkpoint, node: Node | None) -> list[_Place]:
    """Every copy on a disk, or that of the node named; also those in quarantine."""
    records = [record for record in _records(turn, checkpoint, node) if record.tier is Tier.DISK]
    if not records:
        where = f"the disk of node {node.name}" if node is not None else "any disk"
        raise NotFound(f"checkpoint {checkpoint.digest[:16]} is not on {where}; {_lies(turn, checkpoint.digest)}")
    if node is not None:
        _ready(node)
    return [_Place(turn.view.nodes[record.node], Tier.DISK) for record in records]


def _drop_places(turn: Turn, checkpoint: Checkpoint, node: Node | None, tier: Tier | None) -> list[_Place]:
    """The copies on devices, DRAM and disk, or on the tier named. Raises Conflict for one in use, or that a model needs."""
    view, digest = turn.view, checkpoint.digest
    wanted = _DROPPED if tier is None else (tier,)
    records = [record for record in _records(turn, checkpoint, node) if record.tier in wanted]
    if not records:
        where = "/".join(wanted) + (f" of node {node.name}" if node is not None else " of any node")
        raise NotFound(f"checkpoint {digest[:16]} is not on {where}; {_lies(turn, digest)}")
    if node is not None:
        _ready(node)
    for record in records:
        users = [one.id for one in view.instances_on(record.node).values() if one.digest == digest]
        if users:
            name = view.nodes[record.node].name
            raise Conflict(f"checkpoint {digest[:16]} is in use on node {name} by {', '.join(users)}; stop them first")
    for record in records:
        if (digest, record.node, record.tier) in view.pins:
            name = view.nodes[record.node].name
            raise Conflict(f"checkpoint {digest[:16]} is pinned on {record.tier.value} of node {name}; unpin it first")
    left = {record.node for record in _records(turn, checkpoint, None) if record.tier is Tier.DISK}
    sound = left & set(view.nodes_with(digest, Tier.DISK))
    going = {record.node for record in records if record.tier is Tier.DISK}
    models = list(view.models_of(digest))
    if models and going & sound and not sound - going and not view.trusted_publications_of(digest):
        raise Conflict(
            f"this is the last sound copy of checkpoint {digest[:16]}, which {', '.join(models)} needs; "
            f"publish it to a remote (`sllmctl checkpoint publish {digest[:16]} URL`), fetch a sound one from where it lies "
            f"(`sllmctl checkpoint fetch {digest[:16]} --from URL --node NODE`), or remove the model first (`sllmctl model rm`)"
        )
    places = dict.fromkeys((record.node, record.tier) for record in records)
    return [_Place(view.nodes[where], tier) for where, tier in sorted(places, key=lambda one: (one[0], _DROPPED.index(one[1])))]


def _records(turn: Turn, checkpoint: Checkpoint, node: Node | None) -> list[PlacementRecord]:
    found = turn.view.placements_of(checkpoint.digest).values()
    return [record for record in found if node is None or record.node == node.id]


def _ready(node: Node) -> Node:
    if node.state is not NodeState.READY:
        raise Conflict(f"node {node.name} is {node.state.value}; `sllmctl event ls --object {node.name}` says why")
    return node


def _lies(turn: Turn, digest: str) -> str:
    """Where a checkpoint lies, in words."""
    places = sorted(
        f"{turn.view.nodes[record.node].name}:{record.tier.value}"
        + ("" if record.state is TierState.RESIDENT else f" ({record.state.value})")
        for record in turn.view.placements_of(digest).values()
    )
    places += [each.url for each in turn.view.publications_of(digest)]
    return f"it lies on {', '.join(places)}" if places else "it lies nowhere"
