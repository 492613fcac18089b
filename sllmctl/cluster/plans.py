"""What a planner decided, in types: where an instance goes, what must leave for it, and why.

All times are seconds. An estimate counts from the decision.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from schema.states import Tier

__all__ = [
    "Candidate",
    "Decision",
    "Move",
    "Plan",
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
    ``risk_s``: what it counts that an instance of the model was just given up on this node.

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
    risk_s: float = 0.0
    free_bytes: int = 0
    drops: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    drains: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()
    preempts: tuple[str, ...] = ()

    @property
    def cost_s(self) -> float:
        """What a planner minimises."""
        return self.startup_s + self.delay_s + self.risk_s


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
