"""Lifecycle states, each with its transitions drawn; `can_become` is the only judge of a transition that we decide.

What a node states as its truth is adopted as it is: a manager that was away may find any state. Only then is nothing judged.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = [
    "EndReason",
    "InstanceState",
    "ModelState",
    "NodeState",
    "RequestState",
    "Tier",
    "TierState",
    "can_become",
]


class Tier(StrEnum):
    """Where bytes of a checkpoint lie, slowest first. On a CPU node the device tier is the DRAM tier."""

    REMOTE = "remote"
    DISK = "disk"
    DRAM = "dram"
    DEVICE = "device"


class NodeState(StrEnum):
    """A node as the manager sees it. Unreachable is not dead: it is dialled for ever, and its instances are kept for a grace.

    ::

        joining ──> ready <──> unreachable
           │          │             │
           └──────────┴──> removed <┘

    ``cordoned`` (takes nothing new) is a flag beside the state, not a state.
    """

    JOINING = "joining"
    READY = "ready"
    UNREACHABLE = "unreachable"
    REMOVED = "removed"


class TierState(StrEnum):
    """A placement: one checkpoint on one tier of one node.

    ::

        absent ──> filling ──> resident ──> evicting ──> absent
                      │            │
                      │            └──> quarantined ──> absent     (a checksum failed)
                      └──> absent                                  (failed or cancelled; the reason is an event)
    """

    ABSENT = "absent"
    FILLING = "filling"
    RESIDENT = "resident"
    EVICTING = "evicting"
    QUARANTINED = "quarantined"


class ModelState(StrEnum):
    """A deployed name.

    ::

        ingesting ──> stopped <──> deployed
            │            │            │
            ├──> failed  │            │
            │      │     │            │
            └──────┴─────┴────────────┴──> deleting ──> (row gone)

    ``failed`` is a failed ingest; it can be ingested again. A deployed model scaled to zero is still ``deployed``.
    """

    INGESTING = "ingesting"
    FAILED = "failed"
    STOPPED = "stopped"
    DEPLOYED = "deployed"
    DELETING = "deleting"


class InstanceState(StrEnum):
    """One life after another of a replica. The id stays over restarts; the epoch is new for each life.

    ::

        planned ──> starting ──> ready ──> draining ──> stopping ──> stopped
           │           │           │           │
           │           ├───────────┴───────────┴──────> stopping, stopped      (no longer wanted, or gone meanwhile)
           │           └──> backoff ──> starting, failed, stopped              (it died and is still wanted)
           └──> stopped

    ``planned``: a place is reserved; its node has not been asked for anything yet.
    ``starting``: weights are on their way and a worker is being made, side by side; written before the node is told.
    ``ready``: takes requests. The last of its weights may still be coming; no token leaves it before they have.
    ``draining``: finishes what it has, takes nothing new. ``backoff``: says why it died and when it is tried again.
    ``failed``: tried as often as allowed, or can never start; after a pause, or once something has changed that may mend it,
    another takes its place.
    """

    PLANNED = "planned"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"
    STOPPED = "stopped"


class RequestState(StrEnum):
    """A request in the router; each of its sequences has one running attempt at most.

    ::

        waiting <──> running ──> finished
           │            │
           └────────────┴──> cancelled, failed

    running -> waiting is recovery: the attempt was lost and the journal waits for another instance.
    """

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class EndReason(StrEnum):
    """Why an attempt ended. Every attempt ends exactly once.

    ``stop`` and ``length`` finish the sequence. ``lost`` says that the instance went away under it or that it never
    took it: the sequence goes on elsewhere from its journal. ``error`` fails the sequence, ``cancelled`` was asked for.
    """

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    LOST = "lost"


_N, _T, _M, _I, _R = NodeState, TierState, ModelState, InstanceState, RequestState
_DIED = frozenset({_I.BACKOFF, _I.FAILED, _I.STOPPED})

_ALLOWED: tuple[tuple[StrEnum, frozenset[StrEnum]], ...] = (
    (_N.JOINING, frozenset({_N.READY, _N.REMOVED})),
    (_N.READY, frozenset({_N.UNREACHABLE, _N.REMOVED})),
    (_N.UNREACHABLE, frozenset({_N.READY, _N.REMOVED})),
    (_N.REMOVED, frozenset()),
    (_T.ABSENT, frozenset({_T.FILLING})),
    (_T.FILLING, frozenset({_T.RESIDENT, _T.ABSENT})),
    (_T.RESIDENT, frozenset({_T.EVICTING, _T.QUARANTINED})),
    (_T.EVICTING, frozenset({_T.ABSENT})),
    (_T.QUARANTINED, frozenset({_T.ABSENT})),
    (_M.INGESTING, frozenset({_M.STOPPED, _M.FAILED, _M.DELETING})),
    (_M.FAILED, frozenset({_M.INGESTING, _M.DELETING})),
    (_M.STOPPED, frozenset({_M.DEPLOYED, _M.DELETING})),
    (_M.DEPLOYED, frozenset({_M.STOPPED, _M.DELETING})),
    (_M.DELETING, frozenset()),
    (_I.PLANNED, frozenset({_I.STARTING, _I.STOPPED})),
    (_I.STARTING, frozenset({_I.READY, _I.STOPPING}) | _DIED),
    (_I.READY, frozenset({_I.DRAINING, _I.STOPPING}) | _DIED),
    (_I.DRAINING, frozenset({_I.STOPPING}) | _DIED),
    (_I.STOPPING, frozenset({_I.STOPPED})),
    (_I.BACKOFF, frozenset({_I.STARTING, _I.FAILED, _I.STOPPED})),
    (_I.FAILED, frozenset({_I.STARTING, _I.STOPPED})),
    (_I.STOPPED, frozenset()),
    (_R.WAITING, frozenset({_R.RUNNING, _R.CANCELLED, _R.FAILED})),
    (_R.RUNNING, frozenset({_R.WAITING, _R.FINISHED, _R.CANCELLED, _R.FAILED})),
    (_R.FINISHED, frozenset()),
    (_R.CANCELLED, frozenset()),
    (_R.FAILED, frozenset()),
)

# Members of two StrEnums with one value are equal, so the kind belongs into the key.
_TRANSITIONS = {(type(old), old.value): frozenset((type(new), new.value) for new in allowed) for old, allowed in _ALLOWED}


def can_become(old: StrEnum, new: StrEnum) -> bool:
    """True if the diagram of this kind of state allows old -> new; a state never becomes itself."""
    return (type(new), new.value) in _TRANSITIONS[type(old), old.value]
