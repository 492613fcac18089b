"""Deployed checkpoints, brought from disk into DRAM that nothing holds or fills, ahead of the next call.

Those called most lately come first, then those not called yet. Nothing is evicted for them, and a node reads ahead only while
nothing else is to be read from its disk, one checkpoint at a time: so a start waits for one such load at worst.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nlargest

from schema.link import LoadCheckpoint
from schema.states import ModelState, NodeState, Tier
from sllmctl.cluster.records import Node
from sllmctl.control.demand import heat
from sllmctl.control.turn import Turn
from sllmctl.planner.estimates import Channel

__all__ = ["done", "look", "lost"]

_AT_ONCE = 16
"""So many loads are begun at one look; there is another soon."""
_NODES = 8
"""So many of the nodes that have a checkpoint on disk are looked at; the one with the most free DRAM takes it."""


def look(turn: Turn) -> None:
    """A time asked for has come: begin some loads, and look again later."""
    if turn.core.closing:
        return
    turn.wake("prefetch", "", turn.now + turn.settings.prefetch_every_s)
    reading = {node for node, _ in turn.core.prefetches.values()}
    for digest in _wanted(turn):
        _begin(turn, digest, reading)


def _wanted(turn: Turn) -> Iterator[str]:
    """Checkpoints of deployed models that lie in no memory yet, those in most demand first."""
    view, now, heat_s = turn.view, turn.now, turn.settings.heat_s
    coming = {digest for _, digest in turn.core.prefetches.values()}
    found: dict[str, float] = {}
    for model in view.models.values():
        digest = model.digest
        if digest is None or model.state is not ModelState.DEPLOYED or digest in coming:
            continue
        if not view.nodes_with(digest, Tier.DRAM) and not view.nodes_with(digest, Tier.DEVICE):
            found[digest] = found.get(digest, 0.0) + (heat(model, now, heat_s) if model.heat else 0.0)
    yield from nlargest(_AT_ONCE, found, key=lambda digest: (found[digest], digest))


def _begin(turn: Turn, digest: str, reading: set[str]) -> None:
    """One load, if some node has the checkpoint on disk, the room, and nothing else to read; ``reading`` are those that read
    ahead already, however long that takes them."""
    view, core = turn.view, turn.core
    best: tuple[int, str] | None = None
    for seen, name in enumerate(view.nodes_with(digest, Tier.DISK)):
        if seen >= _NODES:
            break
        node = view.nodes[name]
        if name in reading or node.state is not NodeState.READY or node.cordoned:
            continue
        if not core.estimates.wait_s(node, Channel.DISK, turn.now):
            free = _free_bytes(turn, node, digest)
            if free >= 0 and (best is None or (free, name) > best):
                best = (free, name)
    if best is None:
        return
    node = view.nodes[best[1]]
    reading.add(node.id)
    op = core.ids("op")
    core.prefetches[op] = (node.id, digest)
    core.estimates.began(op, node, view.checkpoints[digest], (), Tier.DISK, "", turn.now)
    turn.send(node.id, LoadCheckpoint(op=op, digest=digest, tier=Tier.DRAM))


def _free_bytes(turn: Turn, node: Node, digest: str) -> int:
    """What would be left of the node's free DRAM, below 0 if something had to leave for it: what lies there, used or not, or
    what is to come."""
    view = turn.view
    if node.inventory is None or view.memory.keeps_arena(node.id, digest):
        return -1
    used = view.memory.dram_bytes.get(node.id, 0) + view.memory.arena_bytes_of(node.id, digest)
    for other in {one.digest for one in view.instances_on(node.id).values()}:
        if (other, node.id, Tier.DRAM, 0) not in view.placements:
            used += view.memory.arena_bytes_of(node.id, other)
    return node.inventory.arena.budget_bytes - used


def done(turn: Turn, op: str) -> bool:
    """An operation has ended, well or not; False if it was none of ours."""
    turn.core.estimates.ended(op, turn.now)
    return turn.core.prefetches.pop(op, None) is not None


def lost(turn: Turn, node: str) -> None:
    """The link to a node broke: its next truth says what has become of it."""
    for op in [op for op, (where, _) in turn.core.prefetches.items() if where == node]:
        done(turn, op)
