"""Events: what the control loop is told."""

from __future__ import annotations

from dataclasses import dataclass

from schema.admin import OperationKind
from schema.link import InstanceUpdate, InventoryUpdate, NodeEvent, NodeTruth, OperationDone, PlacementUpdate
from schema.spec import ModelSpec, ScaleSpec
from schema.states import Tier

__all__ = [
    "AddModel",
    "AddNode",
    "ApplyModels",
    "Close",
    "DemandChanged",
    "DeployModel",
    "EndOperation",
    "Event",
    "Forget",
    "FromNode",
    "InstanceActivity",
    "NodeLost",
    "Operate",
    "Pin",
    "PrefillTimed",
    "RemoveModel",
    "StopInstanceNow",
    "StopModel",
    "Tick",
]


@dataclass(frozen=True, slots=True)
class AddNode:
    """A node that the configuration or an operator names; of a known one the address may be another."""

    node: str
    name: str
    address: str


@dataclass(frozen=True, slots=True)
class FromNode:
    """A node said something about what it holds. A `NodeTruth` begins every connection and replaces all that was known."""

    node: str
    message: NodeTruth | InventoryUpdate | InstanceUpdate | PlacementUpdate | OperationDone | NodeEvent


@dataclass(frozen=True, slots=True)
class NodeLost:
    """The link to a node broke; its instances may well go on. ``stopped``: it did since this manager has stopped the node."""

    node: str
    why: str
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class AddModel:
    """Register a model and ingest its source; with ``deploy`` serve it as soon as that has ended. ``ticket`` is answered by
    `Reply`."""

    ticket: int
    spec: ModelSpec
    deploy: bool = False


@dataclass(frozen=True, slots=True)
class DeployModel:
    """Serve a registered model, or change its scale; None keeps the spec's."""

    ticket: int
    model: str
    scale: ScaleSpec | None


@dataclass(frozen=True, slots=True)
class ApplyModels:
    """Make models as ``specs`` say, and forget those to ``remove``: all of it or nothing. Answered by an AppliedView each.

    ``deploy``: serve them too, a new one as soon as it has been ingested. ``dry_run``: only tell what would change.
    """

    ticket: int
    specs: tuple[ModelSpec, ...]
    remove: tuple[str, ...] = ()
    deploy: bool = True
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class StopModel:
    """Serve a model no more: its instances drain and stop, its checkpoint stays."""

    ticket: int
    model: str


@dataclass(frozen=True, slots=True)
class RemoveModel:
    """Forget a model; its instances stop first. Its checkpoint is dropped from every tier if no other model uses it."""

    ticket: int
    model: str


@dataclass(frozen=True, slots=True)
class StopInstanceNow:
    """An operator stops one instance; the model's scale decides whether another takes its place."""

    ticket: int
    instance: str


@dataclass(frozen=True, slots=True)
class Operate:
    """An operator wants something long done to copies of a checkpoint, which ``reference`` names by a beginning of its digest
    or by a model. ``node`` is a name, None for any or all. The ticket finds the operations (`ClusterView.operations`)."""

    ticket: int
    kind: OperationKind
    reference: str
    node: str | None
    tier: Tier | None
    url: str | None = None
    """The remote to publish to or fetch from, None for the usual one."""


@dataclass(frozen=True, slots=True)
class EndOperation:
    """An operator ends an operation early; not a removal."""

    ticket: int
    id: str


@dataclass(frozen=True, slots=True)
class Forget:
    """An operator says that a checkpoint lies on the remote at ``url``, or on any, no more."""

    ticket: int
    reference: str
    url: str | None


@dataclass(frozen=True, slots=True)
class Pin:
    """An operator keeps copies of a checkpoint where they are, or (``pinned`` False) lets them go; meant as in `Operate`."""

    ticket: int
    reference: str
    node: str | None
    tier: Tier | None
    pinned: bool


@dataclass(frozen=True, slots=True)
class DemandChanged:
    """The router has ``waiting`` requests for a model that found no instance with room, and ``running`` in all.

    Said on every change of ``waiting`` from or to 0 and at most every 100 ms otherwise, never per token or warm request.
    """

    model: str
    waiting: int
    running: int


@dataclass(frozen=True, slots=True)
class InstanceActivity:
    """The router's account of one instance: sequences routed to it now. Said when it becomes busy or idle."""

    instance: str
    running: int


@dataclass(frozen=True, slots=True)
class PrefillTimed:
    """An instance computed so many tokens of a sequence, those not counted that it found cached, in so many seconds: what
    moving one would cost. Said for a few of them, never for all."""

    instance: str
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Close:
    """The manager is about to end its nodes' processes, and then itself: nothing is begun any more."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A time asked for by `WakeAt` has come."""


Event = (
    AddNode | FromNode | NodeLost | AddModel | ApplyModels | DeployModel | StopModel | RemoveModel | StopInstanceNow | Operate
    | EndOperation | Pin | Forget | DemandChanged | InstanceActivity | PrefillTimed | Close | Tick
)  # fmt: skip
