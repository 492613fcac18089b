"""What can be done to a row: asked about, said to the manager, and told how it went. Each is a command of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec.structs import replace

from schema.admin import CheckpointView, InstanceView, ModelView, NodeVerdictView, NodeView, RequestView
from schema.errors import InvalidInput
from schema.spec import ModelSpec, ScaleSpec, parse_spec, source_of
from schema.states import Tier
from sllmctl import client
from sllmctl.client import Call, LogQuery
from tui.dialogs import Field
from tui.feed import Cluster

__all__ = [
    "Desk",
    "add_model",
    "cancel_request",
    "deploy_model",
    "drop_checkpoint",
    "explain",
    "pin_checkpoint",
    "prefetch_checkpoint",
    "remove_model",
    "scale_model",
    "show_logs",
    "stop_instance",
    "stop_model",
    "unpin_checkpoint",
    "verify_checkpoint",
]

T = TypeVar("T")
_HOLD_S = 20.0
_KEPT = (Tier.DISK, Tier.DRAM)
_COPIES = (*_KEPT, Tier.DEVICE)
_MEMORY = (Tier.DRAM, Tier.DEVICE)


class Desk(Protocol):
    """What the application does for an action. `ask` gives None when it was refused, which the user has been told."""

    cluster: Cluster

    async def confirm(self, question: str, verb: str, no: str = "Cancel") -> bool: ...
    async def fill_in(self, title: str, fields: list[Field], read: Callable[[Mapping[str, str]], T]) -> T | None: ...
    async def ask(self, call: Call[T], done: str = "") -> T | None: ...
    def jump(self, view: str) -> None: ...
    def show_logs(self, wanted: LogQuery) -> None: ...


# --- models


async def add_model(desk: Desk, _: Any) -> None:
    fields = [
        Field("name", "Name", hint="how requests call it"),
        Field("source", "Source", hint="/path/of/a/model, NODE:/path, organisation/name, or https://host/path"),
        Field("min", "At least", "0", hint="instances; 0 scales to zero"),
        Field("max", "At most", "1", hint="instances"),
    ]
    spec = await desk.fill_in("Add and deploy a model", fields, _spec)
    if spec is None or await desk.ask(client.add_model(spec, deploy=True), f"{spec.name} is being ingested") is None:
        return
    # What goes wrong with the ingest is told here as well; nobody has to wait for it.
    while True:
        waited = await desk.ask(client.wait_model(spec.name, "ingested", _HOLD_S))
        if waited is None or waited.done:
            return


async def deploy_model(desk: Desk, model: ModelView) -> None:
    await desk.ask(client.deploy_model(model.name), f"{model.name} is deployed")


async def scale_model(desk: Desk, model: ModelView) -> None:
    scale = model.spec.scale
    fields = [
        Field("min", "At least", str(scale.min), hint="instances; 0 scales to zero"),
        Field("max", "At most", str(scale.max), hint="instances"),
        Field("max_concurrency", "At once", str(scale.max_concurrency), hint="sequences on one instance"),
        Field("queue_limit", "Queue", str(scale.queue_limit), hint="requests that may wait"),
    ]
    new = await desk.fill_in(f"Scale {model.name}", fields, lambda values: _scale(model.spec, values))
    if new is not None:
        await desk.ask(client.deploy_model(model.name, new), f"{model.name}: {new.min} to {new.max} instances")


async def stop_model(desk: Desk, model: ModelView) -> None:
    running = f" {model.running} requests run; they may finish." if model.running else ""
    if await desk.confirm(f"Stop serving {model.name}?{running}", "Stop"):
        await desk.ask(client.stop_model(model.name), f"{model.name} stops")


async def remove_model(desk: Desk, model: ModelView) -> None:
    question = f"Remove {model.name}? Its checkpoint is deleted from every node, unless another model uses it."
    if await desk.confirm(question, "Remove"):
        await desk.ask(client.remove_model(model.name), f"{model.name} is being removed")


async def explain(desk: Desk, row: ModelView | InstanceView | RequestView | NodeVerdictView) -> None:
    if isinstance(row, NodeVerdictView):
        model = desk.cluster.explained.model if desk.cluster.explained is not None else ""
    else:
        model = row.name if isinstance(row, ModelView) else row.model
    explained = await desk.ask(client.explain_model(model))
    if explained is not None:
        desk.cluster.explained = explained
        desk.jump("explain")


async def show_logs(desk: Desk, row: NodeView | ModelView | InstanceView | RequestView) -> None:
    match row:
        case NodeView():
            desk.show_logs(LogQuery("node", row.name))
        case ModelView():
            desk.show_logs(LogQuery("model", row.name))
        case InstanceView():
            desk.show_logs(LogQuery("instance", row.id))
        case RequestView(instance=str(instance)):
            desk.show_logs(LogQuery("instance", instance))
        case RequestView():
            desk.show_logs(LogQuery("model", row.model))


# --- instances and requests


async def stop_instance(desk: Desk, instance: InstanceView) -> None:
    question = (
        f"Stop {instance.id} of {instance.model} on {instance.node}? The model's scale decides if another takes its place."
    )
    if await desk.confirm(question, "Stop"):
        await desk.ask(client.stop_instance(instance.id), f"{instance.id} stops")


async def cancel_request(desk: Desk, request: RequestView) -> None:
    question = f"Cancel {request.id} of {request.model}? Its client gets no more of the reply."
    if await desk.confirm(question, "Cancel it", "Keep it"):
        await desk.ask(client.cancel_request(request.id), f"{request.id} is cancelled")


# --- checkpoints


async def pin_checkpoint(desk: Desk, checkpoint: CheckpointView) -> None:
    where = await _where(desk, f"Pin {_called(checkpoint)}", "where it lies, if empty", _KEPT)
    if where is not None:
        await desk.ask(client.pin_checkpoint(checkpoint.digest, *where), f"{_called(checkpoint)} is pinned")


async def unpin_checkpoint(desk: Desk, checkpoint: CheckpointView) -> None:
    where = await _where(desk, f"Unpin {_called(checkpoint)}", "everywhere, if empty", _KEPT)
    if where is not None:
        await desk.ask(client.pin_checkpoint(checkpoint.digest, *where, pinned=False), f"{_called(checkpoint)} is let go")


async def prefetch_checkpoint(desk: Desk, checkpoint: CheckpointView) -> None:
    where = await _where(desk, f"Prefetch {_called(checkpoint)}", "wherever it lies on disk, if empty", _MEMORY)
    if where is not None:
        await desk.ask(client.prefetch_checkpoint(checkpoint.digest, *where), f"{_called(checkpoint)} is being loaded")


async def verify_checkpoint(desk: Desk, checkpoint: CheckpointView) -> None:
    if await desk.ask(client.verify_checkpoint(checkpoint.digest), f"{_called(checkpoint)} is being verified") is not None:
        desk.jump("operations")


async def drop_checkpoint(desk: Desk, checkpoint: CheckpointView) -> None:
    where = await _where(desk, f"Drop {_called(checkpoint)}", "of every node, if empty", _COPIES)
    if where is None:
        return
    node, tier = where
    question = f"Drop {_called(checkpoint)} from {tier or 'the usual tier'} of {node or 'every node'}?"
    if await desk.confirm(question, "Drop"):
        await desk.ask(client.drop_checkpoint(checkpoint.digest, node, tier), f"{_called(checkpoint)} is dropped")


# --- parts


async def _where(desk: Desk, title: str, hint: str, tiers: Sequence[Tier]) -> tuple[str | None, Tier | None] | None:
    """A node and one of ``tiers``, either of which may be left open; None when the user thought better of it."""
    named = ", ".join(tiers[:-1]) + f" or {tiers[-1]}"
    nodes = tuple(sorted(node.name for node in desk.cluster.nodes.values()))
    fields = [
        Field("node", "Node", hint=hint, choices=nodes),
        Field("tier", "Tier", hint=f"{named}; the usual one, if empty", choices=tuple(tiers)),
    ]

    def read(values: Mapping[str, str]) -> tuple[str | None, Tier | None]:
        if values["node"] and values["node"] not in nodes:
            raise InvalidInput(f"there is no node {values['node']!r}", "node")
        if values["tier"] and values["tier"] not in tiers:
            raise InvalidInput(f"{values['tier']!r} is no tier for this: {named}", "tier")
        return values["node"] or None, Tier(values["tier"]) if values["tier"] else None

    return await desk.fill_in(title, fields, read)


def _called(checkpoint: CheckpointView) -> str:
    return checkpoint.models[0] if checkpoint.models else checkpoint.digest[:12]


def _spec(values: Mapping[str, str]) -> ModelSpec:
    source = source_of(values["source"])
    if source is None:
        kinds = "an absolute path, NODE:/path, organisation/name or https://host/path"
        raise InvalidInput(f"{values['source']!r} is no source: {kinds}", "source")
    return parse_spec(
        {
            "name": values["name"],
            "source": msgspec.to_builtins(source),
            "scale": {"min": _number(values, "min"), "max": _number(values, "max")},
        }
    )


def _scale(before: ModelSpec, values: Mapping[str, str]) -> ScaleSpec:
    scale = replace(before.scale, **{key: _number(values, key) for key in values})
    return parse_spec(msgspec.to_builtins(replace(before, scale=scale))).scale


def _number(values: Mapping[str, str], key: str) -> int:
    try:
        return int(values[key])
    except ValueError:
        raise InvalidInput(f"{values[key]!r} is no number", key) from None
