"""What can be asked of the admin API: every request by a function that makes a `Call` of it, with its types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar
from urllib.parse import quote

import msgspec

from schema.admin import (
    AppliedView,
    ApplyBody,
    CheckpointBody,
    CheckpointView,
    DeployBody,
    EstimatesView,
    EventKind,
    EventView,
    ExplainView,
    InstanceView,
    LogFrame,
    ModelView,
    NodeView,
    OperationView,
    RemoteBody,
    RequestExplainView,
    RequestView,
    StatusView,
)
from schema.errors import InvalidInput
from schema.spec import ModelSpec, ScaleSpec
from schema.states import Tier
from sllmctl.client.answers import decode, items, nothing, reader

__all__ = [
    "Call",
    "LogQuery",
    "Until",
    "Waited",
    "add_model",
    "apply_models",
    "cancel_operation",
    "cancel_request",
    "checkpoint",
    "checkpoints",
    "deploy_model",
    "drop_checkpoint",
    "estimates",
    "events",
    "explain_model",
    "explain_request",
    "fetch_checkpoint",
    "forget_checkpoint",
    "instance",
    "instances",
    "logs",
    "model",
    "models",
    "node",
    "nodes",
    "operation",
    "operations",
    "pin_checkpoint",
    "prefetch_checkpoint",
    "publish_checkpoint",
    "remove_model",
    "request",
    "requests",
    "status",
    "stop_instance",
    "stop_model",
    "verify_checkpoint",
    "wait_model",
    "wait_operation",
]

T = TypeVar("T")
Until = Literal["ingested", "ready", "stopped", "gone"]
"""What can be waited for: a checkpoint is there; as many instances are ready as the scale's ``min``; none is left; the
model itself is forgotten (its wait then ends with NotFound)."""

_PENDING = 202


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request. ``hold_s`` is how long the manager may hold its answer back, on top of the client's own patience."""

    method: str
    path: str
    read: Callable[[int, bytes], T]
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    hold_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Waited:
    """How a wait stands: ``done`` when what was waited for has come, else the view as it is now."""

    view: ModelView
    done: bool


def status() -> Call[StatusView]:
    return _get("status", StatusView)


def nodes() -> Call[tuple[NodeView, ...]]:
    return _list("nodes", NodeView)


def node(name: str) -> Call[NodeView]:
    return _get(f"nodes/{_segment(name)}", NodeView)


def models() -> Call[tuple[ModelView, ...]]:
    return _list("models", ModelView)


def model(name: str) -> Call[ModelView]:
    return _get(f"models/{_segment(name)}", ModelView)


def wait_model(name: str, until: Until, hold_s: float) -> Call[Waited]:
    """The model as soon as it is as waited for, or as it is after ``hold_s`` seconds; a model that failed raises its fault."""

    def read(code: int, body: bytes) -> Waited:
        return Waited(decode(body, ModelView), done=code != _PENDING)

    return Call("GET", f"models/{_segment(name)}", read, {"wait": until, "timeout": f"{hold_s:g}"}, hold_s=hold_s)


def add_model(spec: ModelSpec, *, deploy: bool = False) -> Call[ModelView]:
    """Register a model and begin to ingest it, to be served then with ``deploy``; its state tells how that goes."""
    query = {"deploy": "1"} if deploy else {}
    return Call("POST", "models", reader(ModelView), query, msgspec.json.encode(spec))


def apply_models(
    specs: Sequence[ModelSpec], remove: Sequence[str] = (), *, deploy: bool = True, dry_run: bool = False
) -> Call[tuple[AppliedView, ...]]:
    """Make models as specs say and forget those to ``remove``, all or nothing; ``dry_run``: only tell what would change."""
    body = ApplyBody(models=tuple(specs), remove=tuple(remove), deploy=deploy, dry_run=dry_run)
    return Call("POST", "apply", items(AppliedView), body=msgspec.json.encode(body))


def deploy_model(name: str, scale: ScaleSpec | None = None) -> Call[ModelView]:
    """Serve a model that has been ingested, or change how it is scaled."""
    body = msgspec.json.encode(DeployBody(scale=scale))
    return Call("POST", f"models/{_segment(name)}/deploy", reader(ModelView), body=body)


def stop_model(name: str) -> Call[ModelView]:
    return Call("POST", f"models/{_segment(name)}/stop", reader(ModelView))


def remove_model(name: str) -> Call[None]:
    return Call("DELETE", f"models/{_segment(name)}", nothing)


def explain_model(name: str) -> Call[ExplainView]:
    """Where one more instance of a model would go now, and why."""
    return _get(f"models/{_segment(name)}/explain", ExplainView)


def instances() -> Call[tuple[InstanceView, ...]]:
    return _list("instances", InstanceView)


def instance(instance_id: str) -> Call[InstanceView]:
    return _get(f"instances/{_segment(instance_id)}", InstanceView)


def stop_instance(instance_id: str) -> Call[None]:
    return Call("POST", f"instances/{_segment(instance_id)}/stop", nothing)


def checkpoints() -> Call[tuple[CheckpointView, ...]]:
    return _list("checkpoints", CheckpointView)


def checkpoint(digest: str) -> Call[CheckpointView]:
    """A checkpoint by a model's name, by its digest, or by a beginning of it that no other has."""
    return _get(f"checkpoints/{_segment(digest)}", CheckpointView)


def prefetch_checkpoint(reference: str, node: str | None = None, tier: Tier | None = None) -> Call[tuple[OperationView, ...]]:
    """Bring a checkpoint, named by a beginning of its digest or by a model, into a node's memory."""
    return _operate(reference, "prefetch", node, tier)


def verify_checkpoint(reference: str, node: str | None = None) -> Call[tuple[OperationView, ...]]:
    """Compare every copy on disk, or a node's, with its checksums."""
    return _operate(reference, "verify", node, None)


def drop_checkpoint(reference: str, node: str | None = None, tier: Tier | None = None) -> Call[tuple[OperationView, ...]]:
    """Take a checkpoint from a tier of a node, or of all."""
    return _operate(reference, "drop", node, tier)


def publish_checkpoint(reference: str, url: str | None = None, node: str | None = None) -> Call[tuple[OperationView, ...]]:
    """Put a checkpoint on a remote, from a node that has it."""
    return _to_remote(reference, "publish", RemoteBody(url=url, node=node), items(OperationView))


def fetch_checkpoint(
    reference: str, url: str | None = None, node: str | None = None, tier: Tier | None = None
) -> Call[tuple[OperationView, ...]]:
    """Bring a checkpoint from a remote to a node's disk, or memory."""
    return _to_remote(reference, "fetch", RemoteBody(url=url, node=node, tier=tier), items(OperationView))


def forget_checkpoint(reference: str, url: str | None = None) -> Call[CheckpointView]:
    """A checkpoint lies on a remote, or on any, no more; what is there is left."""
    return _to_remote(reference, "forget", RemoteBody(url=url), reader(CheckpointView))


def _to_remote(reference: str, verb: str, body: RemoteBody, reader: Callable[[int, bytes], T]) -> Call[T]:
    return Call("POST", f"checkpoints/{_segment(reference)}/{verb}", reader, body=msgspec.json.encode(body))


def pin_checkpoint(
    reference: str, node: str | None = None, tier: Tier | None = None, *, pinned: bool = True
) -> Call[CheckpointView]:
    """Keep a checkpoint on a tier of a node, or where it lies; ``pinned`` False lets it go."""
    body = msgspec.json.encode(CheckpointBody(node=node, tier=tier))
    path = f"checkpoints/{_segment(reference)}/{'pin' if pinned else 'unpin'}"
    return Call("POST", path, reader(CheckpointView), body=body)


def operations() -> Call[tuple[OperationView, ...]]:
    """What operators asked for lately, oldest first."""
    return _list("operations", OperationView)


def operation(operation_id: str) -> Call[OperationView]:
    return _get(f"operations/{_segment(operation_id)}", OperationView)


def cancel_operation(operation_id: str) -> Call[OperationView]:
    """End an operation early; it is answered as it is now, and ends a moment later."""
    return Call("POST", f"operations/{_segment(operation_id)}/cancel", reader(OperationView))


def wait_operation(operation_id: str, hold_s: float) -> Call[OperationView]:
    """The operation as soon as it has ended, or as it is after ``hold_s`` seconds."""
    query = {"wait": "ended", "timeout": f"{hold_s:g}"}
    return Call("GET", f"operations/{_segment(operation_id)}", reader(OperationView), query, hold_s=hold_s)


def requests() -> Call[tuple[RequestView, ...]]:
    return _list("requests", RequestView)


def request(request_id: str) -> Call[RequestView]:
    return _get(f"requests/{_segment(request_id)}", RequestView)


def cancel_request(request_id: str) -> Call[None]:
    return Call("POST", f"requests/{_segment(request_id)}/cancel", nothing)


def explain_request(request_id: str) -> Call[RequestExplainView]:
    """What was decided for a request's model while it waited."""
    return _get(f"requests/{_segment(request_id)}/explain", RequestExplainView)


def estimates() -> Call[EstimatesView]:
    """How good the planner's estimates are."""
    return _get("estimates", EstimatesView)


def events(kind: EventKind | None = None, name: str | None = None, limit: int = 100) -> Call[tuple[EventView, ...]]:
    """The newest events, oldest first, of one kind of thing or one object by name."""
    query = {"kind": kind, "object": name, "limit": str(limit)}
    return _list("events", EventView, {key: value for key, value in query.items() if value is not None})


@dataclass(frozen=True, slots=True)
class LogQuery:
    """Whose logs are wanted, and from where on: the last ``tail`` lines of each source, at most ``since_s`` old (0: any age).
    ``part`` is an instance of a model, or a process of a node."""

    noun: Literal["model", "instance", "node"]
    name: str
    part: str | None = None
    tail: int = 100
    since_s: float = 0.0

    @property
    def path(self) -> str:
        return f"{self.noun}s/{_segment(self.name)}/logs"

    @property
    def query(self) -> dict[str, str]:
        part = {"process" if self.noun == "node" else "instance": self.part} if self.part is not None else {}
        return {"tail": str(self.tail), "since": f"{self.since_s:g}", **part}


def logs(wanted: LogQuery) -> Call[LogFrame]:
    """What was written, in order of time, and the nodes that could not say."""
    return Call("GET", wanted.path, reader(LogFrame), wanted.query)


# --- Parts of calls ----------------------------------------------------------------------------------------------------


def _get(path: str, kind: type[T]) -> Call[T]:
    return Call("GET", path, reader(kind))


def _list(path: str, kind: type[T], query: Mapping[str, str] | None = None) -> Call[tuple[T, ...]]:
    return Call("GET", path, items(kind), query or {})


def _operate(reference: str, verb: str, node: str | None, tier: Tier | None) -> Call[tuple[OperationView, ...]]:
    body = msgspec.json.encode(CheckpointBody(node=node, tier=tier))
    return Call("POST", f"checkpoints/{_segment(reference)}/{verb}", items(OperationView), body=body)


def _segment(name: str) -> str:
    """The name of something in a path. Raises InvalidInput for what nothing can be called: it may lead elsewhere."""
    if name in ("", ".", ".."):
        raise InvalidInput(f"{name!r} is not a name")
    if "/" in name:
        raise InvalidInput(f"{name!r} is not a name: none has a '/'")
    return quote(name, safe="")
