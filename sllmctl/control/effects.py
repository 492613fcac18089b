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

from schema.errors import Fault
from schema.ids import Epoch
from schema.link import ManagerMessage
from schema.spec import ModelSpec
from schema.states import InstanceState, ModelState
from sllmctl.cluster.changes import RowChange

__all__ = [
    "CheckpointKnown",
    "Connect",
    "Effect",
    "Effects",
    "Log",
    "Migrate",
    "ModelChanged",
    "RejectWaiting",
    "Reply",
    "RouteChanged",
    "Send",
    "Step",
    "WakeAt",
]


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
    """No instance can come for this model: fail the requests that wait for it, with this fault. ``retry_after_s``: one is tried
    again then, None if that is not known."""

    model: str
    fault: Fault
    retry_after_s: float | None = None


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
