"""What a planner decides, in types: where an instance goes, what must leave for it, why, and what the planner may ask.

All times are seconds. An estimate counts from the decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

from schema.states import Tier

if TYPE_CHECKING:
    from sllmctl.control.records import Model

__all__ = [
    "Abilities",
    "Candidate",
    "Decision",
    "Journals",
    "Move",
    "NoJournals",
    "Plan",
    "Planner",
    "Refusal",
    "Rejection",
    "Wait",
    "kind_of",
]


class Rejection(StrEnum):
    """Why a node cannot hold an instance, in words that follow "1 node"."""

    UNKNOWN = "without a known checkpoint"
    NO_COPY = "without the checkpoint"
    CORDONED = "cordoned"
    JOINING = "not connected yet"
    UNREACHABLE = "unreachable"
    FEW_DEVICES = "with too few devices"
    SMALL_DEVICE = "with too little device memory in all"
    SMALL_ARENA = "with a DRAM budget below the weights"
    BUSY_DEVICE = "with its device memory in use"
    BUSY_ARENA = "with its DRAM budget in use"
    SLOWER = "not looked at, since it could not be better"

    @property
    def passing(self) -> bool:
        """Time may lift it without an operator: then requests wait instead of being refused."""
        return self in (Rejection.JOINING, Rejection.UNREACHABLE, Rejection.BUSY_DEVICE, Rejection.BUSY_ARENA, Rejection.SLOWER)


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """A busy instance that goes elsewhere: to ``target``, an instance of its model with room, or to one that is started.

    ``ready_s``: until the target is there. ``migrate_s``: from then until the last token has moved. ``pause_s``: how long each
    of its sequences stands still. ``drops``: idle weights that go from the target node's devices for it.
    """

    instance: str
    node: str
    devices: tuple[int, ...]
    working_bytes: int
    target: str = ""
    source: Tier = Tier.DRAM
    peer: str = ""
    drops: tuple[str, ...] = ()
    ready_s: float
    migrate_s: float
    pause_s: float


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One place for an instance, and what it takes.

    ``source`` is the tier its weights come from; with ``peer`` (a node's id) they come from that node's memory or disk,
    ``source`` then being REMOTE.
    ``queue_s``: until its channels are free; ``load_s``: its bytes over the slowest of them; ``room_s``: until those who leave
    have left; ``startup_s``: all of it, until it is ready. ``delay_s``: what others pay: reloads that become likely, pauses.

    ``drops``: checkpoints whose weights leave the device tier of this node: idle ones, and those of whoever leaves for it or
    has been leaving, as soon as nothing uses them any more and before the newcomer begins; ``stops``: idle instances that
    end; ``drains``: busy ones that take nothing new and end with their last sequence; ``moves``: busy ones that migrate;
    ``preempts``: busy ones that end at once, their sequences resumed elsewhere from their journals (no plan of sllmctl's own
    planner does that).
    ``free_bytes``: the room for its KV cache on the tightest of its devices.
    """

    node: str
    name: str
    devices: tuple[int, ...]
    working_bytes: int
    source: Tier
    peer: str = ""
    queue_s: float = 0.0
    load_s: float = 0.0
    room_s: float = 0.0
    startup_s: float
    delay_s: float = 0.0
    free_bytes: int = 0
    drops: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    drains: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()
    preempts: tuple[str, ...] = ()

    @property
    def cost_s(self) -> float:
        """What a planner minimises."""
        return self.startup_s + self.delay_s


class Plan(msgspec.Struct, frozen=True):
    """Start an instance at ``best``; the few next ones, and how many nodes were rejected for what."""

    best: Candidate
    others: tuple[Candidate, ...]
    rejected: dict[Rejection, int]
    reason: str


class Wait(msgspec.Struct, frozen=True):
    """Start none: those who wait are served sooner by what is there or coming, in about ``wait_s``. ``best`` would have been
    the start."""

    wait_s: float
    best: Candidate
    rejected: dict[Rejection, int]
    reason: str


class Refusal(msgspec.Struct, frozen=True):
    """No node can hold it now. ``hopeless``: nor will waiting change that; only an operator can."""

    rejected: dict[Rejection, int]
    hopeless: bool
    reason: str


Decision = Plan | Wait | Refusal


def kind_of(decision: Decision) -> str:
    """The kind of a decision in a word."""
    return "start" if isinstance(decision, Plan) else "wait" if isinstance(decision, Wait) else "refused"


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What nodes and router can carry out. ``migrate``: running sequences move between instances by their tokens. ``fetch``: a
    node gets any checkpoint that it lacks, from a peer or a remote, when an instance is started. ``published``: it gets those
    that were published, from their remote."""

    migrate: bool = False
    fetch: bool = False
    published: bool = False


class Journals(Protocol):
    """What only the router knows, read at the moment of planning."""

    def tokens(self, instance: str) -> Sequence[int]:
        """Prompt and generated tokens of each sequence that runs on an instance."""

    def remaining_s(self, instance: str) -> float:
        """How long an instance that takes nothing new would go on, as far as its model's past replies tell."""

    def wait_s(self, model: str) -> float | None:
        """How long until the last of those who wait for a model would run on its ready instances; None if nothing tells."""


class NoJournals:
    """Journals of which nothing is known."""

    def tokens(self, instance: str) -> Sequence[int]:
        return ()

    def remaining_s(self, instance: str) -> float:
        return 0.0

    def wait_s(self, model: str) -> float | None:
        return None


class Planner(Protocol):
    """Who decides. It reads the view and changes nothing; the control loop carries its decisions out."""

    def plan(self, model: Model, now: float, *, wait_s: float | None = None) -> Decision:
        """Where one more instance of ``model`` goes. ``wait_s``: when those who wait would be served without it, if known."""

    def reload_s(self, model: Model, now: float) -> float:
        """How long a start of ``model`` would take when its idle instances and their KV caches are gone."""
