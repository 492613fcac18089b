"""Room on a node's disk: which copies go when an ingest or a fetch would pass the budget. Only what can be had again goes.

The least recently used go first. A copy stays that is pinned, in use, on its way, of a model with a minimum of instances,
or the last sound one: it goes only while another ready node keeps a sound copy on its disk that is not itself on its way out,
or while it lies on a remote, from where a start can fetch it.
"""

from __future__ import annotations

from schema.states import ModelState, NodeState, Tier, TierState
from sllmctl.cluster.records import PlacementRecord
from sllmctl.control import drops
from sllmctl.control.turn import Core, Turn

__all__ = ["make_room", "victims"]


def make_room(turn: Turn, node: str, short_bytes: int, what: str) -> bool:
    """Begin to drop enough of a node's disk; False, and nothing is dropped, if that cannot be."""
    found = victims(turn.core, node, short_bytes)
    for record in found:
        name = turn.view.nodes[node].name
        message = f"from disk of node {name}, to make room for {what}; it can be had again"
        turn.event("checkpoint", record.digest, "Evicted", message)
        drops.begin(turn, node, record.digest, Tier.DISK)
    return bool(found)


def victims(core: Core, node: str, short_bytes: int) -> list[PlacementRecord]:
    """The copies to drop from a node's disk so that it has ``short_bytes`` more; none if all that may go are too few."""
    able = [record for record in core.view.placements_on(node).values() if _may_go(core, record)]
    chosen: list[PlacementRecord] = []
    freed = 0
    for record in sorted(able, key=lambda record: (record.used_at, record.digest)):
        if freed >= short_bytes:
            break
        chosen.append(record)
        freed += record.size_bytes
    return chosen if freed >= short_bytes else []


def _may_go(core: Core, record: PlacementRecord) -> bool:
    view, digest, node = core.view, record.digest, record.node
    if record.tier is not Tier.DISK or record.state not in (TierState.RESIDENT, TierState.QUARANTINED):
        return False
    if not record.size_bytes:  # it lies in the user's own files, which are not deleted
        return False
    if (digest, node, Tier.DISK) in view.pins or _goes(core, node, digest):
        return False
    if any(one.users for one in view.placements_at(digest, node).values()):
        return False
    if any(one.digest == digest for one in view.instances_on(node).values()):
        return False
    if (node, digest) in core.prefetches.values() or _operated(core, node, digest):
        return False
    deployed = [model for name in view.models_of(digest) if (model := view.models[name]).state is ModelState.DEPLOYED]
    if any(model.spec.scale.min for model in deployed):
        return False
    return bool(view.trusted_publications_of(digest)) or any(
        other != node and view.nodes[other].state is NodeState.READY and not _goes(core, other, digest)
        for other in view.nodes_with(digest, Tier.DISK)
    )


def _goes(core: Core, node: str, digest: str) -> bool:
    """True for a copy that is on its way out already, by whoever's word."""
    if (node, digest, Tier.DISK) in core.dropping:
        return True
    return any(
        one.kind == "drop" and one.ended_at is None and (one.node, one.digest, one.tier) == (node, digest, Tier.DISK)
        for one in core.view.operations.values()
    )


def _operated(core: Core, node: str, digest: str) -> bool:
    """True while an operator has something done to a copy."""
    return any(one.ended_at is None and (one.node, one.digest) == (node, digest) for one in core.view.operations.values())
