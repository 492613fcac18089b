"""What the admin API shows of the cluster: the control loop's view, with the router's live numbers beside it. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import msgspec

from schema.admin import (
    CheckpointView,
    CopyView,
    FailingView,
    InstanceView,
    LoadView,
    ModelView,
    NodeView,
    OperationView,
    PinView,
    PlacementView,
    ProgressView,
    PublicationView,
)
from schema.checkpoint import IN_PLACE
from schema.link import InstanceLoad, Inventory
from schema.states import InstanceState, Tier
from sllmctl.cluster.records import Checkpoint, Instance, Model, Node, Operation
from sllmctl.cluster.view import ClusterView
from sllmctl.control.instances import holds_place, tried_first

__all__ = [
    "LiveNumbers",
    "checkpoint_view",
    "checkpoint_views",
    "held",
    "instance_view",
    "instance_views",
    "model_view",
    "model_views",
    "node_view",
    "node_views",
    "operation_view",
]

_WRONG = frozenset({InstanceState.BACKOFF, InstanceState.FAILED})


class LiveNumbers(Protocol):
    """What only the router knows."""

    def model_counts(self, model: str) -> tuple[int, int]:
        """Requests of a model that wait, and that run."""

    def instance_load(self, instance: str) -> InstanceLoad | None:
        """What an instance last said of its load."""

    def progress(self, op_or_instance: str) -> ProgressView | None:
        """How far an operation, or an instance's start, has come."""

    def loads(self, node: str) -> list[tuple[str, ProgressView]]:
        """What moves bytes on a node now, by operation or instance."""


def node_views(view: ClusterView, live: LiveNumbers) -> list[NodeView]:
    return [node_view(view, live, node) for node in sorted(view.nodes.values(), key=lambda node: node.name)]


def node_view(view: ClusterView, live: LiveNumbers, node: Node) -> NodeView:
    return NodeView(
        id=node.id,
        name=node.name,
        address=node.address,
        state=node.state,
        cordoned=node.cordoned,
        seen_at=node.seen_at,
        instances=len(view.instances_on(node.id)),
        inventory=_means(view, node.id, node.inventory),
        loads=tuple(LoadView(id=id_, progress=progress, of=_whose(view, id_)) for id_, progress in live.loads(node.id)),
        device_used_bytes=_devices_used(view, node),
    )


def _whose(view: ClusterView, moving: str) -> str:
    """The model or the checkpoint that an instance, an operation or an ingest moves the bytes of."""
    if (instance := view.instances.get(moving)) is not None:
        return f"model/{instance.model}"
    if (operation := view.operations.get(moving)) is not None:
        return f"checkpoint/{operation.digest[:12]}"
    return next((f"model/{model.name}" for model in view.models.values() if model.op == moving), "")


def _devices_used(view: ClusterView, node: Node) -> tuple[int, ...]:
    if node.inventory is None:
        return ()
    places = [(node.id, device.index) for device in node.inventory.devices]
    return tuple(view.memory.committed_bytes.get(at, 0) + sum(view.memory.idle_weights.get(at, {}).values()) for at in places)


def _means(view: ClusterView, node: str, stated: Inventory | None) -> Inventory | None:
    """A node's means as it stated them last, with what is taken of them now."""
    if stated is None:
        return None
    records = list(view.placements_on(node).values())
    arena = sum(view.memory.arena_bytes_of(node, record.digest) for record in records if record.tier is Tier.DRAM)
    disk = sum(record.size_bytes for record in records if record.tier is Tier.DISK)
    return msgspec.structs.replace(stated, arena=msgspec.structs.replace(stated.arena, used_bytes=arena), disk_used_bytes=disk)


def model_views(view: ClusterView, live: LiveNumbers) -> list[ModelView]:
    return [model_view(view, live, model) for model in sorted(view.models.values(), key=lambda model: model.name)]


def model_view(view: ClusterView, live: LiveNumbers, model: Model) -> ModelView:
    waiting, running = live.model_counts(model.name)
    return ModelView(
        name=model.name,
        state=model.state,
        digest=model.digest,
        spec=model.spec,
        instances=dict(Counter(one.state.value for one in view.instances_of(model.name).values())),
        waiting=waiting,
        running=running,
        fault=model.fault,
        progress=live.progress(model.op) if model.op is not None else None,
        created_at=model.created_at,
        no_place=model.refusal or model.no_place,
        failing=_failing(view, model),
    )


def _failing(view: ClusterView, model: Model) -> FailingView | None:
    wrong = _wrong(view, model)
    return _failing_view(view, max(wrong, key=lambda one: (one.changed_at, one.id))) if wrong else None


def held(view: ClusterView, model: Model) -> FailingView | None:
    """The failed instance that is tried first of those that hold a model's last places; None while another may be started."""
    taken = sum(holds_place(one) for one in view.instances_of(model.name).values())
    wrong = _wrong(view, model)
    if not wrong or taken < model.spec.scale.max:
        return None
    return _failing_view(view, tried_first(wrong))


def _wrong(view: ClusterView, model: Model) -> list[Instance]:
    return [one for one in view.instances_of(model.name).values() if one.state in _WRONG and one.fault is not None]


def _failing_view(view: ClusterView, one: Instance) -> FailingView:
    assert one.fault is not None
    return FailingView(instance=one.id, node=_name(view, one.node), state=one.state, fault=one.fault, retry_at=one.retry_at)


def instance_views(view: ClusterView, live: LiveNumbers) -> list[InstanceView]:
    return [instance_view(view, live, instance) for instance in sorted(view.instances.values(), key=lambda one: one.id)]


def instance_view(view: ClusterView, live: LiveNumbers, instance: Instance) -> InstanceView:
    load = live.instance_load(instance.id)
    if load is not None and load.epoch != instance.epoch:
        load = None
    return InstanceView(
        id=instance.id,
        model=instance.model,
        node=_name(view, instance.node),
        digest=instance.digest,
        state=instance.state,
        devices=instance.devices,
        epoch=instance.epoch,
        restarts=instance.restarts,
        retry_at=instance.retry_at,
        pid=instance.pid,
        running=load.running if load is not None else instance.running,
        working_bytes=instance.working_bytes,
        kv_used_tokens=load.kv_used_tokens if load is not None else 0,
        kv_capacity_tokens=instance.kv_capacity_tokens,
        activation_bytes=instance.activation_bytes,
        logits_bytes=instance.logits_bytes,
        phases=instance.phases,
        progress=live.progress(instance.id),
        fault=instance.fault,
        reason=instance.reason,
        created_at=instance.created_at,
        changed_at=instance.changed_at,
    )


def checkpoint_views(view: ClusterView) -> list[CheckpointView]:
    return [checkpoint_view(view, checkpoint) for checkpoint in sorted(view.checkpoints.values(), key=lambda one: one.digest)]


def checkpoint_view(view: ClusterView, checkpoint: Checkpoint) -> CheckpointView:
    placements = [
        PlacementView(
            node=_name(view, record.node),
            tier=record.tier,
            state=record.state,
            size_bytes=record.size_bytes,
            device=record.device,
            users=record.users,
            reason=record.reason,
            used_at=record.used_at,
            copies=tuple(
                CopyView(
                    layout=copy.layout,
                    in_place=copy.layout == IN_PLACE,
                    state=copy.state,
                    verified=copy.verified,
                    size_bytes=copy.size_bytes,
                )
                for copy in record.copies
            ),
        )
        for record in view.placements_of(checkpoint.digest).values()
    ]
    return CheckpointView(
        digest=checkpoint.digest,
        architecture=checkpoint.architecture,
        image_bytes=checkpoint.image_bytes,
        kv_token_bytes=checkpoint.kv_token_bytes,
        max_context_tokens=checkpoint.max_context_tokens,
        models=tuple(view.models_of(checkpoint.digest)),
        placements=tuple(sorted(placements, key=lambda one: (one.node, one.tier, one.device))),
        created_at=checkpoint.created_at,
        pins=tuple(
            PinView(node=_name(view, node), tier=tier)
            for digest, node, tier in sorted(view.pins)
            if digest == checkpoint.digest
        ),
        publications=tuple(
            PublicationView(url=each.url, layout=each.layout, published_at=each.published_at, doubt=each.doubt)
            for each in view.publications_of(checkpoint.digest)
        ),
    )


def operation_view(view: ClusterView, live: LiveNumbers, operation: Operation) -> OperationView:
    return OperationView(
        id=operation.id,
        kind=operation.kind,
        digest=operation.digest,
        node=_name(view, operation.node),
        tier=operation.tier,
        size_bytes=operation.size_bytes,
        began_at=operation.began_at,
        ended_at=operation.ended_at,
        fault=operation.fault,
        progress=live.progress(operation.id),
        url=operation.url,
        read_bytes=operation.read_bytes,
        note=operation.note,
    )


def _name(view: ClusterView, node: str) -> str:
    """Nodes are shown by the names that people gave them."""
    record = view.nodes.get(node)
    return record.name if record is not None else node
