"""What a plan needs of a node and what a node has: the facts that every way of making room starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from schema.link import Inventory
from schema.states import NodeState, Tier, TierState
from sllmctl.cluster.plans import Rejection
from sllmctl.cluster.records import HOLDING, Checkpoint, Model, Node
from sllmctl.cluster.room import RoomIndex
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.memory import working_need

__all__ = ["Ask", "Fleet", "Ground", "arena_deficit_bytes", "ask", "fleet", "ground"]

_NONE: Mapping[str, int] = {}


@dataclass(slots=True)
class Ask:
    """One instance of ``model`` is wanted. ``count`` devices, on each ``share`` bytes of weights (none on a CPU) and ``least``
    to ``wanted`` bytes for its KV cache, ``step`` of them for what its steps take beside it. ``aged``: its requests have waited
    so long that others must make room."""

    model: Model
    checkpoint: Checkpoint
    digest: str
    count: int
    share: int
    least: int
    wanted: int
    step: int
    now: float
    aged: bool


def ask(model: Model, checkpoint: Checkpoint, settings: ControlSettings, now: float) -> Ask:
    need = working_need(model.spec, checkpoint, settings)
    count = model.spec.devices
    since = model.waiting_since
    return Ask(
        model=model,
        checkpoint=checkpoint,
        digest=checkpoint.digest,
        count=count,
        share=-(-checkpoint.image_bytes // count),
        least=need.least_bytes,
        wanted=need.wanted_bytes,
        step=need.step_bytes,
        now=now,
        aged=since is not None and now - since >= settings.age_s,
    )


@dataclass(slots=True)
class Fleet:
    """The nodes' means, as of one count of `ClusterView.means`: they change seldom and are asked for in every plan.

    ``open``: nodes that take instances; ``closed``: those that do not, and why; nodes that are removed are in neither.
    ``whole``: nodes by their devices' memory. ``mixed``: there are CPUs, whose memory holds no weights, so that one least room
    does not fit all nodes. ``least_arena_bytes`` is the smallest DRAM budget, ``chunk_bytes`` the largest chunk.
    """

    means: int
    open: dict[str, Node]
    closed: dict[str, Rejection]
    removed: dict[str, None]
    whole: RoomIndex
    mixed: bool
    least_arena_bytes: int
    chunk_bytes: int


def fleet(view: ClusterView) -> Fleet:
    found = Fleet(view.means, {}, {}, {}, RoomIndex(), False, 0, 0)
    budgets: list[int] = []
    for node in view.nodes.values():
        if node.state is NodeState.REMOVED:
            found.removed[node.id] = None
        elif node.cordoned:
            found.closed[node.id] = Rejection.CORDONED
        elif node.state is NodeState.UNREACHABLE:
            found.closed[node.id] = Rejection.UNREACHABLE
        elif node.state is NodeState.JOINING or node.inventory is None:
            found.closed[node.id] = Rejection.JOINING
        else:
            found.open[node.id] = node
            found.whole.put(node.id, [device.memory_bytes for device in node.inventory.devices])
            found.mixed |= any(device.kind == "cpu" for device in node.inventory.devices)
            budgets.append(node.inventory.arena.budget_bytes)
            found.chunk_bytes = max(found.chunk_bytes, node.inventory.arena.chunk_bytes)
    found.least_arena_bytes = min(budgets, default=0)
    return found


@dataclass(slots=True)
class Ground:
    """One node's devices as one ask finds them. By device: ``rooms``, the bytes there are for its KV cache now, its ``share``
    of the weights taken off; ``own``, where its weights lie already. ``lodgers`` are the instances on each device, only counted
    where a device is one instance's alone. ``cpu``: there are CPUs, on which weights take no device memory."""

    node: Node
    inventory: Inventory
    rooms: dict[int, int]
    share: int
    own: list[int]
    lodgers: dict[int, set[str]]
    cpu: bool

    def has_own(self, devices: Sequence[int]) -> bool:
        """True if its weights lie on all of these devices."""
        own = self.own
        return bool(own) and all(index in own for index in devices)


def ground(view: ClusterView, node: Node, asked: Ask, *, sharing: bool = True) -> Ground:
    inventory = node.inventory
    assert inventory is not None
    name, digest, share = node.id, asked.digest, asked.share
    free = view.memory.free_on[name]
    rooms: dict[int, int] = {}
    cpu = False
    for device in inventory.devices:
        index = device.index
        if device.kind == "cpu":
            cpu = True
            rooms[index] = free[index]
        else:
            rooms[index] = free[index] - share
    own: list[int] = []
    if name in view.nodes_with(digest, Tier.DEVICE):
        for record in view.placements_at(digest, name).values():
            if record.tier is Tier.DEVICE and record.state is TierState.RESIDENT:
                index = record.device
                if index in rooms:
                    rooms[index] += view.memory.idle_weights.get((name, index), _NONE).get(digest, 0)
                if not cpu and record.size_bytes >= share:
                    own.append(index)
    lodgers: dict[int, set[str]] = {}
    if not sharing:
        for instance in view.instances_on(name).values():
            if instance.state in HOLDING:
                for index in instance.devices:
                    lodgers.setdefault(index, set()).add(instance.id)
    return Ground(node, inventory, rooms, share, own, lodgers, cpu)


def arena_deficit_bytes(view: ClusterView, node: Node, digest: str) -> int:
    """The arena room that a load of a checkpoint lacks on a node; weights that nobody uses count as room, since the store
    evicts them itself."""
    assert node.inventory is not None
    if view.memory.keeps_arena(node.id, digest):
        return 0
    held = view.memory.arena_held_bytes.get(node.id, 0)
    return max(0, held + view.memory.arena_bytes_of(node.id, digest) - node.inventory.arena.budget_bytes)
