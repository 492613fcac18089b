"""Where one more instance of a model goes: the nodes that can hold it, by how soon it would be ready there, with reasons.

A node can hold it if it is ready and not cordoned, has the checkpoint, has devices with memory for the KV cache (and for the
weights, on all but CPUs), and its arena has room for the image beside what others use. Weights that nobody uses count as room:
the store evicts them itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from enum import StrEnum

import msgspec

from schema.link import DeviceInfo
from schema.states import NodeState, Tier, TierState
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import HOLDING, Checkpoint, ClusterView, Instance, Model, Node
from sllmctl.planner.memory import KvNeed, kv_given_bytes, kv_need

__all__ = ["Candidate", "Plan", "Refusal", "Rejection", "holding_nodes", "place", "place_on"]


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


_PASSING = frozenset({Rejection.JOINING, Rejection.UNREACHABLE, Rejection.BUSY_DEVICE, Rejection.BUSY_ARENA})
"""Rejections that time may lift without an operator: then requests wait instead of being refused."""


class Candidate(msgspec.Struct, frozen=True):
    """One place for it. ``startup_s`` is estimated from request to ready; ``source`` is where its weights come from."""

    node: str
    name: str
    devices: tuple[int, ...]
    kv_bytes: int
    source: Tier
    startup_s: float
    free_bytes: int


class Plan(msgspec.Struct, frozen=True):
    """The decision: the best candidate, the few next ones, and how many nodes were rejected for what."""

    best: Candidate
    others: tuple[Candidate, ...]
    rejected: dict[Rejection, int]
    reason: str


class Refusal(msgspec.Struct, frozen=True):
    """No node can hold it now. ``hopeless``: nor will waiting change that; only an operator can."""

    rejected: dict[Rejection, int]
    hopeless: bool
    reason: str


def place(view: ClusterView, model: Model, settings: ControlSettings) -> Plan | Refusal:
    """The best place for one more instance of ``model``, or why there is none.

    Ties go to the node with more free device memory, then to the smaller id, so that the answer depends on the view alone.
    """
    checkpoint = view.checkpoints.get(model.digest) if model.digest is not None else None
    if checkpoint is None:
        return _refusal(model, {Rejection.UNKNOWN: len(view.nodes)} if view.nodes else {})
    need = kv_need(model.spec, checkpoint, settings)
    rejected: dict[Rejection, int] = {}
    candidates: list[Candidate] = []
    tiers = holding_nodes(view, checkpoint.digest)
    for node_id in tiers:
        node = view.nodes[node_id]
        found = place_on(view, node, checkpoint, model, need, tiers[node_id], settings)
        if isinstance(found, Candidate):
            candidates.append(found)
        else:
            rejected[found] = rejected.get(found, 0) + 1
    if without := sum(node.state is not NodeState.REMOVED for node in view.nodes.values()) - len(tiers):
        rejected[Rejection.NO_COPY] = without
    if not candidates:
        return _refusal(model, rejected)
    candidates.sort(key=lambda found: (found.startup_s, -found.free_bytes, found.node))
    best = candidates[0]
    return Plan(best, tuple(candidates[1 : settings.plan_candidates]), rejected, _reason(best, len(candidates), rejected))


def holding_nodes(view: ClusterView, digest: str) -> dict[str, Tier]:
    """The nodes that have the whole checkpoint, each with the fastest tier it lies on there."""
    tiers: dict[str, Tier] = {}
    for record in view.placements_of(digest).values():
        if record.state is TierState.RESIDENT and record.node in view.nodes and record.tier in (Tier.DISK, Tier.DRAM):
            if view.nodes[record.node].state is NodeState.REMOVED:
                continue
            if record.tier is Tier.DRAM or record.node not in tiers:
                tiers[record.node] = record.tier
    return tiers


def place_on(
    view: ClusterView,
    node: Node,
    checkpoint: Checkpoint,
    model: Model,
    need: KvNeed,
    tier: Tier,
    settings: ControlSettings,
    without: Collection[Instance] = (),
) -> Candidate | Rejection:
    """The place for one more instance on this node, or why it is none; ``without`` are instances counted as gone."""
    if node.cordoned:
        return Rejection.CORDONED
    if node.state is NodeState.UNREACHABLE:
        return Rejection.UNREACHABLE
    if node.state is NodeState.JOINING or node.inventory is None:
        return Rejection.JOINING
    wanted = model.spec.devices
    if len(node.inventory.devices) < wanted:
        return Rejection.FEW_DEVICES
    share = -(-checkpoint.image_bytes // wanted)
    rooms = sorted(_rooms(view, node, share, without), reverse=True, key=lambda room: (room[0], -room[2].index))
    if sorted((room[1] for room in rooms), reverse=True)[wanted - 1] < need.least_bytes:
        return Rejection.SMALL_DEVICE
    arena_bytes = view.arena_bytes_of(node.id, checkpoint.digest)
    if arena_bytes > node.inventory.arena.budget_bytes:
        return Rejection.SMALL_ARENA
    chosen = rooms[:wanted]
    free = chosen[-1][0]
    if free < need.least_bytes:
        return Rejection.BUSY_DEVICE
    held = view.arena_held_bytes.get(node.id, 0) - _arena_freed_bytes(view, node, without)
    if not view.holds_arena(node.id, checkpoint.digest) and held + arena_bytes > node.inventory.arena.budget_bytes:
        return Rejection.BUSY_ARENA
    devices = [room[2] for room in chosen]
    return Candidate(
        node=node.id,
        name=node.name,
        devices=tuple(sorted(device.index for device in devices)),
        kv_bytes=kv_given_bytes(need, free),
        source=tier,
        startup_s=_startup_s(node, checkpoint, tier, devices, settings),
        free_bytes=free,
    )


def _rooms(view: ClusterView, node: Node, share: int, without: Collection[Instance]) -> list[tuple[int, int, DeviceInfo]]:
    """Each device with the KV room it has now, and would have if nothing else ran there, the weights' share taken off."""
    assert node.inventory is not None
    freed: Counter[int] = Counter()
    for gone in without:
        freed.update(view.device_need_bytes(node.id, gone.digest, gone.devices, gone.kv_bytes))
    rooms: list[tuple[int, int, DeviceInfo]] = []
    for device in node.inventory.devices:
        whole = device.memory_bytes - (0 if device.kind == "cpu" else share)
        used = view.committed_bytes.get((node.id, device.index), 0) - freed[device.index]
        rooms.append((whole - used, whole, device))
    return rooms


def _arena_freed_bytes(view: ClusterView, node: Node, without: Collection[Instance]) -> int:
    """The arena room of the weights that nobody on the node would use any more."""
    gone = {instance.id for instance in without}
    digests = {instance.digest for instance in without}
    kept = {one.digest for one in view.instances_on(node.id).values() if one.state in HOLDING and one.id not in gone}
    return sum(view.arena_bytes_of(node.id, digest) for digest in digests - kept)


def _startup_s(node: Node, checkpoint: Checkpoint, tier: Tier, devices: list[DeviceInfo], settings: ControlSettings) -> float:
    """Bytes over the slowest part of the path, side by side with the worker's own start. Attaching on a CPU copies nothing."""
    assert node.inventory is not None
    paths = [settings.start_base_s]
    if tier is not Tier.DRAM:
        paths.append(checkpoint.image_bytes / (node.inventory.disk_read_bps or settings.disk_read_bps))
    if any(device.kind != "cpu" for device in devices):
        share = checkpoint.image_bytes / len(devices)
        paths.append(share / (node.inventory.device_copy_bps or settings.device_copy_bps))
    return max(paths)


def _reason(best: Candidate, count: int, rejected: dict[Rejection, int]) -> str:
    places = "the only place" if count == 1 else f"the soonest of {count} places"
    others = f"; rejected: {_counts(rejected)}" if rejected else ""
    return f"on {best.name}, {places}: weights on {best.source.value}, ready in about {best.startup_s:.2f} s{others}"


def _refusal(model: Model, rejected: dict[Rejection, int]) -> Refusal:
    hopeless = not any(reason in _PASSING for reason in rejected)
    what = f"no node can hold model {model.name!r}" if hopeless else f"no node has room for model {model.name!r} now"
    return Refusal(rejected, hopeless, f"{what}: {_counts(rejected)}" if rejected else f"{what}: there is no node")


def _counts(rejected: dict[Rejection, int]) -> str:
    return ", ".join(f"{count} node{'s' if count > 1 else ''} {reason.value}" for reason, count in sorted(rejected.items()))
