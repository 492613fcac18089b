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
  choice), ended ones too whose clients may retry; any other live attempt that it does not know it cancels, any other unknown
  end it acknowledges. What it wants cancelled it
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

from schema.link.base import MAX_FRAME_BYTES, PROTOCOL, PROTOCOL_OLDEST, TOKEN_WINDOW_FRAMES, Message
from schema.link.commands import (
    CancelOperation,
    DropCheckpoint,
    EngineOptions,
    Fetch,
    Ingest,
    LoadCheckpoint,
    OperationsAcked,
    PinTo,
    Publish,
    ReadFile,
    RemoteCopy,
    SetPins,
    Shutdown,
    StartInstance,
    StopInstance,
    VerifyCheckpoint,
)
from schema.link.frames import FrameDecoder, encode_frame
from schema.link.handshake import Descriptors, DeviceWeights, Hello, Ping, Pong, Refused, Role, Welcome
from schema.link.logs import LogChunk, LogLine, ReadLog
from schema.link.node import ArenaInfo, CheckpointTruth, DeviceInfo, DiskCopy, InstanceTruth, Inventory, Placement, StartPhases
from schema.link.reports import (
    Committing,
    FileChunk,
    InstanceUpdate,
    InventoryUpdate,
    NodeEvent,
    NodeTruth,
    OperationDone,
    PlacementUpdate,
    Progress,
)
from schema.link.requests import (
    STEP_BOUNDS_S,
    Acked,
    AttemptTruth,
    Cancel,
    Ended,
    EngineCounts,
    EngineTiming,
    InstanceLoad,
    RetryKey,
    StepCounts,
    Submit,
    TokenRun,
    Tokens,
    TruthEnd,
)
from schema.link.store import (
    ArenaState,
    Arriving,
    CancelFetch,
    CancelVerify,
    DropDevice,
    DropResident,
    Evicted,
    EvictedDevice,
    Extent,
    Fetching,
    FetchStored,
    FillArena,
    FillDevice,
    HoldCheckpoint,
    HoldDevice,
    LayersArrived,
    OnDevice,
    PinResidents,
    ReleasedDevice,
    ReserveDevice,
    Resident,
    StoreTruth,
    VerifyStored,
)
from schema.link.workers import (
    Attach,
    ChildExited,
    Fork,
    Forked,
    ForkIngest,
    KeepSpares,
    StartWorker,
    WorkerTruth,
    ZygoteTruth,
)
from schema.sampling import SamplingParams

__all__ = [
    "MAX_FRAME_BYTES",
    "PROTOCOL",
    "PROTOCOL_OLDEST",
    "STEP_BOUNDS_S",
    "TOKEN_WINDOW_FRAMES",
    "Acked",
    "AgentMessage",
    "ArenaInfo",
    "ArenaState",
    "Arriving",
    "Attach",
    "AttemptTruth",
    "Cancel",
    "CancelFetch",
    "CancelOperation",
    "CancelVerify",
    "CheckpointTruth",
    "ChildExited",
    "Committing",
    "Descriptors",
    "DeviceInfo",
    "DeviceWeights",
    "DiskCopy",
    "DropCheckpoint",
    "DropDevice",
    "DropResident",
    "Ended",
    "EngineCounts",
    "EngineOptions",
    "EngineTiming",
    "Evicted",
    "EvictedDevice",
    "Extent",
    "Fetch",
    "FetchStored",
    "Fetching",
    "FileChunk",
    "FillArena",
    "FillDevice",
    "Fork",
    "ForkIngest",
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
    "InventoryUpdate",
    "KeepSpares",
    "LayersArrived",
    "LoadCheckpoint",
    "LogChunk",
    "LogLine",
    "ManagerMessage",
    "Message",
    "NodeEvent",
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
    "ReadLog",
    "Refused",
    "ReleasedDevice",
    "RemoteCopy",
    "ReserveDevice",
    "Resident",
    "RetryKey",
    "Role",
    "SamplingParams",
    "SetPins",
    "Shutdown",
    "StartInstance",
    "StartPhases",
    "StartWorker",
    "StepCounts",
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

ManagerMessage = (
    Ping | Pong | StartInstance | StopInstance | Ingest | LoadCheckpoint | DropCheckpoint | VerifyCheckpoint | SetPins
    | Publish | Fetch | CancelOperation | OperationsAcked | ReadFile | ReadLog | Submit | Cancel | Acked | Shutdown
)  # fmt: skip
"""What a manager says to an agent after its Hello."""

AgentMessage = (
    Welcome | Refused | Ping | Pong | NodeTruth | AttemptTruth | TruthEnd | InventoryUpdate | InstanceUpdate
    | PlacementUpdate | Progress | OperationDone | NodeEvent | FileChunk | LogChunk | Tokens | InstanceLoad
)  # fmt: skip
"""What an agent says to a manager."""

StoreMessage = (
    Ping
    | Pong
    | Descriptors
    | ArenaState
    | StoreTruth
    | Arriving
    | LayersArrived
    | Fetching
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
ToZygote = Welcome | Refused | Ping | Pong | Descriptors | Fork | ForkIngest | KeepSpares | Shutdown
WorkerMessage = Ping | Pong | WorkerTruth | AttemptTruth | TruthEnd | InstanceUpdate | InstanceLoad | Tokens
ToWorker = (
    Welcome | Refused | Ping | Pong | Descriptors | StartWorker | Arriving | LayersArrived | Attach | Submit | Cancel | Acked
    | StopInstance | Shutdown
)  # fmt: skip
