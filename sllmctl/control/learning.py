"""What the loop tells the estimates: starts under way, what they took, and prefills; with outcomes beside estimates."""

from __future__ import annotations

from schema.admin import OutcomeView
from schema.states import NodeState, Tier, TierState
from sllmctl.cluster.records import Instance, Node
from sllmctl.cluster.view import ClusterView
from sllmctl.control.events import PrefillTimed
from sllmctl.control.turn import Turn

__all__ = ["began", "ended", "prefilled", "started", "zygote_stated"]

_PREFILL_OUTCOME_EVERY_S = 10.0


def began(turn: Turn, instance: Instance) -> None:
    """A life has begun: its load stands in the queues of its path, where its plan says or, for a restart, where weights lie."""
    view, estimates = turn.view, turn.core.estimates
    node, checkpoint = view.nodes[instance.node], view.checkpoints[instance.digest]
    best = instance.plan.best if instance.plan is not None and instance.ready_at is None and not instance.restarts else None
    if best is not None:
        instance.source, peer = best.source, best.peer
        instance.expected_s = max(0.0, best.startup_s - best.room_s)
    else:
        instance.source, peer = _nearest(view, instance), ""
        instance.expected_s = estimates.startup(node, checkpoint, instance.devices, instance.source, peer, turn.now).total_s
    estimates.began(instance.id, node, checkpoint, instance.devices, instance.source, peer, turn.now)


def _nearest(view: ClusterView, instance: Instance) -> Tier:
    """The fastest tier of its node that has its weights."""
    records = view.placements_at(instance.digest, instance.node).values()
    resident = [(record.tier, record.device) for record in records if record.state is TierState.RESIDENT]
    if all((Tier.DEVICE, device) in resident for device in instance.devices):
        return Tier.DEVICE
    if any(tier is Tier.DRAM for tier, _ in resident):
        return Tier.DRAM
    on_disk = any(tier is Tier.DISK for tier, _ in resident)
    return Tier.REMOTE if not on_disk and view.is_published(instance.digest) else Tier.DISK


def started(turn: Turn, instance: Instance) -> None:
    """It is ready and has all its weights: what it took corrects the estimates. How long that was is known only of a life that
    this manager began, on a node that it has not lost sight of since."""
    view, estimates = turn.view, turn.core.estimates
    estimates.ended(instance.id, turn.now)
    node, checkpoint = view.nodes[instance.node], view.checkpoints.get(instance.digest)
    if instance.phases is None or checkpoint is None or node.state is not NodeState.READY:
        return
    for row in estimates.started(node, checkpoint, instance.devices, instance.phases, turn.now):
        turn.append(row)
    if instance.expected_s is None or node.seen_at > instance.life_at:
        return
    turn.append(
        OutcomeView(
            at=turn.now,
            kind="start",
            model=instance.model,
            node=node.name,
            source=instance.source.value,
            estimated_s=instance.expected_s,
            actual_s=turn.now - instance.life_at,
        )
    )


def zygote_stated(turn: Turn, node: Node, *, ready: bool) -> None:
    """A node has a zygote that can fork, or none yet: how long it was without tells how long the next one will import."""
    if not ready:
        node.imports_since = turn.now if node.imports_since is None else node.imports_since
    elif node.imports_since is not None:
        for row in turn.core.estimates.imported(node, turn.now):
            turn.append(row)
        node.imports_since = None


def ended(turn: Turn, instance: Instance) -> None:
    """Its load, if one is still under way, is over."""
    turn.core.estimates.ended(instance.id, turn.now)


def prefilled(turn: Turn, event: PrefillTimed) -> None:
    """A prefill tells what moving a sequence would cost."""
    view, core = turn.view, turn.core
    instance = view.instances.get(event.instance)
    inventory = view.nodes[instance.node].inventory if instance is not None else None
    if instance is None or inventory is None:
        return
    kind = next((device.kind for device in inventory.devices if device.index in instance.devices), None)
    if kind is None:
        return
    estimated_s = core.estimates.migration_s(instance.digest, kind, event.tokens)
    for row in core.estimates.prefilled(instance.digest, kind, event.tokens, event.seconds, turn.now):
        turn.append(row)
    if turn.now < core.prefill_outcome_at:
        return
    core.prefill_outcome_at = turn.now + _PREFILL_OUTCOME_EVERY_S
    turn.append(
        OutcomeView(
            at=turn.now,
            kind="prefill",
            model=instance.model,
            node=view.nodes[instance.node].name,
            source="",
            estimated_s=estimated_s,
            actual_s=event.seconds,
        )
    )
