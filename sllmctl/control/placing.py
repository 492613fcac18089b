"""Plans carried out: the place reserved first, then those who leave told so, and the newcomer begun when its room is there.

What begins is decided from the view alone, so that a restarted manager goes on by the same rule: a planned instance begins when
the instances with a life (and those between two lives) leave it room on its devices and in the arena, those planned on the
same devices before it counted first. Weights that nobody uses are dropped as far as its room needs that.
"""

from __future__ import annotations

from dataclasses import dataclass

from schema.states import InstanceState, NodeState, Tier, TierState
from sllmctl.cluster.plans import Candidate, Move, Plan
from sllmctl.cluster.records import LEAVING, STANDING, Instance, Model, Node
from sllmctl.control import drops, instances
from sllmctl.control.effects import Migrate
from sllmctl.control.turn import Moving, Turn

__all__ = ["carry_out", "follow", "give_up", "settle"]

_I = InstanceState
_LOST = frozenset({_I.DRAINING, _I.STOPPING, _I.STOPPED, _I.BACKOFF, _I.FAILED})


def carry_out(turn: Turn, model: Model, plan: Plan) -> Instance:
    """Make the instance of a plan, and its room."""
    best = plan.best
    instance = instances.create(turn, model, plan)
    for digest in best.drops:
        _drop_idle(turn, best.node, digest)
    longest_s = turn.settings.drain_longest_s
    whose = f"model {model.name} takes its room"
    for name in best.stops:
        _end(turn, name, "Evicted", f"it was idle, and {whose}", None)
    for name in best.drains:
        _end(turn, name, "Evicted", f"it takes nothing new, and {whose}", longest_s)
    for name in best.preempts:
        _end(turn, name, "Preempted", whose, 0.0)
    for move in best.moves:
        _begin_move(turn, instance, move)
    settle(turn, best.node)
    return instance


def _end(turn: Turn, name: str, reason: str, message: str, grace_s: float | None) -> None:
    victim = turn.view.instances.get(name)
    if victim is not None:
        instances.stop(turn, victim, reason, message, grace_s=grace_s)


# --- beginning what is planned ---


def settle(turn: Turn, node_id: str) -> None:
    """Begin what is planned on a node and has its room now; make idle weights leave for what has not."""
    planned = turn.view.memory.planned_on(node_id)
    node = turn.view.nodes[node_id]
    if turn.core.closing or not planned or node.state is not NodeState.READY or node.inventory is None:
        return
    ahead: list[Instance] = []
    for instance in list(planned.values()):
        lacks = _lacks(turn, node, instance, ahead)
        if all(lack.bytes <= 0 for lack in lacks) and _arena_fits(turn, node, instance):
            instances.begin_life(turn, instance)
            continue
        stays = any(lack.bytes > lack.leaving_bytes + sum(lack.lying.values()) for lack in lacks)
        if stays or _arena_stays(turn, node, instance):
            give_up(turn, instance, "those who were to make its room stay")
            continue
        _make_lying_leave(turn, instance, lacks)
        ahead.append(instance)


@dataclass(slots=True)
class _Lack:
    """The bytes that a device lacks for a planned instance (none if below 0), and who will give some of them: instances that
    leave, and ``lying`` weights that nobody with a life uses."""

    device: int
    bytes: int
    leaving_bytes: int
    lying: dict[str, int]


def _lacks(turn: Turn, node: Node, instance: Instance, ahead: list[Instance]) -> list[_Lack]:
    """What each of its devices lacks, those planned ``ahead`` counted in. Its own weights, and theirs, where they lie
    already, take no new room."""
    assert node.inventory is not None
    memory = turn.view.memory
    sizes = {device.index: device.memory_bytes for device in node.inventory.devices}
    found: list[_Lack] = []
    for device, need in memory.device_need_bytes(node.id, instance.digest, instance.devices, instance.working_bytes).items():
        lying = {digest: size for digest, size in memory.lying_bytes(node.id, device).items() if digest != instance.digest}
        taken = memory.live_bytes(node.id, device)
        for one in ahead:
            if device in one.devices:
                taken += memory.device_need_bytes(node.id, one.digest, one.devices, one.working_bytes)[device]
                lying.pop(one.digest, None)
        missing = taken + sum(lying.values()) + need - sizes.get(device, 0)
        leaving = (
            memory.leaving_bytes.get((node.id, device), 0) + _leaving_by_moves(turn, node.id, device) if missing > 0 else 0
        )
        found.append(_Lack(device, missing, leaving, lying))
    return found


def give_up(turn: Turn, instance: Instance, why: str) -> None:
    """No room will come for what was planned: it is planned anew, but a little later, since little may have changed."""
    instances.retire(turn, instance, "RoomLost", f"{why}; it is planned anew", level="warning")
    at = turn.now + turn.settings.evict_look_s
    turn.core.look_at[instance.model] = at
    turn.wake("model", instance.model, at)


def _arena_fits(turn: Turn, node: Node, instance: Instance) -> bool:
    """Weights that lie on all its devices already need no arena room."""
    assert node.inventory is not None
    view = turn.view
    if view.memory.arena_live_bytes(node.id, instance.digest) <= node.inventory.arena.budget_bytes:
        return True
    return all(
        (record := view.placements.get((instance.digest, node.id, Tier.DEVICE, device))) is not None
        and record.state is TierState.RESIDENT
        for device in instance.devices
    )


def _arena_stays(turn: Turn, node: Node, instance: Instance) -> bool:
    """True if the arena lacks room for its weights even when all who leave have left."""
    assert node.inventory is not None
    if _arena_fits(turn, node, instance):
        return False
    stay = {
        one.digest
        for one in turn.view.instances_on(node.id).values()
        if one.state in STANDING and one.state not in LEAVING and one.id not in turn.core.moves
    }
    stay |= {digest for digest, tier in turn.view.pins_on(node.id) if tier is Tier.DRAM and _lies(turn, digest, node)}
    used = sum(turn.view.memory.arena_bytes_of(node.id, digest) for digest in stay | {instance.digest})
    return used > node.inventory.arena.budget_bytes


def _lies(turn: Turn, digest: str, node: Node) -> bool:
    return (digest, node.id, Tier.DRAM, 0) in turn.view.placements


def _make_lying_leave(turn: Turn, instance: Instance, lacks: list[_Lack]) -> None:
    """Drop weights that nobody uses, those first that its plan named, as far as its devices lack room beyond who leaves.

    Room that instances on their way out will give is not made by dropping weights.
    """
    view, node = turn.view, instance.node
    named = set(instance.plan.best.drops) if instance.plan is not None else set()
    for one in lacks:
        idle = view.memory.idle_weights.get((node, one.device), {})
        lack = one.bytes - one.leaving_bytes - sum(size for digest, size in one.lying.items() if digest not in idle)
        for digest in sorted(idle, key=lambda digest: (digest not in named, idle[digest], digest)):
            if lack <= 0:
                break
            lack -= idle[digest]
            _drop_idle(turn, node, digest)


def _leaving_by_moves(turn: Turn, node: str, device: int) -> int:
    """Room that those will give who go elsewhere."""
    view = turn.view
    total = 0
    for name in turn.core.moves:
        one = view.instances.get(name)
        if one is not None and one.node == node and device in one.devices and one.state is _I.READY:
            total += view.memory.device_need_bytes(node, one.digest, one.devices, one.working_bytes)[device]
    return total


def _drop_idle(turn: Turn, node: str, digest: str) -> None:
    """Take weights from the devices of a node on which nobody uses them; they count as neither idle nor there from now on."""
    view = turn.view
    devices = [
        record.device
        for record in view.placements_at(digest, node).values()
        if record.tier is Tier.DEVICE and digest in view.memory.idle_weights.get((node, record.device), {})
    ]
    if devices:
        drops.begin(turn, node, digest, Tier.DEVICE)


# --- moves ---


def _begin_move(turn: Turn, cause: Instance, move: Move) -> None:
    view = turn.view
    source = view.instances.get(move.instance)
    if source is None or source.state is not _I.READY or source.id in turn.core.moves:
        return
    target = view.instances.get(move.target) if move.target else _make_target(turn, source, move)
    if target is None:
        return
    turn.core.begin_move(Moving(source.id, target.id, cause.id, made=not move.target))
    source.moving = True
    for digest in move.drops:
        _drop_idle(turn, target.node, digest)
    turn.settle[target.node] = None
    turn.involved[source.id] = None


def _make_target(turn: Turn, source: Instance, move: Move) -> Instance:
    node = turn.view.nodes[move.node]
    place = Candidate(
        node=move.node,
        name=node.name,
        devices=move.devices,
        working_bytes=move.working_bytes,
        source=move.source,
        peer=move.peer,
        startup_s=move.ready_s,
        drops=move.drops,
    )
    plan = Plan(place, (), {}, f"on {node.name}, to take over from {source.id}")
    return instances.create(turn, turn.view.models[source.model], plan)


def follow(turn: Turn, name: str) -> None:
    """An instance that has to do with a move has changed: go on with the move, or give it up."""
    for moving in turn.core.moves_of(name):
        _judge(turn, moving)


def _judge(turn: Turn, moving: Moving) -> None:
    view = turn.view
    source, target, cause = (view.instances.get(one) for one in (moving.source, moving.target, moving.cause))
    if source is None or source.state is not _I.READY:
        _end_move(turn, moving)
        _spare_target(turn, moving, target)
    elif source.idle_since is not None:
        _end_move(turn, moving)
        instances.stop(turn, source, "Evicted", "it was to move, and has nothing left to do")
        _spare_target(turn, moving, target)
    elif target is None or target.state in _LOST:
        _end_move(turn, moving)
        if target is not None and moving.made:
            instances.stop(turn, target, "Stopping", "it could not take over in time")
        if cause is not None and cause.state is _I.PLANNED:
            give_up(turn, cause, f"{moving.source} cannot move, {moving.target} is lost")
    elif cause is None or cause.state is not _I.PLANNED:
        _end_move(turn, moving)
        if moving.made and target.state is not _I.READY:
            instances.stop(turn, target, "Stopping", f"{moving.source} stays where it is")
    elif target.state is _I.READY:
        _end_move(turn, moving)
        turn.do(Migrate(source.id, target.id))
        turn.event("instance", source.id, "Migrating", f"its sequences go on on {target.id}")
        longest_s = turn.settings.drain_longest_s
        instances.stop(turn, source, "Moved", f"its sequences go to {target.id}", grace_s=longest_s)


def _spare_target(turn: Turn, moving: Moving, target: Instance | None) -> None:
    """Nothing is left to take over: a target that was made for it goes, unless its model needs it."""
    if target is not None and moving.made and not _needed(turn, target):
        instances.stop(turn, target, "Stopping", f"{moving.source} ended by itself; nothing is left to take over")


def _end_move(turn: Turn, moving: Moving) -> None:
    turn.core.end_move(moving)
    source = turn.view.instances.get(moving.source)
    if source is not None:
        source.moving = False
        turn.rescale[source.model] = None


def _needed(turn: Turn, target: Instance) -> bool:
    model = turn.view.models[target.model]
    others = sum(one.state in instances.ACTIVE for one in turn.view.instances_of(model.name).values() if one is not target)
    return bool(model.waiting or model.running or others < model.spec.scale.min)
