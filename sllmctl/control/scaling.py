"""How many instances a model has: its minimum, what waits for it, its keep-alive, its maximum."""

from __future__ import annotations

from schema.errors import Fault, Unschedulable
from schema.states import InstanceState, ModelState, NodeState
from sllmctl.control import instances
from sllmctl.control.effects import RejectWaiting
from sllmctl.control.turn import Turn
from sllmctl.control.view import Instance, Model
from sllmctl.planner import Plan, make_room, place

__all__ = ["pending", "scale"]

_I = InstanceState


def pending(turn: Turn) -> list[str]:
    """Models that were refused a place, those whose requests wait longest first, so that none starves."""
    refused = [turn.view.models[name] for name in turn.view.refused]
    never = float("inf")
    refused.sort(key=lambda model: (never if model.waiting_since is None else model.waiting_since, model.name))
    return [model.name for model in refused]


def scale(turn: Turn, model: Model) -> None:
    """Start or stop instances until the model has what it should have now; ask to be woken when time alone changes that."""
    if model.state is not ModelState.DEPLOYED:
        turn.view.set_refusal(model, "")
        for instance in list(turn.view.instances_of(model.name).values()):
            instances.stop(turn, instance, "Stopping", f"model {model.name} is {model.state.value}")
        return
    _start_missing(turn, model)
    _stop_surplus(turn, model)


def _start_missing(turn: Turn, model: Model) -> None:
    before = model.refusal
    turn.view.set_refusal(model, "")
    for _ in range(_missing(turn, model)):
        found = place(turn.view, model, turn.settings)
        if isinstance(found, Plan):
            instances.create(turn, model, found)
            continue
        turn.view.set_refusal(model, found.reason)
        if found.reason != before:
            turn.event("model", model.name, "Unschedulable", found.reason, level="warning")
        if model.waiting and found.hopeless and not _active(turn, model):
            turn.do(RejectWaiting(model.name, Fault.of(Unschedulable(found.reason))))
        if model.waiting and not found.hopeless:
            _evict_idle(turn, model)
        return
    failed = [one for one in turn.view.instances_of(model.name).values() if one.state is _I.FAILED]
    if model.waiting and failed and not _active(turn, model):
        why = failed[-1].fault.message if failed[-1].fault is not None else "unknown"
        text = f"model {model.name!r} has only failed instances, the last for: {why}; deploy it again to retry"
        turn.do(RejectWaiting(model.name, Fault.of(Unschedulable(text))))


def _evict_idle(turn: Turn, model: Model) -> None:
    """Stop idle instances of others for a model whose requests wait; it is placed when their room is free."""
    eviction = make_room(turn.view, model, turn.now, turn.settings)
    for victim in () if eviction is None else eviction.instances:
        instances.stop(turn, turn.view.instances[victim], "Evicted", f"it was idle, and model {model.name} waits for its room")
    turn.wake("model", model.name, turn.now + turn.settings.evict_look_s)


def _active(turn: Turn, model: Model) -> list[Instance]:
    return [one for one in turn.view.instances_of(model.name).values() if one.state in instances.ACTIVE]


def _missing(turn: Turn, model: Model) -> int:
    """How many instances to start now. A failed one keeps its slot, or a model that always fails would start for ever."""
    rule = model.spec.scale
    there = list(turn.view.instances_of(model.name).values())
    active = [one for one in there if one.state in instances.ACTIVE]
    slots = rule.max - len(active) - sum(one.state is _I.FAILED for one in there)
    below = rule.min - (rule.max - slots)
    if not model.waiting:
        return max(0, min(below, slots))
    serving = sum(one.state is _I.READY and turn.view.nodes[one.node].state is NodeState.READY for one in active)
    if serving and model.waiting_since is not None:
        at = model.waiting_since + turn.settings.scale_up_after_s
        if at > turn.now:
            turn.wake("model", model.name, at)
            return max(0, min(below, slots))
    coming = sum(one.state is not _I.READY for one in active)
    wanted = -(-model.waiting // rule.max_concurrency) - coming
    return max(0, min(max(below, wanted), slots))


def _stop_surplus(turn: Turn, model: Model) -> None:
    """Above the maximum the least useful go at once; above the minimum those whose keep-alive has run out."""
    rule = model.spec.scale
    active = _active(turn, model)
    for instance in sorted(active, key=_usefulness)[: max(0, len(active) - rule.max)]:
        instances.stop(turn, instance, "ScaledDown", f"model {model.name} may have {rule.max} instances")
        active.remove(instance)
    spare = len(active) - rule.min
    if model.waiting or spare <= 0:
        return
    keep_alive_s = instances.keep_alive_s(turn, model)
    for instance in sorted(active, key=lambda one: (one.idle_since or 0.0, one.id)):
        if instance.idle_since is None or instance.running or turn.view.nodes[instance.node].state is not NodeState.READY:
            continue
        at = instance.idle_since + keep_alive_s
        if at > turn.now:
            turn.wake("model", model.name, at)
            return
        if spare == 0:
            return
        spare -= 1
        last = spare + rule.min == 0
        reason, target = ("ScaledToZero", "none") if last else ("ScaledDown", f"{spare + rule.min}")
        instances.stop(turn, instance, reason, f"idle for {keep_alive_s:g} s; model {model.name} keeps {target}")


def _usefulness(instance: Instance) -> tuple[bool, int, float]:
    return (instance.state is _I.READY, instance.running, -(instance.idle_since or 0.0))
