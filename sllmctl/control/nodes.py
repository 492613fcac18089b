"""Nodes: named, connected, heard, lost, and given up; and the checkpoints they say they hold."""

from __future__ import annotations

from dataclasses import replace

from schema.errors import InvalidCheckpoint
from schema.link import CancelOperation, CheckpointTruth, Ingest, Inventory, NodeTruth, OperationsAcked
from schema.states import InstanceState, ModelState, NodeState, Tier, TierState, can_become
from sllmctl.cluster.records import LIVE, Checkpoint, Node, PlacementKey, PlacementRecord
from sllmctl.control import drops, instances, learning, models, operations, pins, prefetch, retrying
from sllmctl.control.effects import CheckpointKnown, Connect, Log
from sllmctl.control.events import AddNode, NodeLost
from sllmctl.control.turn import Turn

__all__ = ["add", "any_expected", "check", "lost", "move", "take_checkpoint", "take_inventory", "take_truth"]


def move(turn: Turn, node: Node, state: NodeState) -> None:
    assert can_become(node.state, state), f"node {node.id}: {node.state} cannot become {state}"
    turn.view.set_node_state(node, state)
    turn.put_node(node)


def add(turn: Turn, event: AddNode) -> None:
    """Name a node and dial it; a known one is dialled where it is now."""
    if (known := turn.view.nodes.get(event.node)) is not None:
        if known.address != event.address:
            known.address = event.address
            turn.put_node(known)
            turn.event("node", known.name, "Moved", f"to {known.address}")
            turn.do(Connect(known.id, known.address))
        return
    if turn.view.node_named(event.name) is not None:
        turn.do(Log("error", f"node {event.node} is not added: another node is named {event.name!r}"))
        return
    node = Node(event.node, event.name, event.address, NodeState.JOINING, False, turn.now, 0.0)
    turn.view.add_node(node)
    turn.put_node(node)
    turn.event("node", node.name, "Added", f"at {node.address}")
    turn.do(Connect(node.id, node.address))


def lost(turn: Turn, event: NodeLost) -> None:
    """The link broke: its instances are kept, take nothing new, and count as lost only after a grace."""
    node = turn.view.nodes.get(event.node)
    if node is None or node.state is not NodeState.READY:
        return
    move(turn, node, NodeState.UNREACHABLE)
    node.seen_at = node.unreachable_since = turn.now
    if event.stopped:
        turn.event("node", node.name, "Stopped", "with its manager")
    else:
        turn.event("node", node.name, "Unreachable", event.why, level="warning")
    turn.wake("node", node.id, turn.now + turn.settings.unreachable_grace_s)
    for instance in turn.view.instances_on(node.id).values():
        instances.route(turn, instance)
        turn.look_now(instance.model)
        turn.rescale[instance.model] = None
    for instance in list(turn.view.memory.planned_on(node.id).values()):
        instances.retire(turn, instance, "Gone", f"node {node.name} is unreachable, and it had not begun")
    for model in turn.view.operating_on(node.id):
        models.let_go(turn, model)
    drops.lost(turn, node.id)
    prefetch.lost(turn, node.id)


def any_expected(turn: Turn) -> bool:
    """Whether a node is away that may well come back by itself: for less than its grace, which a new manager starts anew."""
    away = [node.unreachable_since for node in turn.view.nodes.values() if node.state is NodeState.UNREACHABLE]
    return any(since is not None and since + turn.settings.unreachable_grace_s > turn.now for since in away)


def check(turn: Turn, node: Node) -> None:
    """A time asked for has come: a node that stays away is expected no more, and its instances count as lost."""
    if node.state is not NodeState.UNREACHABLE or node.unreachable_since is None:
        return
    at = node.unreachable_since + turn.settings.unreachable_grace_s
    if at > turn.now:
        turn.wake("node", node.id, at)
        return
    for instance in list(turn.view.instances_on(node.id).values()):
        why = f"node {node.name} has been unreachable for {turn.settings.unreachable_grace_s:g} s"
        instances.retire(turn, instance, "Lost", why, level="warning")
    turn.free()  # of nothing, but those who have no place without it are to be told of


def take_truth(turn: Turn, node: Node, truth: NodeTruth) -> None:
    """All that a node holds, at the beginning of a connection: what is not in it does not exist there."""
    joined, away_since = node.state is not NodeState.READY, node.unreachable_since
    if joined:
        move(turn, node, NodeState.READY)
        turn.event("node", node.name, "Ready", f"connected to {truth.inventory.hostname or node.address}")
    node.seen_at, node.unreachable_since = turn.now, None
    node.imports_since = None
    take_inventory(turn, node, truth.inventory)
    _take_checkpoints(turn, node, truth)
    _take_instances(turn, node, truth)
    if joined:
        retrying.node_joined(turn, node, away_since)
    pins.state(turn, node.id)
    _take_operations(turn, node, truth)


def take_inventory(turn: Turn, node: Node, inventory: Inventory) -> None:
    """What a node has. Who waits for room is asked again: it may have more."""
    turn.view.set_inventory(node.id, inventory)
    learning.zygote_stated(turn, node, ready=bool(inventory.numerics))
    turn.put_node(node)
    turn.free()
    turn.settle[node.id] = None


def _take_instances(turn: Turn, node: Node, truth: NodeTruth) -> None:
    stated: set[str] = set()
    for said in truth.instances:
        known = turn.view.instances.get(said.instance)
        if known is None or known.node != node.id:
            instances.stop_stranger(turn, node.id, said)
            continue
        if said.epoch >= known.epoch:
            stated.add(known.id)
        instances.adopt(turn, known, said, whole=True)
    for instance in list(turn.view.instances_on(node.id).values()):
        if instance.id not in stated and instance.state in LIVE:
            instances.died(turn, instance, None)
    for instance in list(turn.view.instances_on(node.id).values()):
        instances.route(turn, instance)
        if instance.state is not InstanceState.READY:
            instances.check(turn, instance)
        turn.rescale[instance.model] = None


def _take_operations(turn: Turn, node: Node, truth: NodeTruth) -> None:
    """Ended operations are taken in; an ingest is asked for again, which is harmless if it is known; unknown ones are ended."""
    core = turn.core
    for done in sorted(truth.done, key=lambda done: done.op in core.left):  # first those that say what models have
        if not operations.told_again(turn, done):
            models.operation_done(turn, node.id, done)
    for op, left in [(op, left) for op, left in core.left.items() if left.node == node.id and op not in truth.ops]:
        del core.left[op]
        if left.digest:  # what it has brought is not there
            turn.send(node.id, OperationsAcked(ops=(op,)))
    wanted: set[str] = set()
    for model in turn.view.operating_on(node.id):
        if model.op is None:
            continue
        if model.state is ModelState.INGESTING:
            wanted.add(model.op)
            if model.ingested is None:
                turn.send(node.id, Ingest(op=model.op, source=model.spec.source))
        elif model.op not in truth.ops:
            models.let_go(turn, model)
    wanted |= operations.restate(turn, node, truth)
    for op in truth.ops:
        if op not in wanted and op not in core.drops and op not in core.prefetches:
            turn.send(node.id, CancelOperation(op=op))


def _take_checkpoints(turn: Turn, node: Node, truth: NodeTruth) -> None:
    stated = {checkpoint.digest for checkpoint in truth.checkpoints}
    for record in list(turn.view.placements_on(node.id).values()):
        if record.digest not in stated:
            turn.remove_placement(record)
            turn.forget_unheld(record.digest)
    for checkpoint in truth.checkpoints:
        take_checkpoint(turn, node, checkpoint)


def take_checkpoint(turn: Turn, node: Node, truth: CheckpointTruth) -> None:
    """All placements of one checkpoint on one node, replacing what was known of them there."""
    held = [one for one in truth.placements if one.state is not TierState.ABSENT]
    if held or truth.digest in turn.view.checkpoints:
        _learn(turn, truth)
    gone: dict[PlacementKey, PlacementRecord] = dict(turn.view.placements_at(truth.digest, node.id))
    for one in held:
        device = one.device if one.tier is Tier.DEVICE else 0
        before = gone.pop((truth.digest, node.id, one.tier, device), None)
        used_at = before.used_at if before is not None else turn.now
        record = PlacementRecord(
            truth.digest, node.id, one.tier, device, one.state, one.size_bytes, one.users, one.reason, used_at, one.copies
        )
        dropping = (node.id, truth.digest, one.tier) in turn.core.dropping and not one.users
        if dropping and before is not None and before.state is TierState.EVICTING and one.state is TierState.RESIDENT:
            continue
        if before is not None and replace(before, device=device) == record:
            continue
        turn.view.put_placement(record)
        if one.state is TierState.RESIDENT and (before is None or before.state is not one.state or one.users < before.users):
            turn.free()
        turn.settle[node.id] = None
        if before is None or (before.state, before.size_bytes, before.copies) != (one.state, one.size_bytes, one.copies):
            turn.put_placement(record)
        if before is None and (one.tier, one.state) == (Tier.DISK, TierState.RESIDENT):
            retrying.copy_appeared(turn, truth.digest, node)
        if one.state is TierState.QUARANTINED and (before is None or before.state is not TierState.QUARANTINED):
            _quarantined(turn, node, record)
        elif before is not None and (before.state, one.state) == (TierState.QUARANTINED, TierState.RESIDENT):
            turn.event("checkpoint", truth.digest, "Released", f"it is sound again on {one.tier.value} of node {node.name}")
            retrying.copy_appeared(turn, truth.digest, node)
        elif one.state is TierState.RESIDENT and one.reason and (before is None or before.reason != one.reason):
            told = f"on {one.tier.value} of node {node.name} a sound copy is left: {one.reason}"
            turn.event("checkpoint", truth.digest, "Quarantined", told, level="warning")
    for record in gone.values():
        turn.remove_placement(record)
        turn.free()
        turn.settle[node.id] = None
    if any(one.state is TierState.RESIDENT for one in held):
        turn.do(CheckpointKnown(truth.digest, node.id))
        models.finish_ingest(turn, node.id, truth.digest)
    turn.forget_unheld(truth.digest)


def _learn(turn: Turn, truth: CheckpointTruth) -> None:
    """What is known of a checkpoint is what the truth says that knows best: one that says what it is, of a readable copy, and
    of like ones that with the largest image, since that must find room wherever it goes.

    Of a copy that cannot be read not even the size is known, until the fetch that repairs it has the manifest; and a layout in
    place may take more than a copy of it.
    """
    known = turn.view.checkpoints.get(truth.digest)
    told = Checkpoint(
        truth.digest,
        truth.architecture,
        truth.image_bytes,
        truth.kv_token_bytes,
        truth.max_context_tokens,
        turn.now,
        truth.step,
    )
    if known is not None:
        said = (bool(truth.architecture), truth.image_bytes) > (bool(known.architecture), known.image_bytes)
        told = replace(told if said else known, created_at=known.created_at, step=known.step or truth.step)
    if told != known:
        turn.view.add_checkpoint(told)
        turn.put_checkpoint(told)


def _quarantined(turn: Turn, node: Node, record: PlacementRecord) -> None:
    """A copy was found wrong: nothing starts from it any more. Wrong weights in memory also end their instances."""
    why = record.reason or "a checksum failed"
    where = f"on {record.tier.value} of node {node.name}"
    if record.tier is Tier.DISK:
        advice = "fetch or ingest it again, or verify it once its files are right"
    else:
        advice = "its instances there end, and the next start reads it anew; where its files are right, suspect that memory"
    message = f"{where}: {why}; {advice}"
    turn.event("checkpoint", record.digest, "Quarantined", message, level="error")
    if record.tier is Tier.DISK:
        for instance in list(turn.view.instances_on(node.id).values()):
            failed = instance.fault is not None and instance.fault.code == InvalidCheckpoint.code
            if instance.digest == record.digest and failed and turn.view.has_replaceable_copy(instance, TierState.QUARANTINED):
                instances.stop(turn, instance, "Quarantined", "it is planned anew, with weights from elsewhere")
                turn.rescale[instance.model] = None
        return
    for instance in list(turn.view.instances_on(node.id).values()):
        if instance.digest == record.digest and instance.state in LIVE:
            instances.stop(turn, instance, "Quarantined", f"its weights on node {node.name} are wrong: {why}", grace_s=0.0)
    if any(one.tier is Tier.DEVICE for one in turn.view.placements_at(record.digest, node.id).values()):
        drops.begin(turn, node.id, record.digest, Tier.DEVICE)  # they were copied from there
