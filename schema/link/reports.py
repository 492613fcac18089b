"""What an agent tells its manager."""

from __future__ import annotations

from schema.errors import Fault
from schema.link.base import Count, Message
from schema.link.node import CheckpointTruth, InstanceTruth, Inventory, check_stated
from schema.states import Tier

__all__ = ["FileChunk", "InstanceUpdate", "NodeTruth", "OperationDone", "PlacementUpdate", "Progress"]


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


class InstanceUpdate(Message, frozen=True, kw_only=True, tag="instance"):
    """An instance changed: starting, ready, draining, stopping or stopped. Backoff, failed and restarts are the manager's."""

    truth: InstanceTruth

    def __post_init__(self) -> None:
        check_stated(self.truth)


class PlacementUpdate(Message, frozen=True, kw_only=True, tag="placement"):
    """A checkpoint's placements changed; all of them on this node are said."""

    truth: CheckpointTruth


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """How far an operation or an instance's start (``op`` is then the instance id) has come in its present ``stage``.

    ``source`` is the tier that the bytes come from, None where that is not known.
    """

    op: str
    stage: str
    done_bytes: Count
    total_bytes: Count
    source: Tier | None = None


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
