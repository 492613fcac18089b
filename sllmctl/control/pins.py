"""What operators keep on tiers of nodes: checked, written, and stated to the nodes, which keep it over their own restarts."""

from __future__ import annotations

from schema.errors import Conflict, InvalidInput, NotFound
from schema.link import PinTo, SetPins
from schema.states import Tier
from sllmctl.cluster.records import Checkpoint, Node, PinKey
from sllmctl.control.events import Pin
from sllmctl.control.references import checkpoint_called, node_called
from sllmctl.control.turn import Turn

__all__ = ["change", "state"]

_TIERS = (Tier.DRAM, Tier.DISK)


def change(turn: Turn, event: Pin) -> None:
    """Pin or unpin copies of a checkpoint: all of them, or none. Raises NotFound, Conflict, InvalidInput."""
    if event.tier not in (None, *_TIERS):
        raise InvalidInput(f"a checkpoint can be pinned on {Tier.DRAM} or {Tier.DISK}, not on {event.tier}", "tier")
    checkpoint = checkpoint_called(turn.view, event.reference)
    node = node_called(turn.view, event.node) if event.node is not None else None
    tiers = _TIERS if event.tier is None else (event.tier,)
    keys = _pin(turn, checkpoint, node, tiers) if event.pinned else _unpin(turn, checkpoint, node, tiers)
    for key in keys:
        name = turn.view.nodes[key[1]].name
        reason, what = ("Pinned", "kept on") if event.pinned else ("Unpinned", "no longer kept on")
        turn.event("checkpoint", checkpoint.digest, reason, f"it is {what} {key[2].value} of node {name}")
    for where in dict.fromkeys(key[1] for key in keys):
        state(turn, where)


def state(turn: Turn, node: str) -> None:
    """Tell a node all that is kept on it."""
    pins = tuple(PinTo(digest=digest, tier=tier) for digest, tier in turn.view.pins_on(node))
    turn.send(node, SetPins(pins=pins))


def _pin(turn: Turn, checkpoint: Checkpoint, node: Node | None, tiers: tuple[Tier, ...]) -> list[PinKey]:
    """Where it lies now; on the tier of a node that is named, whether it lies there yet or not, if the node has it at all."""
    view, digest = turn.view, checkpoint.digest
    places = {(record.node, record.tier) for record in view.placements_of(digest).values() if record.tier in tiers}
    if node is not None:
        places = {place for place in places if place[0] == node.id}
        if len(tiers) == 1 and view.placements_at(digest, node.id):
            places.add((node.id, tiers[0]))
    if not places:
        where = "/".join(tier.value for tier in tiers)
        raise NotFound(
            f"checkpoint {digest[:16]} is not on {where} of {f'node {node.name}' if node is not None else 'any node'}; "
            "prefetch it, or name a --node that has it"
        )
    keys: list[PinKey] = [(digest, where, tier) for where, tier in sorted(places)]
    new = [key for key in keys if key not in view.pins]
    for _, where, tier in new:
        if tier is Tier.DRAM:
            _check_arena(turn, checkpoint, view.nodes[where])
    for key in new:
        turn.put_pin(key)
    return new


def _unpin(turn: Turn, checkpoint: Checkpoint, node: Node | None, tiers: tuple[Tier, ...]) -> list[PinKey]:
    pins = turn.view.pins
    keys = [key for key in sorted(pins) if key[0] == checkpoint.digest and key[2] in tiers]
    keys = [key for key in keys if node is None or key[1] == node.id]
    for key in keys:
        turn.remove_pin(key)
        turn.settle[key[1]] = None
    if keys:
        turn.free()
    return keys


def _check_arena(turn: Turn, checkpoint: Checkpoint, node: Node) -> None:
    """What is pinned must fit beside what else is, or nothing could ever be loaded there any more."""
    view = turn.view
    if node.inventory is None:
        raise Conflict(f"node {node.name} ({node.state.value}) has not said how large its arena is")
    pinned = sum(view.memory.arena_bytes_of(node.id, digest) for digest, tier in view.pins_on(node.id) if tier is Tier.DRAM)
    need, budget = view.memory.arena_bytes_of(node.id, checkpoint.digest), node.inventory.arena.budget_bytes
    if pinned + need > budget:
        raise Conflict(
            f"{need} bytes of checkpoint {checkpoint.digest[:16]} do not fit beside the {pinned} bytes pinned in the arena of "
            f"node {node.name}, which holds {budget}; unpin another, or give the node a larger arena"
        )
