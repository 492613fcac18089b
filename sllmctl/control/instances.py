"""The lives of instances: begun, ready, dead and begun again, drained, stopped, and what nodes say of them."""

from __future__ import annotations

from collections.abc import Iterable

from schema.errors import Fault, InvalidCheckpoint
from schema.ids import Epoch
from schema.link import EngineOptions, InstanceTruth, RemoteCopy, StartInstance, StopInstance
from schema.pauses import growing_pause_s
from schema.states import InstanceState, ModelState, NodeState, Tier, TierState, can_become
from sllmctl.cluster.plans import Plan
from sllmctl.cluster.records import HOLDING, LIVE, Instance, Model
from sllmctl.control import disk, learning, remotes
from sllmctl.control.effects import RouteChanged
from sllmctl.control.events import StopInstanceNow
from sllmctl.control.references import missing
from sllmctl.control.turn import Turn
from sllmctl.planner.memory import context_tokens, step_bytes

__all__ = [
    "ACTIVE",
    "adopt",
    "begin_life",
    "check",
    "create",
    "died",
    "holds_place",
    "keep_alive_s",
    "move",
    "retire",
    "route",
    "stop",
    "stop_now",
    "stop_stranger",
    "tried_again",
    "tried_first",
]

_I = InstanceState

ACTIVE = frozenset({_I.PLANNED, _I.STARTING, _I.READY, _I.BACKOFF})
"""States that count as an instance the model has; one that drains or stops is on its way out."""

_ENDING = frozenset({_I.DRAINING, _I.STOPPING})
_PERMANENT = frozenset({"invalid_checkpoint", "invalid_input"})
"""Codes of faults that no restart can mend."""


def move(turn: Turn, instance: Instance, state: InstanceState) -> None:
    """The one place where we decide a transition; what a node states is adopted elsewhere, unjudged."""
    assert can_become(instance.state, state), f"instance {instance.id}: {instance.state} cannot become {state}"
    _set(turn, instance, state)


def _set(turn: Turn, instance: Instance, state: InstanceState) -> None:
    if instance.state in HOLDING and state not in HOLDING:
        turn.free()
        turn.settle[instance.node] = None
    if instance.state is _I.READY:
        turn.look_now(instance.model)
    if state is not _I.READY:  # one that is ready may still wait for the last of its weights
        learning.ended(turn, instance)
    if turn.core.takes_part(instance.id):
        turn.involved[instance.id] = None
    turn.view.set_state(instance, state)
    if state is not _I.READY:
        turn.view.set_activity(instance, instance.running, None)
    turn.put_instance(instance)


def route(turn: Turn, instance: Instance) -> None:
    """Tell the router how an instance stands."""
    turn.do(
        RouteChanged(
            model=instance.model,
            node=instance.node,
            instance=instance.id,
            epoch=instance.epoch,
            state=instance.state,
            reachable=turn.view.nodes[instance.node].state is NodeState.READY,
            kv_capacity_tokens=instance.kv_capacity_tokens,
            max_context_tokens=instance.max_context_tokens,
            max_concurrency=turn.view.models[instance.model].spec.scale.max_concurrency,
            node_name=turn.view.nodes[instance.node].name,
        )
    )


def create(turn: Turn, model: Model, plan: Plan) -> Instance:
    """A new instance where the plan says: its room is reserved, its life begins when the room is there."""
    assert model.digest is not None
    best = plan.best
    instance = Instance(
        id=turn.core.ids("inst"),
        model=model.name,
        node=best.node,
        digest=model.digest,
        epoch=Epoch(0),
        state=_I.PLANNED,
        devices=best.devices,
        working_bytes=best.working_bytes,
        restarts=0,
        retry_at=None,
        fault=None,
        phases=None,
        reason=plan.reason,
        created_at=turn.now,
        changed_at=turn.now,
        life_at=turn.now,
        plan=plan,
    )
    turn.view.add_instance(instance)
    turn.put_instance(instance)
    turn.event("instance", instance.id, "Scheduled", f"model {model.name} {plan.reason}")
    turn.wake("instance", instance.id, turn.now + turn.settings.room_timeout_s)
    route(turn, instance)
    return instance


def begin_life(turn: Turn, instance: Instance) -> None:
    """Start a new life, fenced by a new epoch; its node is told once the row is durable."""
    model = turn.view.models[instance.model]
    move(turn, instance, _I.STARTING)
    instance.epoch = turn.core.epochs.next()
    learning.began(turn, instance)
    instance.retry_at = instance.ready_at = None
    instance.phases = None
    instance.pid = instance.running = instance.kv_capacity_tokens = instance.max_context_tokens = 0
    instance.activation_bytes = instance.logits_bytes = 0
    checkpoint = turn.view.checkpoints[instance.digest]
    beside = step_bytes(model.spec, checkpoint, turn.settings)
    instance.life_at = turn.now
    turn.wake("instance", instance.id, turn.now + _start_limit_s(turn, instance))
    turn.touch(instance.digest, instance.node)
    route(turn, instance)
    turn.send(
        instance.node,
        StartInstance(
            instance=instance.id,
            epoch=instance.epoch,
            model=model.name,
            digest=instance.digest,
            devices=instance.devices,
            options=EngineOptions(
                kv_bytes=max(0, instance.working_bytes - beside),
                step_bytes=beside,
                max_context_tokens=context_tokens(model.spec, checkpoint),
                max_concurrency=model.spec.scale.max_concurrency,
                threads=model.spec.engine.threads or 0,
                deterministic=model.spec.engine.deterministic,
            ),
            remote=_remote_copy(turn, instance),
        ),
    )


def stop(turn: Turn, instance: Instance, reason: str, message: str, *, grace_s: float | None = None) -> None:
    """End an instance for good: one that serves drains first, for ``grace_s`` or else drain_s; with none at all it ends at
    once, and so does one without a life."""
    match instance.state:
        case _I.DRAINING | _I.STOPPING | _I.STOPPED:
            return
        case _I.READY if grace_s != 0.0:
            move(turn, instance, _I.DRAINING)
            instance.grace_s = grace_s
            given_s = _grace_s(turn, instance)
        case _I.READY:
            move(turn, instance, _I.STOPPING)
            given_s = 0.0
        case _I.STARTING:
            move(turn, instance, _I.STOPPING)
            given_s = 0.0
        case _:
            _acknowledge(turn, instance)
            retire(turn, instance, reason, message)
            return
    instance.life_at = turn.now
    turn.event("instance", instance.id, reason, message)
    turn.wake("instance", instance.id, turn.now + given_s + turn.settings.stop_timeout_s)
    turn.rescale[instance.model] = None
    route(turn, instance)
    turn.send(instance.node, StopInstance(instance=instance.id, epoch=instance.epoch, grace_s=given_s))


def _grace_s(turn: Turn, instance: Instance) -> float:
    return turn.settings.drain_s if instance.grace_s is None else instance.grace_s


def stop_now(turn: Turn, event: StopInstanceNow) -> None:
    """An operator stops one instance. Raises NotFound."""
    instance = turn.view.instances.get(event.instance)
    if instance is None:
        raise missing("instance", event.instance)
    stop(turn, instance, "Stopping", "an operator stopped it")


def stop_stranger(turn: Turn, node: str, truth: InstanceTruth) -> None:
    """A node has a life that is not, or no longer, the manager's: it is to go, and need not be stated any more."""
    turn.send(node, StopInstance(instance=truth.instance, epoch=truth.epoch))


def retire(turn: Turn, instance: Instance, reason: str, message: str, *, level: str = "info") -> None:
    """The instance has no life and gets none: forget it, and see whether its model wants another."""
    _count_back(turn, instance)
    move(turn, instance, _I.STOPPED)
    route(turn, instance)
    turn.remove_instance(instance)
    turn.event("instance", instance.id, reason, message, level=level)
    turn.rescale[instance.model] = None


def died(turn: Turn, instance: Instance, fault: Fault | None, remote: str = "") -> None:
    """Its life is over. Begin another at once, later, or never, as it is wanted and as often as it died.

    Without a fault it ended in order or is simply not there any more. ``remote``: the fault is of what lies there.
    """
    if instance.state not in LIVE:
        return
    _count_back(turn, instance)
    why = fault.message if fault is not None else "its node does not have it any more"
    if instance.state in _ENDING:
        retire(turn, instance, "Stopped", "it has stopped")
        return
    if not _wanted(turn, instance, crashed=fault is not None):
        _acknowledge(turn, instance)
        retire(turn, instance, "Gone", why, level="info" if fault is None else "warning")
        return
    elsewhere = _doubt_remote(turn, instance, fault, remote)
    instance.restarts += 1
    instance.fault = fault or Fault("unreachable", why)
    if instance.fault.short_bytes:  # a start from a remote would have passed the disk's budget
        disk.make_room(turn, instance.node, instance.fault.short_bytes, f"model {instance.model}")
    turn.event("instance", instance.id, "Crashed", why, level="warning")
    wrong = instance.fault.code == InvalidCheckpoint.code
    # Its node looks at the copy now: if that is found wrong the instance is planned anew (`nodes.py`), and who waits is served.
    looked_at = wrong and not elsewhere and instance.restarts == 1
    looked_at = looked_at and turn.view.has_replaceable_copy(instance, TierState.RESIDENT)
    if wrong and turn.view.has_replaceable_copy(instance, TierState.QUARANTINED):
        _acknowledge(turn, instance)
        retire(turn, instance, "Gone", "its weights were found wrong; it is planned anew", level="warning")
    elif instance.restarts > turn.settings.restarts_max or (
        instance.fault.code in _PERMANENT and not elsewhere and not looked_at
    ):
        _fail(turn, instance)
    else:
        _back_off(turn, instance, least_s=turn.settings.restart_first_s if looked_at else 0.0)


def _count_back(turn: Turn, instance: Instance) -> None:
    """A life that is over and was well tells that the model can live, and there."""
    if instance.state in LIVE and instance.ready_at is not None and turn.now - instance.ready_at >= turn.settings.healthy_s:
        model = turn.view.models[instance.model]
        instance.restarts = model.given_up = 0
        model.avoided.pop(instance.node, None)


def keep_alive_s(turn: Turn, model: Model) -> float:
    """How long an idle instance of a model is kept."""
    chosen = model.spec.scale.keep_alive_s
    if chosen is not None:
        return chosen
    settings = turn.settings
    wanted = settings.keep_alive_per_reload * turn.core.planner.reload_s(model, turn.now)
    return min(max(wanted, settings.keep_alive_least_s), settings.keep_alive_most_s)


def _wanted(turn: Turn, instance: Instance, *, crashed: bool) -> bool:
    """True if the model would have to start another one for it: there is demand, too few others, or its keep-alive runs.
    One that moves has a successor already."""
    model = turn.view.models[instance.model]
    if model.state is not ModelState.DEPLOYED or turn.core.closing:
        return False
    scale = model.spec.scale
    others = sum(other.state in ACTIVE for other in turn.view.instances_of(model.name).values() if other is not instance)
    if others >= scale.max or instance.moving:
        return False
    if model.waiting or model.running or instance.running or others < scale.min:
        return True
    return crashed and instance.idle_since is not None and turn.now - instance.idle_since < keep_alive_s(turn, model)


def _fail(turn: Turn, instance: Instance) -> None:
    """Give it up for now, and its room back: it is planned anew after a pause that doubles each time, or what can never start
    once something has changed that may mend it (`retrying.py`)."""
    assert instance.fault is not None
    settings, model = turn.settings, turn.view.models[instance.model]
    _acknowledge(turn, instance)
    instance.retry_at = None
    pause_s = settings.retry_longest_s
    if instance.fault.code not in _PERMANENT:
        pause_s = growing_pause_s(settings.retry_first_s, settings.retry_longest_s, model.given_up)
        instance.retry_at = turn.now + pause_s
        turn.wake("instance", instance.id, instance.retry_at)
        model.given_up += 1
    model.avoided[instance.node] = turn.now + 2.0 * pause_s  # over its next try, and as long again
    move(turn, instance, _I.FAILED)
    route(turn, instance)
    times = f"after {instance.restarts - 1} restarts" if instance.restarts > 1 else "and can never start"
    message = f"given up {times}: {instance.fault.message}; {tried_again(turn, instance)}"
    turn.event("instance", instance.id, "Failed", message, level="error")
    turn.rescale[instance.model] = None


def holds_place(instance: Instance) -> bool:
    """Whether it counts among the instances that its model may have. A failed one does until it is planned anew, or a model
    that always fails would start without a pause."""
    return (instance.state in ACTIVE and not instance.moving) or instance.state is _I.FAILED


def tried_first(wrong: Iterable[Instance]) -> Instance:
    """Of instances that are between two lives, or failed, the one that is tried again before the others."""
    return min(wrong, key=lambda one: (one.retry_at is None, one.retry_at, one.id))


def tried_again(turn: Turn, instance: Instance) -> str:
    """When a failed instance is planned anew, and how to have that at once."""
    when = "once another node joins or comes back, or a sound copy of its checkpoint appears"
    if instance.retry_at is not None:
        when = f"in {max(0.0, instance.retry_at - turn.now):.0f} s"
    return f"it is tried again {when}; `sllmctl model deploy {instance.model}` tries it at once"


def _back_off(turn: Turn, instance: Instance, *, least_s: float = 0.0) -> None:
    """The first restart is immediate, since a stream may be waiting for it; then the delay doubles."""
    settings = turn.settings
    delay_s = least_s
    if instance.restarts > 1:
        delay_s = growing_pause_s(settings.restart_first_s, settings.restart_longest_s, instance.restarts - 2)
    instance.retry_at = turn.now + delay_s
    move(turn, instance, _I.BACKOFF)
    route(turn, instance)
    if delay_s == 0.0 and turn.view.nodes[instance.node].state is NodeState.READY:
        begin_life(turn, instance)
        return
    turn.event("instance", instance.id, "BackOff", f"restart {instance.restarts} follows in {delay_s:g} s", level="warning")
    turn.wake("instance", instance.id, instance.retry_at)


def _acknowledge(turn: Turn, instance: Instance) -> None:
    """A stopped life is stated until it is told to stop or a newer one begins."""
    if instance.epoch:
        turn.send(instance.node, StopInstance(instance=instance.id, epoch=instance.epoch))


def adopt(turn: Turn, instance: Instance, truth: InstanceTruth, *, whole: bool) -> None:
    """Take what its node says of an instance. ``whole``: it is part of a `NodeTruth`, before which words may have been lost."""
    if truth.epoch < instance.epoch:
        if whole:
            stop_stranger(turn, instance.node, truth)
        return
    instance.epoch = truth.epoch
    if truth.state is _I.STOPPED:
        if instance.state in LIVE:
            died(turn, instance, truth.fault, truth.remote)
        elif whole and instance.state is _I.FAILED:
            stop_stranger(turn, instance.node, truth)
        return
    if instance.state in _ENDING or instance.state not in LIVE:
        if whole:
            grace_s = _grace_s(turn, instance) if instance.state is _I.DRAINING else 0.0
            turn.send(instance.node, StopInstance(instance=instance.id, epoch=instance.epoch, grace_s=grace_s))
        if instance.state is _I.DRAINING and truth.state is _I.STOPPING:
            _set(turn, instance, _I.STOPPING)
            route(turn, instance)
        return
    _take(turn, instance, truth)


def _take(turn: Turn, instance: Instance, truth: InstanceTruth) -> None:
    """A living one that is wanted: its state and numbers are what the node says."""
    before = (instance.state, instance.kv_capacity_tokens, instance.max_context_tokens)
    instance.pid = truth.pid
    instance.kv_capacity_tokens = truth.kv_capacity_tokens
    instance.max_context_tokens = truth.max_context_tokens
    instance.activation_bytes, instance.logits_bytes = truth.activation_bytes, truth.logits_bytes
    told = truth.phases is not None and truth.phases != instance.phases
    if told:
        instance.phases = truth.phases
        turn.put_instance(instance)
    if truth.state is not instance.state:
        _set(turn, instance, truth.state)
        if truth.state in _ENDING:
            instance.life_at = turn.now
            turn.wake("instance", instance.id, turn.now + turn.settings.drain_s + turn.settings.stop_timeout_s)
        turn.rescale[instance.model] = None
    if instance.state is _I.READY and instance.ready_at is None:
        instance.ready_at = turn.now
        if not instance.running:
            turn.view.set_activity(instance, 0, turn.now)
        turn.rescale[instance.model] = None
        if before[0] is not _I.READY:
            instance.fault = None
            whole = instance.phases is not None and instance.phases.total_s
            took = f"after {whole:.2f} s" if whole else "while the last of its weights come"
            turn.event("instance", instance.id, "Ready", f"it serves model {instance.model} {took}")
    if told and instance.state is _I.READY:
        learning.started(turn, instance)
    if before != (instance.state, instance.kv_capacity_tokens, instance.max_context_tokens):
        route(turn, instance)


def check(turn: Turn, instance: Instance) -> None:
    """A time asked for has come: restart it, plan it anew, give its start up, or tell its node again to stop it.

    What it takes a node for waits until that is back; a failed one has nothing there any more.
    """
    if turn.view.nodes[instance.node].state is not NodeState.READY and instance.state is not _I.FAILED:
        return
    settings = turn.settings
    match instance.state:
        case _I.PLANNED:
            at = instance.life_at + settings.room_timeout_s
            if at > turn.now:
                turn.wake("instance", instance.id, at)
                return
            message = f"its room has not come within room_timeout_s, {settings.room_timeout_s:g} s; it is planned anew"
            retire(turn, instance, "NoRoom", message, level="warning")
        case _I.BACKOFF if instance.retry_at is not None:
            if instance.retry_at > turn.now:
                turn.wake("instance", instance.id, instance.retry_at)
            elif _wanted(turn, instance, crashed=True):
                begin_life(turn, instance)
            else:
                _acknowledge(turn, instance)
                retire(turn, instance, "Gone", "nobody waits for it any more")
        case _I.FAILED if instance.retry_at is not None:
            if instance.retry_at > turn.now:
                turn.wake("instance", instance.id, instance.retry_at)
            else:
                stop(turn, instance, "Retried", "its pause is over; another takes its place where one is wanted")
        case _I.STARTING:
            limit_s = _start_limit_s(turn, instance)
            at = instance.life_at + limit_s
            if at > turn.now:
                turn.wake("instance", instance.id, at)
                return
            _acknowledge(turn, instance)
            died(turn, instance, Fault("timed_out", f"it was not ready after {limit_s:g} s (start_timeout_s)"))
        case _I.DRAINING | _I.STOPPING:
            grace_s = _grace_s(turn, instance) if instance.state is _I.DRAINING else 0.0
            at = instance.life_at + grace_s + settings.stop_timeout_s
            if at > turn.now:
                turn.wake("instance", instance.id, at)
                return
            turn.event("instance", instance.id, "StopOverdue", "its node is told again to stop it", level="warning")
            _acknowledge(turn, instance)
            turn.wake("instance", instance.id, turn.now + settings.stop_timeout_s)
        case _:
            return


def _remote_copy(turn: Turn, instance: Instance) -> RemoteCopy | None:
    """Where its node fetches the weights, if they are not on its disk and were published: each restart tries another remote."""
    view = turn.view
    if instance.node in view.nodes_with(instance.digest, Tier.DISK):
        return None
    found = view.trusted_publications_of(instance.digest) or view.publications_of(instance.digest)
    if not found:
        return None
    one = found[instance.restarts % len(found)]
    return RemoteCopy(url=one.url, layout=one.layout)


def _doubt_remote(turn: Turn, instance: Instance, fault: Fault | None, remote: str) -> bool:
    """Its life is over, perhaps by its remote's fault; True when that is in doubt now, and another remote is not."""
    if not remote or fault is None:
        return False
    remotes.doubt(turn, instance.digest, remote, fault)
    trusted = [one.url for one in turn.view.trusted_publications_of(instance.digest)]
    return bool(trusted) and remote not in trusted


def _start_limit_s(turn: Turn, instance: Instance) -> float:
    settings = turn.settings
    return settings.start_timeout_s + (settings.fetch_timeout_s if instance.source is Tier.REMOTE else 0.0)
