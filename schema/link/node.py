"""What a node is, and what it states of checkpoints, instances and their starts."""

from __future__ import annotations

from typing import Final

import msgspec

from schema.errors import Fault
from schema.link.base import Count, Finite, Life, Part
from schema.memory import StepCosts
from schema.states import InstanceState, Tier, TierState

__all__ = [
    "ArenaInfo",
    "CheckpointTruth",
    "DeviceInfo",
    "DiskCopy",
    "InstanceTruth",
    "Inventory",
    "Placement",
    "StartPhases",
    "check_stated",
]


class DeviceInfo(Part, frozen=True, kw_only=True, omit_defaults=False):
    """``kind`` is "cpu" or "cuda"; ``memory_bytes`` is what instances may use of it, KV caches included."""

    index: Count
    kind: str
    name: str
    memory_bytes: Count


class ArenaInfo(Part, frozen=True, kw_only=True, omit_defaults=False):
    """The DRAM tier: budget, chunk size, what is taken, and the pages it got ("hugetlb", "thp" or "small").

    ``id`` is drawn when the memory is made, so that extents are never applied to another arena. ``faulted_bytes`` are known to
    be present; what is read into the rest pays for its first touch. ``reader`` is how disks are read: "io_uring" or "threads".
    """

    id: str
    budget_bytes: Count
    chunk_bytes: Count
    used_bytes: Count = 0
    pages: str = "small"
    faulted_bytes: Count = 0
    reader: str = ""


class Inventory(Part, frozen=True, kw_only=True, omit_defaults=False):
    """A machine's means. Bandwidths are measured, in bytes per second; 0 means not measured yet.

    ``disk_budget_bytes``: what checkpoints may take of the disk, ``disk_used_bytes`` of which they take. ``software``: what
    each of its processes said that it runs, "sllmctl-store 0.1.0", by its role; of a worker by its instance. ``numerics``: what
    the bits of a deterministic model depend on here beside the device and the number of threads, the same words on nodes that
    are alike in it; "" while there is no zygote to say it, and so none that could fork a worker.
    """

    hostname: str
    cpus: Count
    memory_bytes: Count
    devices: tuple[DeviceInfo, ...]
    arena: ArenaInfo
    disk_budget_bytes: Count = 0
    disk_used_bytes: Count = 0
    disk_read_bps: Finite = 0.0
    device_copy_bps: Finite = 0.0
    software: dict[str, str] = msgspec.field(default_factory=dict)
    numerics: str = ""


class DiskCopy(Part, frozen=True, kw_only=True):
    """A checkpoint in one layout on the speaking node's disk. ``verified``: every byte of it was found right once, and none was
    found wrong, or could not be read, since."""

    layout: str
    state: TierState
    verified: bool = False
    size_bytes: Count = 0


class Placement(Part, frozen=True, kw_only=True):
    """One checkpoint on one tier of the speaking node. ``users`` counts instances and loads that hold it there. ``size_bytes``
    is what it takes there: on the disk what all of its copies do, of which those in place take nothing that is the node's.

    ``reason`` says why it is in quarantine, and on the disk which copies beside the best one are. ``copies`` are all that lie
    on the disk, the best one first.
    """

    tier: Tier
    state: TierState
    size_bytes: Count = 0
    users: Count = 0
    device: Count = 0
    reason: str = ""
    copies: tuple[DiskCopy, ...] = ()


class CheckpointTruth(Part, frozen=True, kw_only=True):
    """A checkpoint on a node, with what a planner must know of it: an agent may hold one that its manager has forgotten.
    ``step``: what an engine's step costs beside the KV cache, where its manifest says that."""

    digest: str
    architecture: str
    image_bytes: Count
    kv_token_bytes: Count
    max_context_tokens: Count
    step: StepCosts | None = None
    placements: tuple[Placement, ...] = ()


class StartPhases(Part, frozen=True, kw_only=True, omit_defaults=False):
    """Where the time of one instance's start went, in seconds; phases overlap, so they need not add up to ``total_s``. Told
    when it has all its weights, which may be after it is ready: its first request then is being computed already.

    ``load_s``: until the weights were in DRAM, or on their device where there is one; ``loaded_from`` is the tier that they
    came from, ``loaded_bytes`` is what was read from disk. ``fork_s``: until the worker's process ran; ``zygote_s`` of that
    there was no zygote to fork it, as after the node has begun. ``build_s``: the model's skeleton. ``attach_s``: tensors over
    the store's memory. ``warm_s``: KV memory, and on a device the engine's first step.
    """

    load_s: Finite = 0.0
    loaded_from: Tier | None = None
    loaded_bytes: Count = 0
    fork_s: Finite = 0.0
    zygote_s: Finite = 0.0
    build_s: Finite = 0.0
    attach_s: Finite = 0.0
    warm_s: Finite = 0.0
    total_s: Finite = 0.0


class InstanceTruth(Part, frozen=True, kw_only=True):
    """An instance on a node: its life (``epoch``), state, and, once ready, what it can take, and what a step of it may take
    of its device beside the KV cache. ``remote`` is where its weights were to come from, when ``fault`` is of that."""

    instance: str
    epoch: Life
    digest: str
    state: InstanceState
    devices: tuple[Count, ...] = (0,)
    kv_capacity_tokens: Count = 0
    max_context_tokens: Count = 0
    activation_bytes: Count = 0
    logits_bytes: Count = 0
    phases: StartPhases | None = None
    fault: Fault | None = None
    remote: str = ""
    pid: Count = 0


_STATED: Final = frozenset(
    {InstanceState.STARTING, InstanceState.READY, InstanceState.DRAINING, InstanceState.STOPPING, InstanceState.STOPPED}
)


def check_stated(*truths: InstanceTruth) -> None:
    """Raises ValueError for a state that is not a node's to state: planned, backoff and failed are the manager's."""
    for truth in truths:
        if truth.state not in _STATED:
            raise ValueError(f"instance {truth.instance} is said to be {truth.state.value}, which is not a node's to say")
