"""What the agent says to zygote and workers, and they to it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from schema.errors import Fault
from schema.ids import Epoch
from schema.link.base import Message
from schema.link.commands import StartInstance
from schema.link.handshake import DeviceWeights
from schema.link.node import InstanceTruth
from schema.link.store import Extent
from schema.spec import Source

__all__ = ["Attach", "ChildExited", "Fork", "ForkIngest", "Forked", "KeepSpares", "StartWorker", "WorkerTruth", "ZygoteTruth"]


class Fork(Message, frozen=True, kw_only=True, tag="fork"):
    """Agent -> zygote: fork a worker that dials the agent as this instance, with this nonce in its `Hello`. What it prints goes
    to the file ``log``, if that is set. ``cuda``: those of its devices that need a context."""

    instance: str
    epoch: Epoch
    nonce: int
    log: str = ""
    cuda: tuple[int, ...] = ()


class ForkIngest(Message, frozen=True, kw_only=True, tag="forkingest"):
    """Agent -> zygote: fork a child that ingests ``source`` as this operation. One descriptor comes with it, to which the child
    writes its frames: `Progress`, then one `OperationDone`. Answered like a `Fork`."""

    nonce: int
    op: str
    source: Source


class KeepSpares(Message, frozen=True, kw_only=True, tag="keepspares"):
    """Agent -> zygote: have a child ready for each of these devices that holds a context there."""

    cuda: tuple[int, ...]


class Forked(Message, frozen=True, kw_only=True, tag="forked"):
    """Zygote -> agent: the child's pid, or why there is none."""

    nonce: int
    pid: int = 0
    fault: Fault | None = None


class ChildExited(Message, frozen=True, kw_only=True, tag="exited"):
    """Zygote -> agent: a child is gone; ``status`` is its exit code, negative for the signal that killed it."""

    pid: int
    status: int


class ZygoteTruth(Message, frozen=True, kw_only=True, tag="zygotetruth"):
    """``pids`` of living children; ``threads`` of the zygote itself, which must be 1 for a safe fork; ``numerics`` as in the
    node's `Inventory`."""

    pids: tuple[int, ...]
    threads: int
    numerics: str = ""


class StartWorker(Message, frozen=True, kw_only=True, tag="startworker"):
    """Agent -> worker: build the model of the checkpoint in the first of ``directories`` that is there: one that is being
    fetched moves when its last byte has come. Its weights follow with `Attach`."""

    start: StartInstance
    directories: Annotated[tuple[str, ...], Meta(min_length=1)]


class Attach(Message, frozen=True, kw_only=True, tag="attach"):
    """Agent -> worker: the whole image now lies in the arena at ``extents``; map it read-only and serve. `Arriving` may have
    come before, upon which a worker is ready without its phases, and tells them now. With ``weights`` it lies on a device
    instead, and ``arena`` is ""."""

    arena: str = ""
    extents: tuple[Extent, ...] = ()
    image_id: str = ""
    image_bytes: int
    weights: DeviceWeights | None = None


class WorkerTruth(Message, frozen=True, kw_only=True, tag="workertruth"):
    """Worker -> agent: what it is, empty before `StartWorker`. Its `AttemptTruth` messages and `TruthEnd` follow."""

    truth: InstanceTruth | None = None
    start: StartInstance | None = None
    arena: str = ""
    extents: tuple[Extent, ...] = ()
    weights: DeviceWeights | None = None
