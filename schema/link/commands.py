"""What the manager commands."""

from __future__ import annotations

from schema.ids import Epoch
from schema.link.base import Count, Message, Part
from schema.spec import Source
from schema.states import Tier

__all__ = [
    "CancelOperation",
    "DropCheckpoint",
    "EngineOptions",
    "Fetch",
    "Ingest",
    "LoadCheckpoint",
    "OperationsAcked",
    "PinTo",
    "Publish",
    "ReadFile",
    "RemoteCopy",
    "SetPins",
    "Shutdown",
    "StartInstance",
    "StopInstance",
    "VerifyCheckpoint",
]


class EngineOptions(Part, frozen=True, kw_only=True):
    """What the manager decided for one instance. 0 leaves it to the engine. ``kv_bytes`` are reserved on each device, and
    ``step_bytes`` beside them, for what a step takes.

    ``deterministic``: results are the same bits in every batch, chunk and attempt on one kind of device.
    """

    kv_bytes: int
    step_bytes: int = 0
    max_context_tokens: int = 0
    max_concurrency: int = 64
    threads: int = 0
    deterministic: bool = False


class RemoteCopy(Part, frozen=True, kw_only=True):
    """A layout of a checkpoint on the remote at ``url``."""

    url: str
    layout: str = ""


class StartInstance(Message, frozen=True, kw_only=True, tag="start"):
    """Make the instance ready: load its weights (wherever they are) and make its worker, side by side.

    What is not on the node's disk is fetched from ``remote``, if that is set.
    """

    instance: str
    epoch: Epoch
    model: str
    digest: str
    devices: tuple[int, ...]
    options: EngineOptions
    remote: RemoteCopy | None = None


class StopInstance(Message, frozen=True, kw_only=True, tag="stop"):
    """End an instance. Its attempts have ``grace_s`` seconds to finish; then they end as lost. Weights stay in their tiers."""

    instance: str
    epoch: Epoch
    grace_s: float = 0.0


class Ingest(Message, frozen=True, kw_only=True, tag="ingest"):
    """Make a loading-optimised checkpoint of a model on this node's disk. Ends with `OperationDone`."""

    op: str
    source: Source


class LoadCheckpoint(Message, frozen=True, kw_only=True, tag="prefetch"):
    """Bring a checkpoint up to a tier ahead of need: into DRAM, or onto a ``device``. Ends with `OperationDone`."""

    op: str
    digest: str
    tier: Tier = Tier.DRAM
    device: Count = 0


class Publish(Message, frozen=True, kw_only=True, tag="publish"):
    """Put the copy on this node's disk on the remote at ``url``. Ends with `OperationDone`, which names the layout."""

    op: str
    digest: str
    url: str


class Fetch(Message, frozen=True, kw_only=True, tag="fetch"):
    """Bring a checkpoint from the remote at ``url`` to this node's disk and, with tier DRAM, into its memory as it comes. Ends
    with `OperationDone`; where a sound copy lies on the disk, at once.

    ``layout`` "" leaves it to the agent to find one there.
    """

    op: str
    digest: str
    url: str
    layout: str = ""
    tier: Tier = Tier.DISK


class DropCheckpoint(Message, frozen=True, kw_only=True, tag="drop"):
    """Take a checkpoint from one tier: DEVICE (those devices of the node where nobody uses it), DRAM, or DISK for good. Where
    all is in use: a Conflict, and nothing is dropped. What is said after it on this link finds the room free."""

    op: str
    digest: str
    tier: Tier


class VerifyCheckpoint(Message, frozen=True, kw_only=True, tag="verify"):
    """Read the copy on disk and compare every checksum: a wrong one puts it in quarantine, none takes it out of there. Ends
    with `OperationDone`, whose fault names the file and the byte.

    What lies in DRAM is compared too: a wrong image is dropped, or kept from new users until its last one has gone.
    """

    op: str
    digest: str


class PinTo(Part, frozen=True, kw_only=True):
    """A checkpoint that is kept on a tier."""

    digest: str
    tier: Tier


class SetPins(Message, frozen=True, kw_only=True, tag="setpins"):
    """All that an operator keeps on tiers of this node: it is never put out there to make room, nor dropped.

    Said after every truth, and when it changes. The agent remembers the latest over its lives.
    """

    pins: tuple[PinTo, ...] = ()


class CancelOperation(Message, frozen=True, kw_only=True, tag="cancelop"):
    """End an operation early; answered by its `OperationDone` (cancelled, or how it ended just before)."""

    op: str


class OperationsAcked(Message, frozen=True, kw_only=True, tag="ackops"):
    """These ended operations need not be stated any more."""

    ops: tuple[str, ...]


class ReadFile(Message, frozen=True, kw_only=True, tag="readfile"):
    """Ask for a text asset of a checkpoint, by the name in its manifest or ``manifest.json``; answered by `FileChunk`."""

    op: str
    digest: str
    file: str
    offset_bytes: Count = 0


class Shutdown(Message, frozen=True, kw_only=True, tag="shutdown"):
    """End the agent with its store, zygote and workers, and leave nothing running or in memory. Sequences end as lost."""

    grace_s: float = 0.0
