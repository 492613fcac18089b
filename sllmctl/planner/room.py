"""Whose place a waiting model may take: idle instances of other models, the longest idle first, and no more than it needs.

An instance is left alone while it serves, while its model needs it for its minimum, and until it has been idle for
``evict_idle_s``, so that one that was just started is never taken from the request it was started for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import msgspec

from schema.states import InstanceState, NodeState, Tier
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import HOLDING, Checkpoint, ClusterView, Instance, Model, Node
from sllmctl.planner.memory import KvNeed, kv_need
from sllmctl.planner.place import Candidate, holding_nodes, place_on

__all__ = ["Eviction", "make_room"]

_LEAVING = frozenset({InstanceState.DRAINING, InstanceState.STOPPING})


class Eviction(msgspec.Struct, frozen=True):
    """Stop these instances, all on one node, and the model fits there once they and those already leaving are gone."""

    node: str
    instances: tuple[str, ...]


def make_room(view: ClusterView, model: Model, now: float, settings: ControlSettings) -> Eviction | None:
    """The cheapest way to make room for an instance of ``model`` that found none, or None while there is no way.

    Fewest instances first, then those idle for longest. An empty eviction says that enough is leaving already.
    """
    checkpoint = view.checkpoints.get(model.digest) if model.digest is not None else None
    if checkpoint is None:
        return None
    need = kv_need(model.spec, checkpoint, settings)
    best: tuple[int, float, str, tuple[str, ...]] | None = None
    for node_id, tier in holding_nodes(view, checkpoint.digest).items():
        node = view.nodes[node_id]
        if node.state is not NodeState.READY or node.cordoned:
            continue
        here = list(view.instances_on(node_id).values())
        leaving = [one for one in here if one.state in _LEAVING]
        fits = partial(_fits, view, node, checkpoint, model, need, tier, settings, leaving)
        chosen = _choose(_idle(view, model, here, now, settings), fits)
        if chosen is not None:
            newest = max((one.idle_since or 0.0 for one in chosen), default=0.0)
            found = (len(chosen), newest, node_id, tuple(one.id for one in chosen))
            best = found if best is None else min(best, found)
    return None if best is None else Eviction(best[2], best[3])


def _choose(idle: list[Instance], fits: Callable[[list[Instance]], bool]) -> list[Instance] | None:
    """As many as it takes, the longest idle first; then none of them that it would do without."""
    chosen: list[Instance] = []
    for victim in idle:
        if fits(chosen):
            break
        chosen.append(victim)
    if not fits(chosen):
        return None
    for victim in list(chosen):
        fewer = [one for one in chosen if one is not victim]
        if fits(fewer):
            chosen = fewer
    return chosen


def _fits(
    view: ClusterView,
    node: Node,
    checkpoint: Checkpoint,
    model: Model,
    need: KvNeed,
    tier: Tier,
    settings: ControlSettings,
    leaving: list[Instance],
    chosen: list[Instance],
) -> bool:
    found = place_on(view, node, checkpoint, model, need, tier, settings, leaving + chosen)
    return isinstance(found, Candidate)


def _idle(view: ClusterView, model: Model, here: list[Instance], now: float, settings: ControlSettings) -> list[Instance]:
    """Instances that may go, the longest idle first; of each model only those above its minimum."""
    spare: Counter[str] = Counter()
    found: list[Instance] = []
    for one in sorted(here, key=lambda one: (one.idle_since or 0.0, one.id)):
        if one.model == model.name or one.state is not InstanceState.READY or one.running or one.idle_since is None:
            continue
        if one.idle_since + settings.evict_idle_s > now:
            continue
        if one.model not in spare:
            owner = view.models.get(one.model)
            there = sum(other.state in HOLDING - _LEAVING for other in view.instances_of(one.model).values())
            spare[one.model] = there - (owner.spec.scale.min if owner is not None else 0)
        if spare[one.model] > 0:
            spare[one.model] -= 1
            found.append(one)
    return found
