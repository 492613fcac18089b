"""What an agent tells its manager."""

from __future__ import annotations

from typing import Literal

from schema.errors import Fault
from schema.link.base import Count, Finite, Message
from schema.link.node import CheckpointTruth, InstanceTruth, Inventory, check_stated
from schema.states import Tier

__all__ = [
    "Committing",
    "FileChunk",
    "InstanceUpdate",
    "InventoryUpdate",
    "NodeEvent",
    "NodeTruth",
    "OperationDone",
    "PlacementUpdate",
    "Progress",
]


class NodeTruth(Message, frozen=True, kw_only=True, tag="truth"):
    """All that a node holds; what is not in it does not exist there. Its `AttemptTruth` messages and `TruthEnd` follow.

    ``ops`` are the operations still under way, ``done`` the ended ones not yet acknowledged.
    """

    node: str
    inventory: Inventory
    checkpoints: tuple[CheckpointTruth, ...] = ()
    instances: tuple[InstanceTruth, ...] = ()
    ops: tuple[str, ...] = ()
    done: tuple[OperationDone, ...] = ()

    def __post_init__(self) -> None:
        check_stated(*self.instances)


class InventoryUpdate(Message, frozen=True, kw_only=True, tag="inventory"):
    """A node's means have changed, or it knows more of them."""

    inventory: Inventory


class InstanceUpdate(Message, frozen=True, kw_only=True, tag="instance"):
    """An instance changed: starting, ready, draining, stopping or stopped. Backoff, failed and restarts are the manager's."""

    truth: InstanceTruth

    def __post_init__(self) -> None:
        check_stated(self.truth)


class PlacementUpdate(Message, frozen=True, kw_only=True, tag="placement"):
    """A checkpoint's placements changed; all of them on this node are said."""

    truth: CheckpointTruth


class NodeEvent(Message, frozen=True, kw_only=True, tag="event"):
    """Something happened to what lies in a node's memory or on its devices that its truth afterwards does not tell; the manager
    keeps it as an event. ``digest`` is the checkpoint that it happened to, "" if it happened to the store; ``for_digest`` the
    one that it was for. It was ``ago_s`` seconds ago: an agent without a manager keeps the last of them.
    """

    reason: Literal["StoreLost", "StoreBack", "Evicted"]
    message: str
    level: Literal["info", "warning"] = "info"
    digest: str = ""
    for_digest: str = ""
    ago_s: Finite = 0.0


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """How far an operation or an instance's start (``op`` is then the instance id) has come in its present ``stage``.

    ``source`` is the tier that the bytes come from, None where that is not known.
    """

    op: str
    stage: str
    done_bytes: Count
    total_bytes: Count
    source: Tier | None = None


class Committing(Message, frozen=True, kw_only=True, tag="committing"):
    """What an ingest's process tells its agent alone: it is about to put this checkpoint where it is found. There that may be
    though the process was killed before it could tell its end.
    """

    op: str
    digest: str


class OperationDone(Message, frozen=True, kw_only=True, tag="done"):
    """The one end of an operation: a ``fault``, or success. ``digest`` is the checkpoint it made or used, ``layout`` the one
    that it published or fetched, and that so lies on that remote. ``read_bytes`` were read for it, 0 for what was there.
    ``note`` is what whoever asked should know of a success: what a publish found wrong on its remote, and mended.
    """

    op: str
    digest: str = ""
    fault: Fault | None = None
    read_bytes: Count = 0
    layout: str = ""
    note: str = ""


class FileChunk(Message, frozen=True, kw_only=True, tag="filechunk"):
    """A part of a file, at most 1 MiB; the end is reached when ``offset_bytes + len(data) == size_bytes``."""

    op: str
    file: str
    offset_bytes: Count
    size_bytes: Count
    data: bytes
    fault: Fault | None = None
