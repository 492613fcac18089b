"""Checkpoints in demand, brought from disk into DRAM that nothing holds or fills, ahead of the next call."""

from __future__ import annotations

from heapq import nlargest

from schema.link import LoadCheckpoint
from schema.states import ModelState, NodeState, Tier
from sllmctl.control.demand import heat
from sllmctl.control.turn import Turn
from sllmctl.control.view import Model, Node

__all__ = ["done", "look", "lost"]

_AT_ONCE = 2
"""So many are under way at a time: a start's own load should seldom find the disk taken."""
_HOTTEST = 16
_NODES = 8
_LEAST_HEAT = 0.1
"""Of a call that is so long past, the next is not expected."""


def look(turn: Turn) -> None:
    """A time asked for has come: begin a few loads, and look again later."""
    turn.wake("prefetch", "", turn.now + turn.settings.prefetch_every_s)
    left = _AT_ONCE - len(turn.core.prefetches)
    if left <= 0:
        return
    heats = [
        (heat(model, turn.now, turn.settings.heat_s), model.name)
        for model in turn.view.models.values()
        if model.heat and model.state is ModelState.DEPLOYED
    ]
    for degree, name in nlargest(_HOTTEST, heats):
        if degree < _LEAST_HEAT or not left:
            return
        if _begin(turn, turn.view.models[name]):
            left -= 1


def _begin(turn: Turn, model: Model) -> bool:
    """One load for a model that lies in no memory yet, if some node has its checkpoint on disk and the room."""
    view, digest = turn.view, model.digest
    if digest is None or view.nodes_with(digest, Tier.DRAM) or view.nodes_with(digest, Tier.DEVICE):
        return False
    if any(digest == other for _, other in turn.core.prefetches.values()):
        return False
    for seen, name in enumerate(view.nodes_with(digest, Tier.DISK)):
        if seen >= _NODES:
            return False
        node = view.nodes[name]
        if node.state is NodeState.READY and not node.cordoned and _has_room(turn, node, digest):
            op = turn.core.ids("op")
            turn.core.prefetches[op] = (name, digest)
            turn.send(name, LoadCheckpoint(op=op, digest=digest, tier=Tier.DRAM))
            return True
    return False


def _has_room(turn: Turn, node: Node, digest: str) -> bool:
    """True if nothing has to leave the arena for it: neither what lies there nor what is to come."""
    view = turn.view
    if node.inventory is None or view.holds_arena(node.id, digest):
        return False
    coming = {one.digest for one in view.instances_on(node.id).values()}
    coming |= {other for where, other in turn.core.prefetches.values() if where == node.id}
    used = view.dram_bytes.get(node.id, 0)
    for other in coming:
        if (other, node.id, Tier.DRAM, 0) not in view.placements:
            used += view.arena_bytes_of(node.id, other)
    return used + view.arena_bytes_of(node.id, digest) <= node.inventory.arena.budget_bytes


def done(turn: Turn, op: str) -> bool:
    """An operation has ended, well or not; False if it was none of ours."""
    return turn.core.prefetches.pop(op, None) is not None


def lost(turn: Turn, node: str) -> None:
    """The link to a node broke: its next truth says what has become of it."""
    for op in [op for op, (where, _) in turn.core.prefetches.items() if where == node]:
        del turn.core.prefetches[op]
