"""Room in a node's arena for a load: who leaves for it, beside those who leave its devices."""

from __future__ import annotations

from schema.states import Tier
from sllmctl.cluster.records import HOLDING, Instance
from sllmctl.planner.cover import cover
from sllmctl.planner.inquiry import Inquiry
from sllmctl.planner.victims import Exit

__all__ = ["clear_arena"]


def clear_arena(inquiry: Inquiry, node: str, exits: list[Exit], taken: list[Exit], deficit: int) -> list[Exit] | None:
    """Who leaves so that the arena has room for ``deficit`` bytes more: a checkpoint's bytes are free when all who use it
    have left, unless it is pinned."""
    view = inquiry.view
    by_id = {name: one for one in exits for name in one.ids}
    users: dict[str, list[Instance]] = {}
    for instance in view.instances_on(node).values():
        if instance.state in HOLDING:
            users.setdefault(instance.digest, []).append(instance)
    items: list[tuple[int, float, float, Exit]] = []
    groups: dict[int, list[Exit]] = {}
    freed: list[Exit] = []
    for digest, group in users.items():
        if (digest, node, Tier.DRAM, 0) in view.placements and (digest, node, Tier.DRAM) in view.pins:
            continue
        if digest == inquiry.asked.digest or any(one.id not in by_id for one in group):
            continue
        leaving = list(dict.fromkeys(by_id[one.id] for one in group))
        size = view.memory.arena_bytes_of(node, digest)
        extra = [one for one in leaving if one not in taken]
        if not extra:
            deficit -= size
            freed += leaving
            continue
        joined = Exit({}, sum(one.delay_s for one in extra), max(one.room_s for one in extra))
        groups[id(joined)] = leaving
        items.append((size, joined.delay_s, joined.room_s, joined))
    if deficit <= 0:
        return freed
    since_s = max((one.room_s for one in taken), default=0.0)
    found = cover(deficit, items, since_s)
    if found is None:
        return None
    return freed + [one for joined in found[1] for one in groups[id(joined)]]
