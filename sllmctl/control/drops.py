"""Checkpoints on their way out of a tier of a node: asked for, tried again while something still uses them, or given up."""

from __future__ import annotations

from dataclasses import replace

from schema.link import DropCheckpoint, OperationDone
from schema.states import NodeState, Tier, TierState
from sllmctl.control.turn import Drop, Turn

__all__ = ["begin", "done", "lost", "retry"]


def begin(turn: Turn, node: str, digest: str, tier: Tier) -> None:
    """Ask a node to drop a checkpoint. Weights on its devices count as leaving from now on, where nobody uses them."""
    if (node, digest, tier) in turn.core.dropping:
        return
    if tier is Tier.DEVICE and turn.core.kept.get((node, digest), 0.0) > turn.now:
        turn.wake("settle", node, turn.core.kept[node, digest])
        return
    op = turn.core.ids("op")
    turn.core.drops[op] = Drop(node, digest, tier, 1)
    turn.core.dropping[node, digest, tier] = op
    if tier is Tier.DEVICE:
        mark(turn, node, digest)
    turn.send(node, DropCheckpoint(op=op, digest=digest, tier=tier))


def mark(turn: Turn, node: str, digest: str) -> None:
    """Idle weights of a checkpoint that is being dropped are on their way out, whatever the node says in the meantime."""
    view = turn.view
    for record in list(view.placements_at(digest, node).values()):
        if record.tier is Tier.DEVICE and digest in view.memory.idle_weights.get((node, record.device), {}):
            leaving = replace(record, state=TierState.EVICTING)
            view.put_placement(leaving)
            turn.put_placement(leaving)


def done(turn: Turn, op: str, said: OperationDone) -> bool:
    """An operation has ended; False if it was none of ours. A worker that has just ended may still be counted as a user: that
    Conflict is tried again, a bounded number of times."""
    drop = turn.core.drops.pop(op, None)
    if drop is None:
        return False
    key = (drop.node, drop.digest, drop.tier)
    turn.core.dropping.pop(key, None)
    turn.settle[drop.node] = None
    if said.fault is None or said.fault.code == "not_found":
        return True
    if said.fault.code == "conflict" and drop.attempts < turn.settings.drop_attempts:
        again = turn.core.ids("op")
        turn.core.drops[again] = Drop(drop.node, drop.digest, drop.tier, drop.attempts + 1)
        turn.core.dropping[key] = again
        turn.wake("drop", again, turn.now + turn.settings.drop_retry_s)
        return True
    _stays(turn, drop)
    name = turn.view.nodes[drop.node].name
    message = f"it stays on {drop.tier.value} of node {name}: {said.fault.message}"
    turn.event("checkpoint", drop.digest, "DropFailed", message, level="warning")
    return True


def _stays(turn: Turn, drop: Drop) -> None:
    """It was not dropped: it may be used again, and is not asked to leave its devices again at once."""
    if drop.tier is not Tier.DEVICE:
        return
    core, view, settings = turn.core, turn.view, turn.settings
    core.kept = {key: until for key, until in core.kept.items() if until > turn.now}
    core.kept[drop.node, drop.digest] = turn.now + settings.drop_retry_s * settings.drop_attempts
    for record in list(view.placements_at(drop.digest, drop.node).values()):
        if record.tier is Tier.DEVICE and record.state is TierState.EVICTING:
            back = replace(record, state=TierState.RESIDENT)
            view.put_placement(back)
            turn.put_placement(back)


def retry(turn: Turn, op: str) -> None:
    """A time asked for has come: try again to drop a checkpoint, unless it is used now."""
    drop = turn.core.drops.get(op)
    if drop is None:
        return
    view = turn.view
    if drop.tier is Tier.DEVICE:
        records = view.placements_at(drop.digest, drop.node).values()
        used = not any(record.tier is Tier.DEVICE and record.state is TierState.EVICTING for record in records)
    else:
        used = any(view.models_of(drop.digest)) or (drop.digest, drop.node, drop.tier) in view.pins
    if used or view.nodes[drop.node].state is not NodeState.READY:
        _forget(turn, op, drop)
        _stays(turn, drop)
        turn.settle[drop.node] = None
        return
    turn.send(drop.node, DropCheckpoint(op=op, digest=drop.digest, tier=drop.tier))


def lost(turn: Turn, node: str) -> None:
    """The link to a node broke: its next truth says what it still holds."""
    for op, drop in [(op, drop) for op, drop in turn.core.drops.items() if drop.node == node]:
        _forget(turn, op, drop)


def _forget(turn: Turn, op: str, drop: Drop) -> None:
    del turn.core.drops[op]
    turn.core.dropping.pop((drop.node, drop.digest, drop.tier), None)
