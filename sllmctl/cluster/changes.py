"""Changes: rows to write or delete so that what the view holds survives the manager. All times are Unix seconds."""

from __future__ import annotations

from dataclasses import dataclass

from schema.admin import EventView, OutcomeView
from schema.errors import Fault
from schema.link import InstanceTruth
from schema.memory import StepCosts
from schema.spec import ModelSpec
from schema.states import ModelState, NodeState, Tier, TierState

__all__ = [
    "PutCheckpoint",
    "PutEstimate",
    "PutInstance",
    "PutModel",
    "PutNode",
    "PutPin",
    "PutPlacement",
    "PutPublication",
    "RemoveCheckpointRow",
    "RemoveInstance",
    "RemoveModelRow",
    "RemovePin",
    "RemovePlacement",
    "RemovePublication",
    "RowChange",
]


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
