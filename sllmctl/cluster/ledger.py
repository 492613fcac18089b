"""The memory ledger: what of each node's devices and arena is promised to instances, lies there unused, or is free.

Only the control loop's view changes it, as records come, change and go; the planner reads it by reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from schema.link import DeviceInfo
from schema.states import InstanceState, NodeState, Tier, TierState
from sllmctl.cluster.nested import count, discard
from sllmctl.cluster.records import HOLDING, LEAVING, STANDING, Checkpoint, Instance, Node, PlacementRecord
from sllmctl.cluster.room import RoomIndex

__all__ = ["MemoryLedger"]

_NO_INSTANCES: Mapping[str, Instance] = {}
_NO_COPIES: Mapping[str, PlacementRecord] = {}


@dataclass(slots=True)
class MemoryLedger:
    """Device memory and arena room by node, kept incrementally over ``nodes`` and ``checkpoints``, which are the view's.

    ``committed_bytes[(node, device)]`` is the device memory that holding instances have been promised (their KV cache, and
    their share of the weights where the device is not a CPU). ``arena_held_bytes[node]`` is the arena room of checkpoints
    that something uses, or that are pinned there; the rest of the arena is free or evictable.

    ``idle_weights[(node, device)]`` are checkpoints that lie in device memory and nobody uses, with their bytes there: they
    are not free, but may be dropped. ``resting_bytes[(node, device)]`` is what ready instances without a sequence have been
    promised, ``leaving_bytes`` what those that drain or stop have been, ``planned_bytes`` what those without a life yet
    have been. ``dram_bytes[node]`` lie in the arena, used or not. ``free_on[node]`` and ``loose_on[node]`` are the room on
    each of its devices: as it is, and as it would be without idle weights, resting and leaving instances; ``free`` and
    ``loose`` find nodes by it.
    """

    nodes: Mapping[str, Node]
    checkpoints: Mapping[str, Checkpoint]
    committed_bytes: dict[tuple[str, int], int] = field(default_factory=dict)
    arena_held_bytes: dict[str, int] = field(default_factory=dict)
    idle_weights: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    resting_bytes: dict[tuple[str, int], int] = field(default_factory=dict)
    leaving_bytes: dict[tuple[str, int], int] = field(default_factory=dict)
    planned_bytes: dict[tuple[str, int], int] = field(default_factory=dict)
    dram_bytes: dict[str, int] = field(default_factory=dict)
    free_on: dict[str, dict[int, int]] = field(default_factory=dict)
    loose_on: dict[str, dict[int, int]] = field(default_factory=dict)
    _free: RoomIndex = field(default_factory=RoomIndex)
    _loose: RoomIndex = field(default_factory=RoomIndex)
    _stale: dict[str, None] = field(default_factory=dict)
    _device_users: dict[tuple[str, int, str], int] = field(default_factory=dict)
    _holders: dict[tuple[str, str], int] = field(default_factory=dict)
    _pinned: dict[tuple[str, str], int] = field(default_factory=dict)
    _planned: dict[str, dict[str, Instance]] = field(default_factory=dict)
    _standing: dict[tuple[str, int, str], int] = field(default_factory=dict)
    _copies: dict[tuple[str, int], dict[str, PlacementRecord]] = field(default_factory=dict)

    # --- reading ---

    def free_bytes(self, node: str, device: DeviceInfo) -> int:
        """Device memory that nothing is promised and no idle weights lie in; negative while promises overlap."""
        return self.free_on[node][device.index]

    @property
    def free(self) -> RoomIndex:
        """Nodes that take instances, by their free device memory."""
        self._refresh()
        return self._free

    @property
    def loose(self) -> RoomIndex:
        """Nodes that take instances, by their device memory if idle weights and resting instances were gone."""
        self._refresh()
        return self._loose

    def live_bytes(self, node: str, device: int) -> int:
        """Device memory of the instances that have a life, or had one and begin another."""
        key = (node, device)
        return self.committed_bytes.get(key, 0) - self.planned_bytes.get(key, 0)

    def lying_bytes(self, node: str, device: int) -> dict[str, int]:
        """Weights in device memory, also those on their way out, that no instance with a life uses; by checkpoint."""
        here = self._copies.get((node, device))
        if not here:
            return {}
        return {digest: copy.size_bytes for digest, copy in here.items() if not self._standing.get((node, device, digest))}

    def device_need_bytes(self, node: str, digest: str, devices: tuple[int, ...], working_bytes: int) -> dict[int, int]:
        """What an instance takes of each of its devices: its KV cache, and a share of the weights on all but CPUs."""
        record, checkpoint = self.nodes.get(node), self.checkpoints.get(digest)
        kinds = (
            {d.index: d.kind for d in record.inventory.devices} if record is not None and record.inventory is not None else {}
        )
        share = -(-checkpoint.image_bytes // len(devices)) if checkpoint is not None and devices else 0
        return {device: working_bytes + (0 if kinds.get(device, "cpu") == "cpu" else share) for device in devices}

    def planned_on(self, node: str) -> Mapping[str, Instance]:
        """The instances on a node whose life has not begun, in the order in which they were made."""
        return self._planned.get(node, _NO_INSTANCES)

    def holds_arena(self, node: str, digest: str) -> bool:
        """True while an instance or a load keeps this checkpoint in the node's arena."""
        return (node, digest) in self._holders

    def keeps_arena(self, node: str, digest: str) -> bool:
        """True while this checkpoint stays in the node's arena: something uses it, or it lies there and is pinned."""
        return (node, digest) in self._holders or (node, digest) in self._pinned

    def arena_bytes_of(self, node: str, digest: str) -> int:
        """The arena room of a checkpoint on a node: its image in whole chunks."""
        checkpoint, record = self.checkpoints.get(digest), self.nodes.get(node)
        if checkpoint is None:
            return 0
        chunk = record.inventory.arena.chunk_bytes if record is not None and record.inventory is not None else 1
        return -(-checkpoint.image_bytes // max(chunk, 1)) * max(chunk, 1)

    def arena_live_bytes(self, node: str, digest: str) -> int:
        """Arena room held with this checkpoint, not counting the others that only planned instances hold."""
        held = self.arena_held_bytes.get(node, 0)
        planned: dict[str, int] = {}
        for instance in self.planned_on(node).values():
            planned[instance.digest] = planned.get(instance.digest, 0) + 1
        for other, users in planned.items():
            alone = self._holders.get((node, other), 0) == users and (node, other) not in self._pinned
            if other != digest and alone:
                held -= self.arena_bytes_of(node, other)
        return held if self.keeps_arena(node, digest) else held + self.arena_bytes_of(node, digest)

    # --- changing: the view only ---

    def add_node(self, node: Node) -> None:
        self._stale[node.id] = None
        if node.inventory is not None:
            self._measure(node.id)

    def note_node(self, node: str) -> None:
        """Whether a node takes instances, or what it has, may have changed."""
        self._stale[node] = None

    def recount(self, node: str, instances: Iterable[Instance]) -> None:
        """A node's kinds of devices or its chunks may have changed: what is promised on it, anew."""
        for promised in (self.committed_bytes, self.resting_bytes, self.leaving_bytes, self.planned_bytes):
            for key in [key for key in promised if key[0] == node]:
                del promised[key]
        for instance in instances:
            if instance.state in HOLDING:
                for device, need in self.device_need_bytes(
                    node, instance.digest, instance.devices, instance.working_bytes
                ).items():
                    self.committed_bytes[node, device] = self.committed_bytes.get((node, device), 0) + need
            if _rests(instance):
                self._promise(self.resting_bytes, instance, 1)
            if instance.state in LEAVING:
                self._promise(self.leaving_bytes, instance, 1)
            if instance.state is InstanceState.PLANNED:
                self._promise(self.planned_bytes, instance, 1)
        self._measure(node)
        held = {digest for holder, digest in (*self._holders, *self._pinned) if holder == node}
        self.arena_held_bytes[node] = sum(self.arena_bytes_of(node, digest) for digest in held)

    def add_copy(self, record: PlacementRecord, pinned: bool) -> None:
        """A checkpoint lies on a tier of a node, where it may be pinned."""
        if record.tier is Tier.DRAM:
            if record.users:
                self._hold(record.node, record.digest, 1)
            self.dram_bytes[record.node] = self.dram_bytes.get(record.node, 0) + record.size_bytes
            if pinned:
                self.pin(record.node, record.digest)
        if record.tier is Tier.DEVICE:
            self._copies.setdefault((record.node, record.device), {})[record.digest] = record
            self._weigh_idle(record.node, record.device, record.digest)

    def drop_copy(self, record: PlacementRecord) -> None:
        if record.tier is Tier.DRAM:
            if record.users:
                self._hold(record.node, record.digest, -1)
            self.dram_bytes[record.node] -= record.size_bytes
            self.unpin(record.node, record.digest)
        if record.tier is Tier.DEVICE:
            discard(self._copies, (record.node, record.device), record.digest)
            self._weigh_idle(record.node, record.device, record.digest)

    def pin(self, node: str, digest: str) -> None:
        """A checkpoint that lies in a node's arena stays there."""
        kept = self.keeps_arena(node, digest)
        self._pinned[node, digest] = 1
        self._weigh_arena(node, digest, kept)

    def unpin(self, node: str, digest: str) -> None:
        """A checkpoint is pinned no more in a node's arena, or has left it."""
        kept = self.keeps_arena(node, digest)
        self._pinned.pop((node, digest), None)
        self._weigh_arena(node, digest, kept)

    def add_instance(self, instance: Instance) -> None:
        if instance.state in HOLDING:
            self._commit(instance, 1)
        if _rests(instance):
            self._promise(self.resting_bytes, instance, 1)
        if instance.state in LEAVING:
            self._promise(self.leaving_bytes, instance, 1)
        self._stand(instance, 1)

    def set_state(self, instance: Instance, state: InstanceState) -> None:
        """Change an instance's state and what it holds."""
        held, holds = instance.state in HOLDING, state in HOLDING
        if held and not holds:
            self._commit(instance, -1)
        rested, left = _rests(instance), instance.state in LEAVING
        self._stand(instance, -1)
        instance.state = state
        self._stand(instance, 1)
        self._rest(instance, rested)
        if (state in LEAVING) != left:
            self._promise(self.leaving_bytes, instance, -1 if left else 1)
        if holds and not held:
            self._commit(instance, 1)

    def set_activity(self, instance: Instance, running: int, idle_since: float | None) -> None:
        """The router's account of an instance, and since when it has nothing to do."""
        rested = _rests(instance)
        instance.running, instance.idle_since = running, idle_since
        self._rest(instance, rested)

    def drop_instance(self, instance: Instance) -> None:
        if _rests(instance):
            self._promise(self.resting_bytes, instance, -1)
        if instance.state in LEAVING:
            self._promise(self.leaving_bytes, instance, -1)
        self._stand(instance, -1)
        if instance.state in HOLDING:
            self._commit(instance, -1)

    def _commit(self, instance: Instance, sign: int) -> None:
        needs = self.device_need_bytes(instance.node, instance.digest, instance.devices, instance.working_bytes)
        for device, need in needs.items():
            key = (instance.node, device)
            self.committed_bytes[key] = self.committed_bytes.get(key, 0) + sign * need
            self._room(instance.node, device, -sign * need, -sign * need)
            user = (instance.node, device, instance.digest)
            count(self._device_users, user, sign)
            self._weigh_idle(*user)
        self._hold(instance.node, instance.digest, sign)
        self._stale[instance.node] = None

    def _stand(self, instance: Instance, sign: int) -> None:
        """Count an instance among those that wait for their room, or among those that use it."""
        if instance.state is InstanceState.PLANNED:
            self._promise(self.planned_bytes, instance, sign)
            if sign > 0:
                self._planned.setdefault(instance.node, {})[instance.id] = instance
            else:
                discard(self._planned, instance.node, instance.id)
        elif instance.state in STANDING:
            for device in instance.devices:
                count(self._standing, (instance.node, device, instance.digest), sign)

    def _rest(self, instance: Instance, rested: bool) -> None:
        rests = _rests(instance)
        if rests != rested:
            self._promise(self.resting_bytes, instance, 1 if rests else -1)

    def _promise(self, promised: dict[tuple[str, int], int], instance: Instance, sign: int) -> None:
        needs = self.device_need_bytes(instance.node, instance.digest, instance.devices, instance.working_bytes)
        for device, need in needs.items():
            key = (instance.node, device)
            promised[key] = promised.get(key, 0) + sign * need
            if promised is not self.planned_bytes:
                self._room(instance.node, device, 0, sign * need)

    def _weigh_idle(self, node: str, device: int, digest: str) -> None:
        """Weights in device memory are idle when neither the node counts a user nor an instance of ours is to use them."""
        record = self._copies.get((node, device), _NO_COPIES).get(digest)
        unused = record is not None and record.users == 0 and record.state is TierState.RESIDENT
        here = self.idle_weights.setdefault((node, device), {})
        before = here.get(digest, 0)
        if record is not None and unused and not self._device_users.get((node, device, digest)):
            here[digest] = record.size_bytes
        else:
            here.pop(digest, None)
        self._room(node, device, before - here.get(digest, 0), 0)

    def _room(self, node: str, device: int, free: int, loose: int) -> None:
        """So much more is free on a device, and would be."""
        room = self.free_on.get(node)
        if room is not None and device in room:
            room[device] += free
            self.loose_on[node][device] += loose
            self._stale[node] = None

    def _refresh(self) -> None:
        for node_id in self._stale:
            node = self.nodes[node_id]
            if node.state is not NodeState.READY or node.cordoned or node.inventory is None:
                self._free.drop(node_id)
                self._loose.drop(node_id)
                continue
            self._free.put(node_id, list(self.free_on[node_id].values()))
            self._loose.put(node_id, list(self.loose_on[node_id].values()))
        self._stale.clear()

    def _measure(self, node: str) -> None:
        """The room on each device of a node, counted anew."""
        inventory = self.nodes[node].inventory
        assert inventory is not None
        free = self.free_on[node] = {}
        loose = self.loose_on[node] = {}
        for device in inventory.devices:
            key = (node, device.index)
            room = device.memory_bytes - self.committed_bytes.get(key, 0)
            free[device.index] = room - sum(self.idle_weights.get(key, {}).values())
            loose[device.index] = room + self.resting_bytes.get(key, 0) + self.leaving_bytes.get(key, 0)
        self._stale[node] = None

    def _hold(self, node: str, digest: str, sign: int) -> None:
        kept = self.keeps_arena(node, digest)
        count(self._holders, (node, digest), sign)
        self._weigh_arena(node, digest, kept)

    def _weigh_arena(self, node: str, digest: str, kept: bool) -> None:
        """Count a checkpoint's arena room as held, or no more, if that has changed."""
        keeps = self.keeps_arena(node, digest)
        if keeps != kept:
            size = self.arena_bytes_of(node, digest)
            self.arena_held_bytes[node] = self.arena_held_bytes.get(node, 0) + (size if keeps else -size)


def _rests(instance: Instance) -> bool:
    return instance.state is InstanceState.READY and instance.idle_since is not None
