"""What a node is, and what it states of checkpoints, instances and their starts."""

from __future__ import annotations

from schema.errors import Fault
from schema.ids import Epoch
from schema.link.base import Part
from schema.states import InstanceState, Tier, TierState

__all__ = ["ArenaInfo", "CheckpointTruth", "DeviceInfo", "InstanceTruth", "Inventory", "Placement", "StartPhases"]


class DeviceInfo(Part, frozen=True, kw_only=True):
    """``kind`` is "cpu" or "cuda"; ``memory_bytes`` is what instances may use of it, KV caches included."""

    index: int
    kind: str
    name: str
    memory_bytes: int


class ArenaInfo(Part, frozen=True, kw_only=True):
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


class Inventory(Part, frozen=True, kw_only=True):
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


class Placement(Part, frozen=True, kw_only=True):
    """One checkpoint on one tier of the speaking node. ``users`` counts instances and loads that hold it there.

    ``reason`` says why it is in quarantine.
    """

    tier: Tier
    state: TierState
    size_bytes: int = 0
    users: int = 0
    device: int = 0
    reason: str = ""


class CheckpointTruth(Part, frozen=True, kw_only=True):
    """A checkpoint on a node, with what a planner must know of it: an agent may hold one that its manager has forgotten."""

    digest: str
    architecture: str
    image_bytes: int
    kv_token_bytes: int
    max_context_tokens: int
    placements: tuple[Placement, ...] = ()


class StartPhases(Part, frozen=True, kw_only=True, omit_defaults=False):
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


class InstanceTruth(Part, frozen=True, kw_only=True):
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
