"""The contract of the control loop: events in, rows to commit and effects out. No I/O, no clock, nothing awaited.

``step(event, now)`` changes the in-memory view and returns a `Step`. Its ``changes`` are committed in one transaction
(several steps may share it: group commit); its ``effects`` are carried out, in order, once that transaction is durable.
A step without changes has its effects carried out after those of the steps before it. So intent is always on disk
before anything acts on it, and an effect never overtakes an earlier one.

Time is handed in: ``now`` is Unix seconds from the runner's clock, virtual in the simulator. A step that needs to be
called again later says so with `WakeAt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from schema.admin import EventView, OperationKind, OutcomeView
from schema.errors import Fault
from schema.ids import Epoch
from schema.link import InstanceTruth, InstanceUpdate, ManagerMessage, NodeTruth, OperationDone, PlacementUpdate
from schema.memory import StepCosts
from schema.spec import ModelSpec, ScaleSpec
from schema.states import InstanceState, ModelState, NodeState, Tier, TierState

__all__ = [
    "AddModel",
    "AddNode",
    "ApplyModels",
    "CheckpointKnown",
    "Close",
    "Connect",
    "DemandChanged",
    "DeployModel",
    "Effect",
    "Effects",
    "EndOperation",
    "Event",
    "Forget",
    "FromNode",
    "InstanceActivity",
    "Log",
    "Migrate",
    "ModelChanged",
    "NodeLost",
    "Operate",
    "Pin",
    "PrefillTimed",
    "PutCheckpoint",
    "PutEstimate",
    "PutInstance",
    "PutModel",
    "PutNode",
    "PutPin",
    "PutPlacement",
    "PutPublication",
    "RejectWaiting",
    "RemoveCheckpointRow",
    "RemoveInstance",
    "RemoveModel",
    "RemoveModelRow",
    "RemovePin",
    "RemovePlacement",
    "RemovePublication",
    "Reply",
    "RouteChanged",
    "RowChange",
    "Send",
    "Step",
    "StopInstanceNow",
    "StopModel",
    "Tick",
    "WakeAt",
]

# --- Events: what the loop is told --------------------------------------------------------------------------------


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
    message: NodeTruth | InstanceUpdate | PlacementUpdate | OperationDone


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

# --- Rows to commit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutNode:
    id: str
    name: str
    address: str
    state: NodeState
    cordoned: bool
    created_at: float
    seen_at: float


@dataclass(frozen=True, slots=True)
class PutCheckpoint:
    digest: str
    architecture: str
    image_bytes: int
    kv_token_bytes: int
    max_context_tokens: int
    created_at: float
    step: StepCosts | None


@dataclass(frozen=True, slots=True)
class PutPlacement:
    digest: str
    node: str
    tier: Tier
    device: int
    state: TierState
    size_bytes: int
    used_at: float = 0.0


@dataclass(frozen=True, slots=True)
class PutPin:
    digest: str
    node: str
    tier: Tier
    created_at: float


@dataclass(frozen=True, slots=True)
class RemovePin:
    digest: str
    node: str
    tier: Tier


@dataclass(frozen=True, slots=True)
class PutPublication:
    digest: str
    url: str
    layout: str
    published_at: float
    doubt: str = ""


@dataclass(frozen=True, slots=True)
class RemovePublication:
    digest: str
    url: str


@dataclass(frozen=True, slots=True)
class RemovePlacement:
    digest: str
    node: str
    tier: Tier
    device: int


@dataclass(frozen=True, slots=True)
class PutModel:
    spec: ModelSpec
    state: ModelState
    digest: str | None
    op: str | None
    node: str | None
    fault: Fault | None
    created_at: float
    changed_at: float
    deploy_next: bool = False


@dataclass(frozen=True, slots=True)
class RemoveModelRow:
    name: str


@dataclass(frozen=True, slots=True)
class RemoveCheckpointRow:
    digest: str


@dataclass(frozen=True, slots=True)
class PutInstance:
    """``truth`` carries id, epoch, digest, state, devices, phases and fault; the rest is the manager's own."""

    truth: InstanceTruth
    model: str
    node: str
    working_bytes: int
    restarts: int
    retry_at: float | None
    reason: str
    created_at: float
    changed_at: float


@dataclass(frozen=True, slots=True)
class RemoveInstance:
    id: str


@dataclass(frozen=True, slots=True)
class PutEstimate:
    """A coefficient that was corrected: what it is of (``key``), and the observations it is made of."""

    key: str
    samples: tuple[float, ...]
    changed_at: float


RowChange = (
    PutNode | PutCheckpoint | PutPlacement | RemovePlacement | PutModel | RemoveModelRow | RemoveCheckpointRow | PutInstance
    | RemoveInstance | PutPin | RemovePin | PutPublication | RemovePublication | PutEstimate | EventView | OutcomeView
)  # fmt: skip
"""One row to write or delete; an EventView is an event to append, an OutcomeView an estimate beside what happened."""

# --- Effects: what is to be done once the rows are durable ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Say this to a node. If its link is down it is dropped: the truth of the next connection decides anew."""

    node: str
    message: ManagerMessage


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to an operator's event: a ``fault``, or None for done; ``result`` is what the event says that it tells."""

    ticket: int
    fault: Fault | None = None
    result: object = None


@dataclass(frozen=True, slots=True)
class RouteChanged:
    """An instance of a model came, changed or went, for the router.

    Only ``ready`` ones on a ``reachable`` node take new sequences; on an unreachable one their sequences wait. In
    ``stopped``, ``failed`` and ``backoff`` the attempts of epochs up to this one are lost, if they have not ended by
    then, and their journals go on elsewhere.
    """

    model: str
    node: str
    instance: str
    epoch: Epoch
    state: InstanceState
    reachable: bool
    kv_capacity_tokens: int
    max_context_tokens: int
    max_concurrency: int
    node_name: str


@dataclass(frozen=True, slots=True)
class ModelChanged:
    """A model was deployed, changed, stopped or removed (``spec`` None), for the router."""

    model: str
    spec: ModelSpec | None
    state: ModelState
    digest: str | None
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class Migrate:
    """Move every sequence of ``source`` to ``target``, an instance of the same model that is ready, as soon as it can be
    done. The source takes nothing new any more and stops with its last sequence, moved or ended. Said only if the
    planner's abilities include it."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class RejectWaiting:
    """No instance can come for this model: fail the requests that wait for it, with this fault."""

    model: str
    fault: Fault


@dataclass(frozen=True, slots=True)
class CheckpointKnown:
    """A checkpoint became known on a node: the gateway may fetch its text assets from there, if it has not got them."""

    digest: str
    node: str


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Call ``step(Tick(), ...)`` at ``at`` (Unix seconds) or later; the latest call of a step replaces earlier ones."""

    at: float


@dataclass(frozen=True, slots=True)
class Connect:
    """Hold a link to this node from now on, dialling for ever; the connector also makes a dead local agent again."""

    node: str
    address: str


@dataclass(frozen=True, slots=True)
class Log:
    """A line for the manager's log, beside the persisted events."""

    level: str
    message: str


Effect = Send | Reply | RouteChanged | ModelChanged | Migrate | RejectWaiting | CheckpointKnown | Connect | WakeAt | Log


@dataclass(slots=True)
class Step:
    """What one step asks for: rows first, then effects."""

    changes: list[RowChange] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)


class Effects(Protocol):
    """Who carries steps out: the real runner (database, links, router), or the simulator on a virtual clock."""

    async def commit(self, changes: Sequence[RowChange]) -> None:
        """Make the rows durable in one transaction. An error here ends the manager: it must not act on lost intent."""

    def perform(self, effect: Effect) -> None:
        """Carry one effect out, without waiting and without raising for what is outside (a link that is down)."""
