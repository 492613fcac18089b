"""What the processes say to each other: frames, the handshake, and every message, versioned.

A frame is a 4-byte big-endian length and a msgpack body of one tagged struct. Any byte stream carries it. Four links
exist, all of them dialled towards the agent's socket: manager, store, zygote, worker. Each begins with the dialler's
`Hello`, answered by `Welcome` or `Refused`; then the side that holds the truth states all of it (`NodeTruth`,
`StoreTruth`, `ZygoteTruth`, `WorkerTruth`), on every connection anew. After that only differences travel.

A truth is a header, then one `AttemptTruth` per attempt, then `TruthEnd`, so that no frame grows with the load.

Rules that every receiver keeps:

* A message with an older epoch than the one known for its instance or attempt is dropped, not an error.
* Versions are compared in the handshake; within a version, what a build does not know is refused, never guessed. New fields
  have defaults, and defaults are not sent.
* Tokens are positioned in the *sequence*. Appending a run whose start is known is idempotent; a gap is a LinkError, which
  closes the connection, and the truth that follows the reconnect repairs it.
* Every `Submit` that its receiver holds is answered by exactly one `Ended`, repeated in each truth until `Acked`. A
  `Submit` may die with a connection: an attempt submitted over an earlier connection and absent from the next truth is
  lost to a manager, which makes another; an agent submits it to the same worker again.
* A dialler of truth sends nothing but its truth until it is complete, and the other side nothing but Ping, Pong and
  Shutdown until it has taken it in. Before an agent builds a truth for a new manager connection it has closed the older one.
* A manager adopts attempts of older generations from a node's first truth in its life, the highest attempt of each (request,
  choice); any other live attempt that it does not know it cancels, any unknown end it acknowledges. What it wants cancelled it
  cancels again after each truth.
* Fills and forks name who asked (``op``, ``nonce``): only the latest asking is served. An agent attaches a worker only
  to extents from a `Resident` that answers its own `FillArena` on the store's present connection.
* An agent states no truth before its store and every worker on its roster (in its run directory) have dialled it or are
  proven dead, or ``adopt_s`` has run out. A user of a checkpoint counts until its process is proven dead, not until its link
  breaks.
* A command for an instance or epoch that the agent does not have is answered by `InstanceUpdate` (stopped). A newer epoch
  ends the older life first. A stopped life is stated until the manager stops it or starts a newer one.
* A known ``op`` asked for again is answered again, not done again; ended ones are stated until `OperationsAcked`.

Durations are seconds of the sender's monotonic clock; clocks of two machines are never compared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
from msgspec import Meta

from schema.errors import Fault, LinkError
from schema.ids import Epoch
from schema.sampling import SamplingParams, TokenIds
from schema.spec import Source
from schema.states import EndReason, InstanceState, Tier, TierState

__all__ = [
    "MAX_FRAME_BYTES",
    "PROTOCOL",
    "PROTOCOL_OLDEST",
    "TOKEN_WINDOW_FRAMES",
    "Acked",
    "AgentMessage",
    "ArenaInfo",
    "ArenaState",
    "Attach",
    "AttemptTruth",
    "Cancel",
    "CancelFetch",
    "CancelOperation",
    "CancelVerify",
    "CheckpointTruth",
    "ChildExited",
    "Descriptors",
    "DeviceInfo",
    "DeviceWeights",
    "DropCheckpoint",
    "DropDevice",
    "DropResident",
    "Ended",
    "EngineOptions",
    "EngineTiming",
    "Evicted",
    "EvictedDevice",
    "Extent",
    "Fetch",
    "FetchStored",
    "FileChunk",
    "FillArena",
    "FillDevice",
    "Fork",
    "Forked",
    "FrameDecoder",
    "Hello",
    "HoldCheckpoint",
    "HoldDevice",
    "Ingest",
    "InstanceLoad",
    "InstanceTruth",
    "InstanceUpdate",
    "Inventory",
    "LoadCheckpoint",
    "ManagerMessage",
    "Message",
    "NodeTruth",
    "OnDevice",
    "OperationDone",
    "OperationsAcked",
    "PinResidents",
    "PinTo",
    "Ping",
    "Placement",
    "PlacementUpdate",
    "Pong",
    "Progress",
    "Publish",
    "ReadFile",
    "Refused",
    "ReleasedDevice",
    "RemoteCopy",
    "ReserveDevice",
    "Resident",
    "Role",
    "SamplingParams",
    "SetPins",
    "Shutdown",
    "StartInstance",
    "StartPhases",
    "StartWorker",
    "StopInstance",
    "StoreMessage",
    "StoreTruth",
    "Submit",
    "ToStore",
    "ToWorker",
    "ToZygote",
    "TokenRun",
    "Tokens",
    "TruthEnd",
    "VerifyCheckpoint",
    "VerifyStored",
    "Welcome",
    "WorkerMessage",
    "WorkerTruth",
    "ZygoteMessage",
    "ZygoteTruth",
    "encode_frame",
]

PROTOCOL: Final = 1
"""The newest version of these messages that this build speaks."""
PROTOCOL_OLDEST: Final = 1
"""The oldest version that this build still speaks."""
MAX_FRAME_BYTES: Final = 32 << 20
"""A longer frame is refused before its body is read; bulk data never travels here."""
TOKEN_WINDOW_FRAMES: Final = 256
"""How many `Tokens` frames an agent sends ahead of the manager's `Acked`; then runs coalesce at the agent."""

_Count = Annotated[int, Meta(ge=0)]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="t"):
    """Base of all messages; the tag field ``t`` names the kind."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of the structs inside messages."""


# --- Handshake -----------------------------------------------------------------------------------------------------


class Role(StrEnum):
    MANAGER = "manager"
    STORE = "store"
    ZYGOTE = "zygote"
    WORKER = "worker"


class Hello(Message, frozen=True, kw_only=True, forbid_unknown_fields=False, tag="hello"):
    """First frame of a dialler; fields that a newer build adds are passed over, so that versions can be compared.

    ``cluster`` and ``generation`` are the manager's; an agent refuses another cluster's manager and an older generation.
    ``node`` is the name a manager has for this agent: an unclaimed agent takes cluster and name for good, a claimed one
    refuses others. ``instance``, ``epoch`` and ``nonce`` (of its `Fork`) are a worker's. ``token`` proves that store,
    zygote and worker are this agent's kin: it is the content of the file that the agent made (mode 0600) in its run
    directory.
    """

    role: Role
    protocol_oldest: int = PROTOCOL_OLDEST
    protocol: int = PROTOCOL
    software: str
    pid: int
    cluster: str = ""
    generation: int = 0
    node: str = ""
    instance: str = ""
    epoch: Epoch = Epoch(0)
    nonce: int = 0
    token: str = ""


class Welcome(Message, frozen=True, kw_only=True, forbid_unknown_fields=False, tag="welcome"):
    """The agent accepts; ``protocol`` is the version both will speak. ``node`` is the agent's name, "" if unclaimed.

    ``descriptors``: so many `Descriptors` messages follow at once, before anything else (a store gets its arena back; with
    0 it offers its own, or makes one).
    """

    protocol: int
    software: str
    node: str
    pid: int
    descriptors: int = 0


class Refused(Message, frozen=True, kw_only=True, forbid_unknown_fields=False, tag="refused"):
    """The agent will not talk to this dialler and closes; the fault says why and what to do."""

    fault: Fault


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Answered at once by `Pong` with the same ``nonce``; either side may ask."""

    nonce: int


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    nonce: int


class DeviceWeights(_Part, frozen=True, kw_only=True):
    """One checkpoint's image in a device's memory: ``id`` is drawn when that is made, ``size_bytes`` is what is mapped."""

    id: str
    digest: str
    device: int
    size_bytes: _Count
    image_bytes: _Count
    users: int = 0


class Descriptors(Message, frozen=True, kw_only=True, tag="fds"):
    """Unix sockets of one host only: ``count`` descriptors travel with this frame as SCM_RIGHTS.

    ``what`` is "arena" (read and write, store <-> agent), "arena-ro" (to a worker, just before `Attach`) or "device": memory of
    a device with the ``weights`` in it (store <-> agent; to a worker just before `Attach`), one descriptor.
    """

    what: str
    count: int = 1
    weights: DeviceWeights | None = None


# --- What a node is and holds ----------------------------------------------------------------------------------------


class DeviceInfo(_Part, frozen=True, kw_only=True):
    """``kind`` is "cpu" or "cuda"; ``memory_bytes`` is what instances may use of it, KV caches included."""

    index: int
    kind: str
    name: str
    memory_bytes: int


class ArenaInfo(_Part, frozen=True, kw_only=True):
    """The DRAM tier: budget, chunk size, what is taken, and the pages it got ("hugetlb", "thp" or "small").

    ``id`` is drawn when the memory is made, so that extents are never applied to another arena. ``faulted_bytes`` are known to
    be present; what is read into the rest pays for its first touch. ``reader`` is how disks are read: "io_uring" or "threads".
    """

    id: str
    budget_bytes: int
    chunk_bytes: int
    used_bytes: int = 0
    pages: str = "small"
    faulted_bytes: int = 0
    reader: str = ""


class Inventory(_Part, frozen=True, kw_only=True):
    """A machine's means. Bandwidths are measured, in bytes per second; 0 means not measured yet.

    ``disk_budget_bytes``: what checkpoints may take of the disk, ``disk_used_bytes`` of which they take.
    """

    hostname: str
    cpus: int
    memory_bytes: int
    devices: tuple[DeviceInfo, ...]
    arena: ArenaInfo
    disk_budget_bytes: int = 0
    disk_used_bytes: int = 0
    disk_read_bps: float = 0.0
    device_copy_bps: float = 0.0


class Placement(_Part, frozen=True, kw_only=True):
    """One checkpoint on one tier of the speaking node. ``users`` counts instances and loads that hold it there.

    ``reason`` says why it is in quarantine.
    """

    tier: Tier
    state: TierState
    size_bytes: int = 0
    users: int = 0
    device: int = 0
    reason: str = ""


class CheckpointTruth(_Part, frozen=True, kw_only=True):
    """A checkpoint on a node, with what a planner must know of it: an agent may hold one that its manager has forgotten."""

    digest: str
    architecture: str
    image_bytes: int
    kv_token_bytes: int
    max_context_tokens: int
    placements: tuple[Placement, ...] = ()


class StartPhases(_Part, frozen=True, kw_only=True, omit_defaults=False):
    """Where the time of one instance's start went, in seconds; phases overlap, so they need not add up to ``total_s``.

    ``load_s``: until the weights were in DRAM, or on their device where there is one; ``loaded_from`` is the tier that they
    came from, ``loaded_bytes`` is what was read from disk. ``fork_s``: until the worker's process ran. ``build_s``: the model's
    skeleton. ``attach_s``: tensors over the store's memory. ``warm_s``: KV memory, and on a device the engine's first step.
    """

    load_s: float = 0.0
    loaded_from: Tier | None = None
    loaded_bytes: int = 0
    fork_s: float = 0.0
    build_s: float = 0.0
    attach_s: float = 0.0
    warm_s: float = 0.0
    total_s: float = 0.0


class InstanceTruth(_Part, frozen=True, kw_only=True):
    """An instance on a node: its life (``epoch``), state, and, once ready, what it can take."""

    instance: str
    epoch: Epoch
    digest: str
    state: InstanceState
    devices: tuple[int, ...] = (0,)
    kv_capacity_tokens: int = 0
    max_context_tokens: int = 0
    phases: StartPhases | None = None
    fault: Fault | None = None
    pid: int = 0


# --- Requests --------------------------------------------------------------------------------------------------------


class Submit(Message, frozen=True, kw_only=True, tag="submit"):
    """Run one attempt of a sequence on an instance, from its journal: ``prompt`` and the ``generated`` tokens so far.

    The first new token has position ``len(generated)``. A known attempt is ignored; an instance that is unknown, of
    another epoch or not ready ends it as lost. ``request`` and ``model`` travel so that a restarted manager can rebuild
    the journal from what agents hold. ``tenant`` is whom the request is for: tenants take turns, and share no cached prefixes.
    """

    attempt: Epoch
    instance: str
    instance_epoch: Epoch
    request: str
    model: str
    tenant: str = ""
    choice: int = 0
    prompt: TokenIds
    generated: TokenIds = ()
    params: SamplingParams


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """End an attempt early; answered by its `Ended` (cancelled, or how it ended just before). Unknown ones are ignored."""

    attempt: Epoch


class TokenRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """New tokens of one attempt; ``start`` is the position in the sequence of the first of ``ids``.

    ``logprobs`` has one record of equal size for each of them where they were asked for (`schema.sampling.read_logprobs`).
    """

    attempt: Epoch
    start: _Count
    ids: TokenIds
    logprobs: bytes = b""

    def since(self, position: int) -> TokenRun:
        """The part of it from ``position`` of the sequence on, which is not before its start."""
        skipped = position - self.start
        size = len(self.logprobs) // len(self.ids) if self.ids else 0
        return TokenRun(self.attempt, position, self.ids[skipped:], self.logprobs[skipped * size :])


class EngineTiming(_Part, frozen=True, kw_only=True, omit_defaults=False):
    """What an attempt spent inside the engine, in seconds; ``first_token_s`` is from arrival to its first new token.
    ``cached_tokens`` at its beginning needed no computing: their keys and values were found in the prefix cache."""

    queued_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    steps: int = 0
    cached_tokens: int = 0


class Ended(_Part, frozen=True, kw_only=True):
    """The one end of an attempt, after ``position`` tokens of the sequence (those it was resumed from included)."""

    attempt: Epoch
    position: _Count
    reason: EndReason
    fault: Fault | None = None
    timing: EngineTiming | None = None


class Tokens(Message, frozen=True, kw_only=True, tag="tokens"):
    """All new tokens and ends of one engine step (or of several, coalesced). ``frame`` counts from 1 per connection."""

    frame: _Count
    runs: tuple[TokenRun, ...] = ()
    ends: tuple[Ended, ...] = ()


class Acked(Message, frozen=True, kw_only=True, tag="acked"):
    """Credit and acknowledgement: all `Tokens` up to ``frame`` were taken in; the ``ends`` need not be kept any more."""

    frame: _Count
    ends: tuple[Epoch, ...] = ()


class AttemptTruth(Message, frozen=True, kw_only=True, tag="attempt"):
    """Part of a truth: an attempt as the speaker holds it: how it was asked for, its new tokens since with their
    ``logprobs`` (as in `TokenRun`), and its end if it has one."""

    submit: Submit
    new_ids: TokenIds = ()
    logprobs: bytes = b""
    end: Ended | None = None

    @property
    def run(self) -> TokenRun:
        """Its new tokens as a run."""
        return TokenRun(self.submit.attempt, len(self.submit.generated), self.new_ids, self.logprobs)


class TruthEnd(Message, frozen=True, kw_only=True, tag="truthend"):
    """The truth is complete; ``attempts`` were stated."""

    attempts: int


class InstanceLoad(Message, frozen=True, kw_only=True, tag="load"):
    """How busy an instance is, for people to see; said when it changed, at most every 100 ms."""

    instance: str
    epoch: Epoch
    running: int
    waiting: int
    kv_used_tokens: int


# --- Manager -> agent ------------------------------------------------------------------------------------------------


class EngineOptions(_Part, frozen=True, kw_only=True):
    """What the manager decided for one instance. 0 leaves it to the engine; ``kv_bytes`` are reserved on each device.

    ``deterministic``: results are the same bits in every batch, chunk and attempt on one kind of device.
    """

    kv_bytes: int
    max_context_tokens: int = 0
    max_concurrency: int = 64
    threads: int = 0
    deterministic: bool = False


class RemoteCopy(_Part, frozen=True, kw_only=True):
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
    """Bring a checkpoint up to a tier ahead of need. Ends with `OperationDone`."""

    op: str
    digest: str
    tier: Tier = Tier.DRAM


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


class PinTo(_Part, frozen=True, kw_only=True):
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
    offset_bytes: _Count = 0


class Shutdown(Message, frozen=True, kw_only=True, tag="shutdown"):
    """End the agent with its store, zygote and workers, and leave nothing running or in memory. Sequences end as lost."""

    grace_s: float = 0.0


# --- Agent -> manager ------------------------------------------------------------------------------------------------


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


class InstanceUpdate(Message, frozen=True, kw_only=True, tag="instance"):
    """An instance changed: starting, ready, draining, stopping or stopped. Backoff, failed and restarts are the manager's."""

    truth: InstanceTruth


class PlacementUpdate(Message, frozen=True, kw_only=True, tag="placement"):
    """A checkpoint's placements changed; all of them on this node are said."""

    truth: CheckpointTruth


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """How far an operation or an instance's start (``op`` is then the instance id) has come in its present ``stage``.

    ``source`` is the tier that the bytes come from, ``bps`` how many a second came since the step before; None and 0 where
    that is not known.
    """

    op: str
    stage: str
    done_bytes: int
    total_bytes: int
    source: Tier | None = None
    bps: float = 0.0


class OperationDone(Message, frozen=True, kw_only=True, tag="done"):
    """The one end of an operation: a ``fault``, or success. ``digest`` is the checkpoint it made or used, ``layout`` the one
    that it published or fetched, and that so lies on that remote. ``read_bytes`` were read for it, 0 for what was there.
    ``note`` is what whoever asked should know of a success: what a publish found wrong on its remote, and mended.
    """

    op: str
    digest: str = ""
    fault: Fault | None = None
    read_bytes: int = 0
    layout: str = ""
    note: str = ""


class FileChunk(Message, frozen=True, kw_only=True, tag="filechunk"):
    """A part of a file, at most 1 MiB; the end is reached when ``offset_bytes + len(data) == size_bytes``."""

    op: str
    file: str
    offset_bytes: int
    size_bytes: int
    data: bytes
    fault: Fault | None = None


# --- Agent <-> store -------------------------------------------------------------------------------------------------


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """A run of adjacent arena bytes, multiples of the page size; a checkpoint's image is its extents in order."""

    offset_bytes: int
    size_bytes: int


class FillArena(Message, frozen=True, kw_only=True, tag="fill"):
    """Agent -> store: read the checkpoint in ``directory`` into the arena, evicting only what the store may.

    ``users`` hold it from now on. Answered, at once if it is there already, by `Resident` or `OperationDone` with a fault, and
    with this ``op``. ``directory`` is relative to the node's checkpoints directory. ``priority``: 0 if an instance waits for
    it, 1 if it is read ahead of need; a fill under way is raised by one that is more urgent.
    """

    op: str
    digest: str
    directory: str
    users: int = 1
    priority: Annotated[int, Meta(ge=0, le=2)] = 0


class Resident(Message, frozen=True, kw_only=True, tag="resident"):
    """Store -> agent: the whole image lies in the arena at ``extents``; said after a fill, and repeated in `StoreTruth`.

    ``read_bytes`` were read from disk for this answer, 0 if it was there. ``condemned`` says which bytes of it were found
    wrong: it goes when its last user has gone, and no other gets it.
    """

    digest: str
    extents: tuple[Extent, ...]
    image_bytes: int
    users: int = 0
    op: str = ""
    read_bytes: int = 0
    condemned: str = ""


class HoldCheckpoint(Message, frozen=True, kw_only=True, tag="hold"):
    """Agent -> store: how many instances and loads use a checkpoint now, fills not yet answered included.

    With 0 it may be evicted when room is needed, and a fill that nobody waits for is given up. ``condemned`` repeats what the
    store once said of it, for a store that was restarted since.
    """

    digest: str
    users: _Count
    condemned: str = ""


class DropResident(Message, frozen=True, kw_only=True, tag="dropresident"):
    """Agent -> store: free a checkpoint's chunks; answered by `OperationDone`, a Conflict when it has users."""

    op: str
    digest: str


class PinResidents(Message, frozen=True, kw_only=True, tag="pinresidents"):
    """Agent -> store: all checkpoints that are kept in the arena once they are there. Said after every truth."""

    digests: tuple[str, ...] = ()


class VerifyStored(Message, frozen=True, kw_only=True, tag="verifystored"):
    """Agent -> store: compare the checksums of the copy in ``directory``, and of the image in the arena if it lies there.

    Read behind everything that anybody waits for. `Progress` tells how far it is; answered by one `OperationDone`.
    ``directory`` is relative to the node's checkpoints directory.
    """

    op: str
    digest: str
    directory: str


class CancelVerify(Message, frozen=True, kw_only=True, tag="cancelverify"):
    """Agent -> store: nobody waits for this verification any more. It is not answered."""

    op: str


class FetchStored(Message, frozen=True, kw_only=True, tag="fetchstored"):
    """Agent -> store: bring a checkpoint from the remote at ``url`` to the disk and, with ``in_memory``, into the arena as it
    comes, held by ``users`` from then on; where the arena has no room, to the disk alone.

    `Progress` tells how far it is; answered by one `OperationDone`. A digest under way is not fetched twice.
    """

    op: str
    digest: str
    url: str
    layout: str = ""
    in_memory: bool = False
    users: _Count = 0


class CancelFetch(Message, frozen=True, kw_only=True, tag="cancelfetch"):
    """Agent -> store: nobody waits for this op any more. It is not answered; a fetch without ops is given up. With ``keep``
    what has come of it stays on the disk, since somebody may ask again."""

    op: str
    keep: bool = False


class Evicted(Message, frozen=True, kw_only=True, tag="evicted"):
    """Store -> agent: these chunks are free or being filled with something else; no new mapping may be made of them."""

    digest: str


class ArenaState(Message, frozen=True, kw_only=True, tag="arenastate"):
    """Store -> agent: the arena as it is now; said as its pages become present."""

    arena: ArenaInfo


class FillDevice(Message, frozen=True, kw_only=True, tag="filldevice"):
    """Agent -> store: bring the checkpoint in ``directory`` onto ``devices``, by way of DRAM where there is room for it, each
    byte read once; `ReserveDevice` came before. Answered like `FillArena`, by `OnDevice` or `OperationDone` with a fault.
    """

    op: str
    digest: str
    directory: str
    devices: tuple[int, ...]
    users: int = 1
    priority: Annotated[int, Meta(ge=0, le=2)] = 0


class OnDevice(Message, frozen=True, kw_only=True, tag="ondevice"):
    """Store -> agent: the image lies on each device that was asked for; their `Descriptors` came before. ``source`` is the tier
    that it came from for this answer, DEVICE if it was there; ``read_bytes`` of it came from disk."""

    op: str
    digest: str
    weights: tuple[DeviceWeights, ...]
    source: Tier
    read_bytes: int = 0


class HoldDevice(Message, frozen=True, kw_only=True, tag="holddevice"):
    """Agent -> store: how many instances use weights on a device now; as `HoldCheckpoint`."""

    digest: str
    device: int
    users: _Count


class ReserveDevice(Message, frozen=True, kw_only=True, tag="reservedevice"):
    """Agent -> store: what the KV caches of this node's instances take of a device; idle weights make room for it."""

    device: int
    size_bytes: _Count


class DropDevice(Message, frozen=True, kw_only=True, tag="dropdevice"):
    """Agent -> store: free a checkpoint on the devices where nobody uses it; `OperationDone` follows on `EvictedDevice`."""

    op: str
    digest: str


class EvictedDevice(Message, frozen=True, kw_only=True, tag="evicteddevice"):
    """Store -> agent: close your descriptor of these weights, map them nowhere any more, and answer with `ReleasedDevice`."""

    id: str


class ReleasedDevice(Message, frozen=True, kw_only=True, tag="releaseddevice"):
    """Agent -> store: no descriptor of these is held here any more; their memory is free."""

    id: str


class StoreTruth(Message, frozen=True, kw_only=True, tag="storetruth"):
    """All that the arena holds. After a restart of the store it is what the chunk table in the arena itself says.

    ``filling`` are the ops of fills under way, ``fetching`` those of fetches. ``weights`` lie on devices, and all their
    descriptors came before; those in ``evicting`` are to be released. What else of devices the agent holds is nobody's.
    """

    arena: ArenaInfo
    residents: tuple[Resident, ...] = ()
    filling: tuple[str, ...] = ()
    weights: tuple[DeviceWeights, ...] = ()
    evicting: tuple[str, ...] = ()
    fetching: tuple[str, ...] = ()


# --- Agent <-> zygote, worker ----------------------------------------------------------------------------------------


class Fork(Message, frozen=True, kw_only=True, tag="fork"):
    """Agent -> zygote: fork a worker that dials the agent as this instance, with this nonce in its `Hello`."""

    instance: str
    epoch: Epoch
    nonce: int


class Forked(Message, frozen=True, kw_only=True, tag="forked"):
    """Zygote -> agent: the worker's pid, or why there is none."""

    nonce: int
    pid: int = 0
    fault: Fault | None = None


class ChildExited(Message, frozen=True, kw_only=True, tag="exited"):
    """Zygote -> agent: a worker is gone; ``status`` is its exit code, negative for the signal that killed it."""

    pid: int
    status: int


class ZygoteTruth(Message, frozen=True, kw_only=True, tag="zygotetruth"):
    """``pids`` of living children; ``threads`` of the zygote itself, which must be 1 for a safe fork."""

    pids: tuple[int, ...]
    threads: int


class StartWorker(Message, frozen=True, kw_only=True, tag="startworker"):
    """Agent -> worker: build the model of the checkpoint in ``directory``. Its weights follow with `Attach`."""

    start: StartInstance
    directory: str


class Attach(Message, frozen=True, kw_only=True, tag="attach"):
    """Agent -> worker: the whole image now lies in the arena at ``extents``; map it read-only and serve. With ``weights`` it
    lies on a device instead, and ``arena`` is ""."""

    arena: str = ""
    extents: tuple[Extent, ...] = ()
    image_bytes: int
    weights: DeviceWeights | None = None


class WorkerTruth(Message, frozen=True, kw_only=True, tag="workertruth"):
    """Worker -> agent: what it is, empty before `StartWorker`. Its `AttemptTruth` messages and `TruthEnd` follow."""

    truth: InstanceTruth | None = None
    start: StartInstance | None = None
    arena: str = ""
    extents: tuple[Extent, ...] = ()
    weights: DeviceWeights | None = None


ManagerMessage = (
    Ping | Pong | StartInstance | StopInstance | Ingest | LoadCheckpoint | DropCheckpoint | VerifyCheckpoint | SetPins
    | Publish | Fetch | CancelOperation | OperationsAcked | ReadFile | Submit | Cancel | Acked | Shutdown
)  # fmt: skip
"""What a manager says to an agent after its Hello."""

AgentMessage = (
    Welcome | Refused | Ping | Pong | NodeTruth | AttemptTruth | TruthEnd | InstanceUpdate | PlacementUpdate | Progress
    | OperationDone | FileChunk | Tokens | InstanceLoad
)  # fmt: skip
"""What an agent says to a manager."""

StoreMessage = (
    Ping
    | Pong
    | Descriptors
    | ArenaState
    | StoreTruth
    | Resident
    | Evicted
    | Progress
    | OperationDone
    | OnDevice
    | EvictedDevice
)
ToStore = (
    Welcome | Refused | Ping | Pong | Descriptors | FillArena | HoldCheckpoint | DropResident | VerifyStored | CancelVerify
    | PinResidents | FetchStored | CancelFetch | FillDevice | HoldDevice | ReserveDevice | DropDevice | ReleasedDevice
    | Shutdown
)  # fmt: skip
ZygoteMessage = Ping | Pong | ZygoteTruth | Forked | ChildExited
ToZygote = Welcome | Refused | Ping | Pong | Descriptors | Fork | Shutdown
WorkerMessage = Ping | Pong | WorkerTruth | AttemptTruth | TruthEnd | InstanceUpdate | InstanceLoad | Tokens
ToWorker = (
    Welcome | Refused | Ping | Pong | Descriptors | StartWorker | Attach | Submit | Cancel | Acked | StopInstance | Shutdown
)


# --- Frames ----------------------------------------------------------------------------------------------------------

_HEADER = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: Message) -> bytes:
    """The frame of one message. Raises LinkError when it is longer than MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise LinkError(f"a {type(message).__name__} of {len(body)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(body)) + body


T = TypeVar("T")


class FrameDecoder(Generic[T]):
    """Cuts a byte stream into messages of one union type. After an error the stream cannot be used any more."""

    def __init__(self, kind: Any) -> None:
        self._decode: Callable[[bytes], T] = msgspec.msgpack.Decoder(kind).decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """The messages completed by ``data``. Raises LinkError for an oversized frame or a body that is no such message."""
        self._buffer += data
        messages: list[T] = []
        start, end = 0, len(self._buffer)
        while end - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise LinkError(f"a frame announces {length} bytes; the limit is {MAX_FRAME_BYTES}")
            if end - start - _HEADER.size < length:
                break
            body = bytes(self._buffer[start + _HEADER.size : start + _HEADER.size + length])
            try:
                messages.append(self._decode(body))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise LinkError(f"a frame of {length} bytes is not a message of this link: {error}") from error
            start += _HEADER.size + length
        del self._buffer[:start]
        return messages
