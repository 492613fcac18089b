"""The records of the control loop's view: nodes, checkpoints and where they lie, operations, models, instances.

Fields may be read freely. What an index of the view depends on is changed only through its methods.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from schema.admin import OperationKind
from schema.errors import Fault
from schema.ids import Epoch
from schema.link import DiskCopy, Inventory, StartPhases
from schema.memory import StepCosts
from schema.spec import ModelSpec
from schema.states import InstanceState, ModelState, NodeState, Tier, TierState
from sllmctl.cluster.plans import Plan

__all__ = [
    "HOLDING",
    "LEAVING",
    "LIVE",
    "STANDING",
    "Checkpoint",
    "Instance",
    "Model",
    "Node",
    "Operation",
    "PinKey",
    "PlacementKey",
    "PlacementRecord",
    "Publication",
]

PlacementKey = tuple[str, str, Tier, int]
"""(digest, node, tier, device)."""

PinKey = tuple[str, str, Tier]
"""(digest, node, tier)."""

LIVE = frozenset({InstanceState.STARTING, InstanceState.READY, InstanceState.DRAINING, InstanceState.STOPPING})
"""States in which a node has, or may have, a life of the instance."""

LEAVING = frozenset({InstanceState.DRAINING, InstanceState.STOPPING})
"""States of those on their way out: what they were promised is still theirs."""

STANDING = LIVE | {InstanceState.BACKOFF}
"""States whose room on the devices is really theirs; a planned instance begins once these leave it room."""

HOLDING = LIVE | {InstanceState.PLANNED, InstanceState.BACKOFF}
"""States that keep device memory and arena room for the instance, so that a restart never finds its place taken."""


@dataclass(slots=True)
class Node:
    """``inventory`` is known since the first truth. ``unreachable_since`` is set while it is unreachable, ``imports_since``
    while it has no zygote that can fork a worker: since then that is known, and one imports what workers need."""

    id: str
    name: str
    address: str
    state: NodeState
    cordoned: bool
    created_at: float
    seen_at: float
    inventory: Inventory | None = None
    unreachable_since: float | None = None
    imports_since: float | None = None


@dataclass(slots=True)
class Checkpoint:
    digest: str
    architecture: str
    image_bytes: int
    kv_token_bytes: int
    max_context_tokens: int
    created_at: float
    step: StepCosts | None = None


@dataclass(slots=True)
class PlacementRecord:
    """``users`` is live: loads and instances that hold it, as the node counts them. So is ``reason``: why it is in quarantine,
    or which copy beside it is; and ``copies``: what lies of it on the disk, the best one first.

    ``used_at``: when it came, or when an instance or a load last began from it.
    """

    digest: str
    node: str
    tier: Tier
    device: int
    state: TierState
    size_bytes: int
    users: int = 0
    reason: str = ""
    used_at: float = 0.0
    copies: tuple[DiskCopy, ...] = ()

    @property
    def key(self) -> PlacementKey:
        return (self.digest, self.node, self.tier, self.device)


@dataclass(slots=True)
class Operation:
    """Something long that an operator asked for, all of it live. ``ended_at`` is None while it goes on. ``others`` are the
    remotes, and layouts there, that a fetch tries when the one at ``url`` fails; ``tried`` is how its last try has ended,
    and ``copied`` says that its node had a sound copy on the disk when it was asked, so that it asks no remote."""

    id: str
    ticket: int
    kind: OperationKind
    digest: str
    node: str
    tier: Tier
    size_bytes: int
    began_at: float
    ended_at: float | None = None
    fault: Fault | None = None
    read_bytes: int = 0
    made_room: bool = False
    cancelled: bool = False
    url: str = ""
    layout: str = ""
    others: tuple[tuple[str, str], ...] = ()
    tried: Fault | None = None
    copied: bool = False
    note: str = ""
    device: int = 0


@dataclass(frozen=True, slots=True)
class Publication:
    """A checkpoint lies on the remote at ``url``; ``doubt`` is why a fetch did not find it there as it was published."""

    digest: str
    url: str
    layout: str
    published_at: float
    doubt: str = ""


@dataclass(slots=True)
class Model:
    """``waiting`` and ``running`` are the router's last word; ``waiting_since`` is when the first of those waiting came.

    ``refusal`` is why the planner found no place, "" if it found one or was not asked; while it is not "", the model is looked
    at again whenever room appears (`ClusterView.set_refusal`); ``complaint`` is the last one of these that an event told of.
    ``no_place`` is such a reason that time will not lift, also once nobody waits any more, "" since it was answered otherwise.
    ``heat`` counts recent calls that found the model idle or without an instance, decaying since ``heat_at``: what a reload
    would be paid for. ``made_room``: so often copies were put out of a disk for its ingest. ``ingested`` holds the digest of an
    ingest that is done while its checkpoint has not been stated yet. ``deploy_next``: it is served as soon as it has been
    ingested. ``given_up``: so often in a row an instance of it failed since one lived well, or it was deployed;
    ``avoided`` are the nodes where it did, each with the time until which a plan would rather have another.
    """

    spec: ModelSpec
    state: ModelState
    digest: str | None
    op: str | None
    node: str | None
    fault: Fault | None
    created_at: float
    changed_at: float
    waiting: int = 0
    running: int = 0
    waiting_since: float | None = None
    refusal: str = ""
    complaint: str = ""
    no_place: str = ""
    ingested: str | None = None
    made_room: int = 0
    deploy_next: bool = False
    heat: float = 0.0
    heat_at: float = 0.0
    given_up: int = 0
    avoided: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(slots=True)
class Instance:
    """One replica. ``epoch`` is its present or last life. ``working_bytes`` are promised on each device beside its weights:
    its KV cache, with what a step takes (`sllmctl.planner.memory`).

    Live only: what its engine can take, ``pid``, ``running`` sequences, ``idle_since`` (None while busy or not ready),
    ``life_at`` (when this life was begun or its stop was asked for), ``ready_at`` of this life, ``plan`` (the decision that
    made it, None after a restart of the manager), ``served`` (a sequence has reached it since it was made), ``grace_s`` (what
    its sequences get when it drains, None for drain_s), ``moving`` (its sequences are to go to another instance, which
    takes its place: its model does not count it any more), ``source`` and ``expected_s`` (where this life's weights come from,
    and how long from its begin until it should be ready; None for one that another manager began).
    """

    id: str
    model: str
    node: str
    digest: str
    epoch: Epoch
    state: InstanceState
    devices: tuple[int, ...]
    working_bytes: int
    restarts: int
    retry_at: float | None
    fault: Fault | None
    phases: StartPhases | None
    reason: str
    created_at: float
    changed_at: float
    kv_capacity_tokens: int = 0
    max_context_tokens: int = 0
    activation_bytes: int = 0
    logits_bytes: int = 0
    pid: int = 0
    running: int = 0
    idle_since: float | None = None
    life_at: float = 0.0
    ready_at: float | None = None
    plan: Plan | None = None
    served: bool = False
    grace_s: float | None = None
    moving: bool = False
    source: Tier = Tier.DISK
    expected_s: float | None = None
