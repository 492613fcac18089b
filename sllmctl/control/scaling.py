"""How many instances: a model's minimum, what waits for it, its keep-alive, its maximum; and who is asked first.

Models that were refused are kept in the order in which they were. Whenever room may have appeared, those whose requests wait
for age_s or more are asked before anything else may take it, the longest-refused first; then the models that the event
touched; then the other refused ones. Each time it ends after `_IN_A_ROW` refusals in a row: what is too little for so many is
hardly room for the next. So that none is passed over for ever, the rest is asked in turn, as many every evict_look_s.
"""

from __future__ import annotations

from itertools import islice

from schema.errors import Fault, Unschedulable
from schema.states import InstanceState, ModelState, NodeState
from sllmctl.cluster.plans import Plan, Refusal, Rejection, Wait
from sllmctl.cluster.records import Instance, Model
from sllmctl.control import instances, nodes, placing
from sllmctl.control.effects import RejectWaiting
from sllmctl.control.turn import Turn

__all__ = ["look_around", "place_aged", "place_refused", "scale"]

_I = InstanceState
_IN_A_ROW = 4
_LONGEST_LOOK_S = 10.0
"""A wait that was decided is looked at again within this, however long it is."""


def place_aged(turn: Turn) -> None:
    """Room may have appeared: those whose requests wait too long already are asked first."""
    row = at = 0
    line = turn.view.line
    while row < _IN_A_ROW and at < len(line):
        since, name = line[at]
        if turn.now - since < turn.settings.age_s:
            return
        if _still_refused(turn, name):
            row, at = row + 1, at + 1
        else:
            row = 0


def place_refused(turn: Turn) -> None:
    """Room may have appeared: those who were refused are asked again, as the module says."""
    before = len(turn.view.refused)
    turn.core.unasked = before - _ask(turn, 0)
    if turn.core.unasked:
        turn.wake("refused", "", turn.now + turn.settings.evict_look_s)


def look_around(turn: Turn) -> None:
    """A time asked for has come: the longest-refused are asked again, and some of the others in turn."""
    core, view = turn.core, turn.view
    asked = _ask(turn, 0)
    if len(view.refused) > _IN_A_ROW:
        turned = core.turned if core.turned < len(view.refused) else 0
        asked += _ask(turn, turned)
        core.turned = turned + _IN_A_ROW
    core.unasked = max(0, core.unasked - asked)
    if core.unasked or view.line:
        turn.wake("refused", "", turn.now + turn.settings.evict_look_s)


def _ask(turn: Turn, at: int) -> int:
    """Those who were refused, from a place in their order on, until `_IN_A_ROW` are refused again; returns how many were asked.
    Who was asked in this turn is passed over."""
    row = asked = 0
    refused = turn.view.refused
    while row < _IN_A_ROW:
        name = next(islice(refused, at, None), None)
        if name is None:
            break
        if name in turn.asked:
            at += 1
            continue
        asked += 1
        if _still_refused(turn, name):
            row, at = row + 1, at + 1
        else:
            row = 0
    return asked


def _still_refused(turn: Turn, name: str) -> bool:
    model = turn.view.models[name]
    turn.asked.add(name)
    scale(turn, model, look=True)
    return bool(model.refusal)


def scale(turn: Turn, model: Model, *, look: bool = False) -> None:
    """Start or stop instances until the model has what it should have now; ask to be woken when time alone changes that.

    A model that is to wait, or was refused, is not planned for again at each of its requests, unless it is time to ``look``.
    """
    if model.state is not ModelState.DEPLOYED:
        turn.view.set_refusal(model, "")
        model.no_place = ""
        for instance in list(turn.view.instances_of(model.name).values()):
            instances.stop(turn, instance, "Stopping", f"model {model.name} is {model.state.value}")
        return
    if turn.core.closing:
        return
    _start_missing(turn, model, look)
    _stop_surplus(turn, model)


def _start_missing(turn: Turn, model: Model, look: bool) -> None:
    view, core = turn.view, turn.core
    missing = _missing(turn, model)
    later = core.look_at.get(model.name, 0.0)
    if missing and not look and later > turn.now and (model.waiting or later != float("inf")):
        turn.wake("model", model.name, later)
        return
    core.look_at.pop(model.name, None)
    while missing:
        wait_s = core.journals.wait_s(model.name) if model.waiting and _serving(turn, model) else None
        decision = core.planner.plan(model, turn.now, wait_s=wait_s)
        if isinstance(decision, Plan):
            waiting = model.waiting
            instance = placing.carry_out(turn, model, decision)
            core.decisions.add(turn.now, model.name, instance.id, waiting, decision)
            view.set_refusal(model, "")
            model.no_place = ""
            missing -= 1
            continue
        core.decisions.add(turn.now, model.name, None, model.waiting, decision)
        if isinstance(decision, Wait):
            view.set_refusal(model, "")
            model.no_place = ""
            _look_later(turn, model, min(max(decision.wait_s / 2, turn.settings.evict_look_s), _LONGEST_LOOK_S))
        else:
            _refused(turn, model, decision)
        return
    view.set_refusal(model, "")
    failed = [one for one in view.instances_of(model.name).values() if one.state is _I.FAILED]
    if model.waiting and failed and not _active(turn, model):
        first = instances.tried_first(failed)
        why = first.fault.message if first.fault is not None else "unknown"
        text = f"model {model.name!r} has only failed instances, {first.id} for: {why}; {instances.tried_again(turn, first)}"
        after_s = None if first.retry_at is None else max(0.0, first.retry_at - turn.now)
        turn.do(RejectWaiting(model.name, Fault.of(Unschedulable(text)), after_s))


def _look_later(turn: Turn, model: Model, seconds: float) -> None:
    turn.core.look_at[model.name] = turn.now + seconds
    turn.wake("model", model.name, turn.now + seconds)


def _refused(turn: Turn, model: Model, refusal: Refusal) -> None:
    if refusal.reason != model.complaint and not (Rejection.UNREACHABLE in refusal.rejected and nodes.any_expected(turn)):
        model.complaint = refusal.reason
        turn.event("model", model.name, "Unschedulable", refusal.reason, level="warning")
    turn.view.set_refusal(model, refusal.reason)
    model.no_place = refusal.reason if refusal.hopeless else ""
    if not model.waiting:
        return
    if not refusal.hopeless:
        turn.core.look_at[model.name] = float("inf")
        turn.wake("refused", "", turn.now + turn.settings.evict_look_s)
    elif not _active(turn, model):
        turn.do(RejectWaiting(model.name, Fault.of(Unschedulable(refusal.reason))))


def _active(turn: Turn, model: Model) -> list[Instance]:
    """The instances that a model has; one that moves is replaced by its target."""
    there = turn.view.instances_of(model.name).values()
    return [one for one in there if one.state in instances.ACTIVE and not one.moving]


def _serving(turn: Turn, model: Model) -> bool:
    there = turn.view.instances_of(model.name).values()
    return any(one.state is _I.READY and turn.view.nodes[one.node].state is NodeState.READY for one in there)


def _missing(turn: Turn, model: Model) -> int:
    """How many instances to start now."""
    rule = model.spec.scale
    slots = rule.max - sum(instances.holds_place(one) for one in turn.view.instances_of(model.name).values())
    below = rule.min - (rule.max - slots)
    if not model.waiting:
        return max(0, min(below, slots))
    if model.waiting_since is not None and _serving(turn, model) and turn.core.journals.wait_s(model.name) is None:
        at = model.waiting_since + turn.settings.scale_up_after_s
        if at > turn.now:
            turn.wake("model", model.name, at)
            return max(0, min(below, slots))
    coming = sum(one.state is not _I.READY or _just_ready(turn, one) for one in _active(turn, model))
    wanted = -(-model.waiting // rule.max_concurrency) - coming
    return max(0, min(max(below, wanted), slots))


def _just_ready(turn: Turn, instance: Instance) -> bool:
    """The router's last word may be from before it was told of this instance: who waited may run on it by now."""
    if instance.ready_at is None or instance.ready_at + turn.settings.scale_up_after_s <= turn.now:
        return False
    turn.wake("model", instance.model, instance.ready_at + turn.settings.scale_up_after_s)
    return True


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
    for instance in [one for one in active if one.state is _I.PLANNED and not turn.core.is_moved_to(one.id)][:spare]:
        instances.stop(turn, instance, "Gone", "nobody waits for it any more")
        active.remove(instance)
        spare -= 1
    keep_alive_s = -1.0
    for instance in sorted(active, key=lambda one: (one.idle_since or 0.0, one.id)):
        if instance.idle_since is None or instance.running or turn.view.nodes[instance.node].state is not NodeState.READY:
            continue
        if keep_alive_s < 0.0:
            keep_alive_s = instances.keep_alive_s(turn, model)
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
    return (instance.state is _I.READY, instance.running, instance.idle_since or 0.0)
