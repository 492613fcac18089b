"""What the admin API shows and takes: one struct per noun, shared by its server, the typed client, the CLI and the TUI.

Routes (all under ``/admin/v1``): GET nodes, nodes/{name}, models, models/{name}, models/{name}/explain, instances,
instances/{id}, checkpoints, checkpoints/{reference}, operations, operations/{id}, requests, requests/{id},
requests/{id}/explain, estimates, events, status, stream (server-sent events, each a StreamFrame);
POST models (ModelSpec), models/{name}/deploy (DeployBody), models/{name}/stop, instances/{id}/stop, requests/{id}/cancel,
operations/{id}/cancel (answered by the OperationView);
POST apply (ApplyBody; answered by a list of AppliedView), all of it or nothing;
POST checkpoints/{reference}/prefetch, .../verify, .../drop (CheckpointBody; answered by a list of OperationView),
.../publish, .../fetch (RemoteBody; answered likewise), .../pin, .../unpin (CheckpointBody), .../forget (RemoteBody; answered by
the CheckpointView).
DELETE models/{name}. Lists are ``{"items": [...]}``.
An error's body is ``{"error": {"code", "message", "param"}}`` with the status of its class. ``GET /openapi.json`` says it all.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from schema.errors import Fault
from schema.link import EngineTiming, Inventory, StartPhases
from schema.spec import ModelSpec, ScaleSpec
from schema.states import InstanceState, ModelState, NodeState, RequestState, Tier, TierState

__all__ = [
    "AppliedAction",
    "AppliedView",
    "ApplyBody",
    "CandidateView",
    "ChangeView",
    "CheckpointBody",
    "CheckpointView",
    "CopyView",
    "DecisionView",
    "DeployBody",
    "EstimateErrorView",
    "EstimatesView",
    "EventKind",
    "EventView",
    "ExplainView",
    "InstanceView",
    "LoadView",
    "LogFrame",
    "LogLineView",
    "LogView",
    "ModelView",
    "NodeVerdictView",
    "NodeView",
    "OperationKind",
    "OperationView",
    "OutcomeView",
    "PinView",
    "PlacementView",
    "ProgressView",
    "PublicationView",
    "RemoteBody",
    "RequestExplainView",
    "RequestTimeline",
    "RequestView",
    "StatusView",
    "StreamFrame",
    "StreamKind",
]


class _View(msgspec.Struct, frozen=True, kw_only=True):
    pass


class ProgressView(_View, frozen=True, kw_only=True):
    """How far a long operation has come; ``rate_bps`` is of the present stage, ``now_bps`` of its last seconds.

    ``source``: the tier that the bytes come from, where that is known.
    """

    stage: str
    done_bytes: int
    total_bytes: int
    rate_bps: float = 0.0
    source: Tier | None = None
    now_bps: float = 0.0

    @property
    def doing(self) -> str:
        """``fetch from remote, resumed``."""
        verb, comma, how = self.stage.partition(",")
        return verb + (f" from {self.source}" if self.source is not None else "") + comma + how


class LoadView(_View, frozen=True, kw_only=True):
    """Something that moves bytes on a node now: ``id`` is an instance that starts, an operation, or an ingest.

    ``of``: whose bytes they are, as in ``model/tiny`` for a start and an ingest, which no operation is listed for, and in
    ``checkpoint/0123456789ab``; "" where the manager does not know.
    """

    id: str
    progress: ProgressView
    of: str = ""


class NodeView(_View, frozen=True, kw_only=True):
    """``seen_at``: when its link came up or broke, whichever came last; one that is ready is heard all the time.
    ``device_used_bytes``, by device of the inventory: what instances were promised, and weights that nobody uses now."""

    id: str
    name: str
    address: str
    state: NodeState
    cordoned: bool
    seen_at: float
    instances: int
    inventory: Inventory | None = None
    loads: tuple[LoadView, ...] = ()
    device_used_bytes: tuple[int, ...] = ()


class FailingView(_View, frozen=True, kw_only=True):
    """An instance that failed or is between two lives: why, and when it is tried again (None: once something has changed)."""

    instance: str
    node: str
    state: InstanceState
    fault: Fault
    retry_at: float | None


class ModelView(_View, frozen=True, kw_only=True):
    """``instances`` counts by state those that exist; ``waiting`` and ``running`` are requests now. ``no_place``: why no node
    can take the instance that is wanted, or could take the last one that was; "" if one can. ``failing``: the last of its
    instances that went wrong, while it is not well again."""

    name: str
    state: ModelState
    digest: str | None
    spec: ModelSpec
    instances: dict[str, int]
    waiting: int
    running: int
    fault: Fault | None
    progress: ProgressView | None
    created_at: float
    no_place: str = ""
    failing: FailingView | None = None


class InstanceView(_View, frozen=True, kw_only=True):
    """``reason`` says why it runs where it runs; ``phases`` where the time of its last start went. ``working_bytes`` are
    promised on each device beside its weights, for the KV cache and what a step takes: of that at most ``activation_bytes``
    and ``logits_bytes``, as the engine reckons once it is ready."""

    id: str
    model: str
    node: str
    digest: str
    state: InstanceState
    devices: tuple[int, ...]
    epoch: int
    restarts: int
    retry_at: float | None
    pid: int
    running: int
    working_bytes: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    activation_bytes: int = 0
    logits_bytes: int = 0
    phases: StartPhases | None
    progress: ProgressView | None
    fault: Fault | None
    reason: str
    created_at: float
    changed_at: float


class CopyView(_View, frozen=True, kw_only=True):
    """A checkpoint in one layout on a node's disk: ``in_place`` is a model's own files, else it was ingested or fetched.
    ``verified``: every byte was compared with its checksum once, and none was found wrong, or could not be read, since."""

    layout: str
    in_place: bool
    state: TierState
    verified: bool
    size_bytes: int


class PlacementView(_View, frozen=True, kw_only=True):
    """``reason`` says why it is in quarantine, and on the disk which copies of it beside the one that is used are.
    ``used_at``: when it came, or a start or a load last began from it. ``copies`` are all that lie on the disk, the best one
    first."""

    node: str
    tier: Tier
    state: TierState
    size_bytes: int
    device: int = 0
    users: int = 0
    reason: str = ""
    used_at: float = 0.0
    copies: tuple[CopyView, ...] = ()


class PinView(_View, frozen=True, kw_only=True):
    """An operator keeps a checkpoint on a tier of a node, whether it lies there just now or not."""

    node: str
    tier: Tier


OperationKind = Literal["prefetch", "verify", "drop", "publish", "fetch"]


class OperationView(_View, frozen=True, kw_only=True):
    """Something long that an operator asked of a node and a checkpoint; remembered for a while after it has ended.

    ``ended_at`` is None while it goes on; ``fault`` then says how it failed, None that it did not. ``url`` is the remote's.
    ``read_bytes`` were read for it, 0 for what was there already. ``note`` is what to know of a success.
    """

    id: str
    kind: OperationKind
    digest: str
    node: str
    tier: Tier
    size_bytes: int
    began_at: float
    ended_at: float | None
    fault: Fault | None
    progress: ProgressView | None
    read_bytes: int = 0
    url: str = ""
    note: str = ""


class PublicationView(_View, frozen=True, kw_only=True):
    """A checkpoint lies on a remote, in this layout; ``doubt`` is why a fetch did not find it there as it was published."""

    url: str
    layout: str
    published_at: float
    doubt: str = ""


class CheckpointView(_View, frozen=True, kw_only=True):
    digest: str
    architecture: str
    image_bytes: int
    kv_token_bytes: int
    max_context_tokens: int
    models: tuple[str, ...]
    placements: tuple[PlacementView, ...]
    created_at: float
    pins: tuple[PinView, ...] = ()
    publications: tuple[PublicationView, ...] = ()


class RequestTimeline(_View, frozen=True, kw_only=True):
    """Where a request's time went, in seconds since it came in; None for what has not happened.

    ``routed_s``: an instance was found. ``first_token_s``, ``ended_s``: at the gateway. ``cold`` says that it waited for a
    start, whose phases are ``start``; ``engine`` is the engine's own account of the last attempt.
    """

    cold: bool
    routed_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    start: StartPhases | None = None
    engine: EngineTiming | None = None


class RequestView(_View, frozen=True, kw_only=True):
    """A live request, or one that ended while it is remembered; ``node`` and ``instance`` where it runs, or ran last.
    ``fault``: why it failed, None of one that did not."""

    id: str
    model: str
    state: RequestState
    node: str | None = None
    instance: str | None
    attempts: int
    prompt_tokens: int
    generated_tokens: int
    orphaned: bool
    received_at: float
    timeline: RequestTimeline
    fault: Fault | None = None


EventKind = Literal["model", "instance", "node", "checkpoint"]


class EventView(_View, frozen=True, kw_only=True):
    """Something that happened to an ``object`` of a ``kind``; a node is known by its name, the others as everywhere."""

    id: str
    at: float
    level: str
    kind: EventKind
    object: str
    reason: str
    message: str


class CandidateView(_View, frozen=True, kw_only=True):
    """A place that was weighed. ``actions`` say in words what would have to leave for it. Seconds from the decision."""

    node: str
    devices: tuple[int, ...]
    source: str
    queue_s: float
    load_s: float
    room_s: float
    startup_s: float
    delay_s: float
    cost_s: float
    actions: tuple[str, ...] = ()


class DecisionView(_View, frozen=True, kw_only=True):
    """What was decided for a model: ``kind`` is "start", "wait" or "refused"; ``instance`` is the one that was started.

    ``candidates`` are the best few, the chosen one first; ``rejected`` counts nodes by reason. ``waiting`` requests waited."""

    at: float
    model: str
    kind: str
    instance: str | None
    waiting: int
    reason: str
    candidates: tuple[CandidateView, ...]
    rejected: dict[str, int]


class NodeVerdictView(_View, frozen=True, kw_only=True):
    """One node in a full explanation: the best place on it, or why there is none."""

    node: str
    candidate: CandidateView | None = None
    rejection: str | None = None


class ExplainView(_View, frozen=True, kw_only=True):
    """Where one more instance of a model would go now, every node looked at; and the latest decision that was carried out.

    ``held``: none is started however many wait, since instances that are tried again hold the model's last places; the one that
    is tried first."""

    model: str
    at: float
    decision: DecisionView
    nodes: tuple[NodeVerdictView, ...]
    last: DecisionView | None
    held: FailingView | None = None


class RequestExplainView(_View, frozen=True, kw_only=True):
    """A request, and what was decided for its model between its coming in and its being routed. ``kept`` is False when
    decisions of that time are not remembered any more."""

    request: RequestView
    decisions: tuple[DecisionView, ...]
    kept: bool


class OutcomeView(_View, frozen=True, kw_only=True):
    """An estimate beside what happened. ``kind`` is "start" or "prefill"; ``source`` the tier of a start's weights."""

    at: float
    kind: str
    model: str
    node: str
    source: str
    estimated_s: float
    actual_s: float


class EstimateErrorView(_View, frozen=True, kw_only=True):
    """The distribution of the error, actual minus estimated, of one kind and source; quantiles of its absolute value."""

    kind: str
    source: str
    count: int
    bias_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    median_actual_s: float


class EstimatesView(_View, frozen=True, kw_only=True):
    """How good the planner's estimates are: errors by kind, the latest outcomes, and the coefficients behind them."""

    errors: tuple[EstimateErrorView, ...]
    outcomes: tuple[OutcomeView, ...]
    coefficients: dict[str, float]


class StatusView(_View, frozen=True, kw_only=True):
    """The manager itself."""

    cluster: str
    generation: int
    version: str
    pid: int
    started_at: float
    api_url: str
    ready: bool
    nodes_ready: int
    nodes: int


class LogView(_View, frozen=True, kw_only=True):
    """A line of the manager's own log."""

    id: str
    at: float
    level: str
    logger: str
    message: str


StreamKind = Literal["nodes", "models", "instances", "requests", "checkpoints", "operations", "events", "logs"]


class StreamFrame(_View, frozen=True, kw_only=True, omit_defaults=True):
    """A part of ``GET stream``: things that are new or have changed, whole, and by kind the keys of those that are ``gone``.

    ``cursor`` is what a stream may be resumed after, "" while ``more`` parts of one picture follow. ``fresh``: forget all that
    was told before, a new picture begins. ``gap``: events or log lines before these were left out, since the reader was slow.
    Nodes, instances, requests, operations, events and logs are known by id, models by name, checkpoints by digest.
    ``at`` is the manager's clock.
    """

    cursor: str
    at: float
    fresh: bool = False
    more: bool = False
    gap: bool = False
    status: StatusView | None = None
    nodes: tuple[NodeView, ...] = ()
    models: tuple[ModelView, ...] = ()
    instances: tuple[InstanceView, ...] = ()
    requests: tuple[RequestView, ...] = ()
    checkpoints: tuple[CheckpointView, ...] = ()
    operations: tuple[OperationView, ...] = ()
    events: tuple[EventView, ...] = ()
    logs: tuple[LogView, ...] = ()
    gone: dict[StreamKind, tuple[str, ...]] = {}


class LogLineView(_View, frozen=True, kw_only=True):
    """A line that a worker or a process of a node wrote: ``source`` is the instance or the process, ``at`` is Unix seconds of
    the node's clock, None for what does not say (output of a library, a part of a trace)."""

    node: str
    source: str
    at: float | None
    text: str


class LogFrame(_View, frozen=True, kw_only=True):
    """What ``GET .../logs`` answers, or tells of at a time. ``lost``: nodes that cannot be asked just now, and why."""

    items: tuple[LogLineView, ...] = ()
    lost: dict[str, str] = {}


class CheckpointBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which copies of a checkpoint are meant: on ``node`` (its name), None for any or all; on ``tier``, None for the usual."""

    node: str | None = None
    tier: Tier | None = None


class RemoteBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which remote is meant, None for the usual, and which node publishes or fetches; ``tier`` is where a fetch brings it."""

    url: str | None = None
    node: str | None = None
    tier: Tier | None = None


class ApplyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The specs that ``models`` are to have, and the names of those to ``remove``; others are left as they are.

    ``deploy``: serve them too, a new one as soon as it has been ingested. ``dry_run``: only tell what would change.
    """

    models: tuple[ModelSpec, ...] = ()
    remove: tuple[str, ...] = ()
    deploy: bool = True
    dry_run: bool = False


class ChangeView(_View, frozen=True, kw_only=True):
    """A dotted key of a spec, or ``state``; None is also what is not there."""

    key: str
    old: str | int | float | bool | None
    new: str | int | float | bool | None


AppliedAction = Literal["created", "configured", "unchanged", "removed", "refused"]


class AppliedView(_View, frozen=True, kw_only=True):
    """What becomes of a model. ``restarts``: so many instances end for it. ``fault`` is why it is refused, for this ``key``."""

    name: str
    action: AppliedAction
    changes: tuple[ChangeView, ...] = ()
    restarts: int = 0
    fault: Fault | None = None
    key: str = ""


class DeployBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Deploy a model, or change how it is scaled; None keeps what is set."""

    scale: ScaleSpec | None = None
