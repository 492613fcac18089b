"""The cluster as the control loop holds it: rows, live truth, and the indexes that the planner reads by reference.

Fields of the records may be read freely. What an index depends on (an instance's state, a placement, an inventory) is
changed only through the methods of `ClusterView`; only the control loop calls them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from schema.link import DeviceInfo, Inventory
from schema.states import InstanceState, NodeState, Tier, TierState
from sllmctl.control.records import (
    HOLDING,
    LEAVING,
    STANDING,
    Checkpoint,
    Instance,
    Model,
    Node,
    Operation,
    PinKey,
    PlacementKey,
    PlacementRecord,
    Publication,
)
from sllmctl.control.room import RoomIndex

__all__ = ["ClusterView"]


_NO_PLACEMENTS: Mapping[PlacementKey, PlacementRecord] = {}
_NO_INSTANCES: Mapping[str, Instance] = {}
_NO_NODES: Mapping[str, int] = {}


@dataclass(slots=True)
class ClusterView:
    """Nodes, checkpoints, placements, models and instances, with indexes kept incrementally.

    ``committed_bytes[(node, device)]`` is the device memory that holding instances have been promised (their KV cache, and
    their share of the weights where the device is not a CPU). ``arena_held_bytes[node]`` is the arena room of checkpoints
    that something uses, or that are pinned there; the rest of the arena is free or evictable. ``pins`` are by (digest,
    node, tier), with when each was made.

    ``idle_weights[(node, device)]`` are checkpoints that lie in device memory and nobody uses, with their bytes there: they
    are not free, but may be dropped. ``resting_bytes[(node, device)]`` is what ready instances without a sequence have been
    promised, ``leaving_bytes`` what those that drain or stop have been, ``planned_bytes`` what those without a life yet
    have been. ``dram_bytes[node]`` lie in the arena, used or not. ``free_on[node]`` and ``loose_on[node]`` are the room on
    each of its devices: as it is, and as it would be without idle weights, resting and leaving instances; ``free`` and
    ``loose`` find nodes by it. ``means`` counts changes of which nodes take instances, and of what they have.
    ``operations`` are what operators asked for, oldest first, ended ones for a while.
    ``refused`` are the models that found no place, in the order in which they did; ``line`` are those of them for which
    requests wait, by when the first of these came.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    placements: dict[PlacementKey, PlacementRecord] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    instances: dict[str, Instance] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    pins: dict[PinKey, float] = field(default_factory=dict)
    publications: dict[tuple[str, str], Publication] = field(default_factory=dict)
    _published: dict[str, dict[str, Publication]] = field(default_factory=dict)
    committed_bytes: dict[tuple[str, int], int] = field(default_factory=dict)
    arena_held_bytes: dict[str, int] = field(default_factory=dict)
    idle_weights: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    resting_bytes: dict[tuple[str, int], int] = field(default_factory=dict)
    leaving_bytes: dict[tuple[str, int], int] = field(default_factory=dict)
    planned_bytes: dict[tuple[str, int], int] = field(default_factory=dict)
    dram_bytes: dict[str, int] = field(default_factory=dict)
    free_on: dict[str, dict[int, int]] = field(default_factory=dict)
    loose_on: dict[str, dict[int, int]] = field(default_factory=dict)
    means: int = 0
    refused: dict[str, None] = field(default_factory=dict)
    line: list[tuple[float, str]] = field(default_factory=list)
    _free: RoomIndex = field(default_factory=RoomIndex)
    _loose: RoomIndex = field(default_factory=RoomIndex)
    _stale: dict[str, None] = field(default_factory=dict)
    _device_users: dict[tuple[str, int, str], int] = field(default_factory=dict)
    _placed_at: dict[tuple[str, str], dict[PlacementKey, PlacementRecord]] = field(default_factory=dict)
    _resident: dict[tuple[str, Tier], dict[str, int]] = field(default_factory=dict)
    _by_model: dict[str, dict[str, Instance]] = field(default_factory=dict)
    _by_node: dict[str, dict[str, Instance]] = field(default_factory=dict)
    _placed_on: dict[str, dict[PlacementKey, PlacementRecord]] = field(default_factory=dict)
    _placed_of: dict[str, dict[PlacementKey, PlacementRecord]] = field(default_factory=dict)
    _holders: dict[tuple[str, str], int] = field(default_factory=dict)
    _pinned: dict[tuple[str, str], int] = field(default_factory=dict)
    _planned: dict[str, dict[str, Instance]] = field(default_factory=dict)
    _standing: dict[tuple[str, int, str], int] = field(default_factory=dict)
    _lying: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    _by_op: dict[str, Model] = field(default_factory=dict)
    _ops_on: dict[str, dict[str, Model]] = field(default_factory=dict)
    _models_of: dict[str, set[str]] = field(default_factory=dict)

    # --- reading ---

    def instances_of(self, model: str) -> Mapping[str, Instance]:
        """The instances of a model by id, in the order in which they were made."""
        return self._by_model.get(model, _NO_INSTANCES)

    def instances_on(self, node: str) -> Mapping[str, Instance]:
        return self._by_node.get(node, _NO_INSTANCES)

    def placements_on(self, node: str) -> Mapping[PlacementKey, PlacementRecord]:
        return self._placed_on.get(node, _NO_PLACEMENTS)

    def placements_of(self, digest: str) -> Mapping[PlacementKey, PlacementRecord]:
        return self._placed_of.get(digest, _NO_PLACEMENTS)

    def placements_at(self, digest: str, node: str) -> Mapping[PlacementKey, PlacementRecord]:
        """The placements of one checkpoint on one node."""
        return self._placed_at.get((digest, node), _NO_PLACEMENTS)

    def nodes_with(self, digest: str, tier: Tier) -> Mapping[str, int]:
        """The nodes on whose tier a whole checkpoint lies, with the number of its placements there (one per device)."""
        return self._resident.get((digest, tier), _NO_NODES)

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

    def models_of(self, digest: str) -> Iterable[str]:
        """The names of the models that use a checkpoint, in order."""
        return sorted(self._models_of.get(digest, ()))

    def node_named(self, name: str) -> Node | None:
        return next((node for node in self.nodes.values() if node.name == name), None)

    def holds_arena(self, node: str, digest: str) -> bool:
        """True while an instance or a load keeps this checkpoint in the node's arena."""
        return (node, digest) in self._holders

    def has_bad_copy(self, instance: Instance) -> bool:
        """True if the copy on the disk of an instance's node is in quarantine, and a sound one can be had elsewhere."""
        record = self.placements.get((instance.digest, instance.node, Tier.DISK, 0))
        if record is None or record.state is not TierState.QUARANTINED:
            return False
        return bool(self.nodes_with(instance.digest, Tier.DISK) or self.trusted_publications_of(instance.digest))

    def keeps_arena(self, node: str, digest: str) -> bool:
        """True while this checkpoint stays in the node's arena: something uses it, or it lies there and is pinned."""
        return (node, digest) in self._holders or (node, digest) in self._pinned

    def pins_on(self, node: str) -> list[tuple[str, Tier]]:
        """What is kept on tiers of a node, in order."""
        return sorted((digest, tier) for digest, where, tier in self.pins if where == node)

    def publications_of(self, digest: str) -> list[Publication]:
        """Where a checkpoint was published, the latest first; what is in doubt last."""
        found = self._published.get(digest, {}).values()
        return sorted(found, key=lambda each: (bool(each.doubt), -each.published_at, each.url))

    def trusted_publications_of(self, digest: str) -> list[Publication]:
        """Those that nothing speaks against: what counts as a copy."""
        return [each for each in self.publications_of(digest) if not each.doubt]

    def is_published(self, digest: str) -> bool:
        return digest in self._published

    def put_publication(self, publication: Publication) -> None:
        self.publications[publication.digest, publication.url] = publication
        self._published.setdefault(publication.digest, {})[publication.url] = publication

    def drop_publication(self, publication: Publication) -> None:
        del self.publications[publication.digest, publication.url]
        _discard(self._published, publication.digest, publication.url)

    def arena_bytes_of(self, node: str, digest: str) -> int:
        """The arena room of a checkpoint on a node: its image in whole chunks."""
        checkpoint, record = self.checkpoints.get(digest), self.nodes.get(node)
        if checkpoint is None:
            return 0
        chunk = record.inventory.arena.chunk_bytes if record is not None and record.inventory is not None else 1
        return -(-checkpoint.image_bytes // max(chunk, 1)) * max(chunk, 1)

    def device_need_bytes(self, node: str, digest: str, devices: tuple[int, ...], kv_bytes: int) -> dict[int, int]:
        """What an instance takes of each of its devices: its KV cache, and a share of the weights on all but CPUs."""
        record, checkpoint = self.nodes.get(node), self.checkpoints.get(digest)
        kinds = (
            {d.index: d.kind for d in record.inventory.devices} if record is not None and record.inventory is not None else {}
        )
        share = -(-checkpoint.image_bytes // len(devices)) if checkpoint is not None and devices else 0
        return {device: kv_bytes + (0 if kinds.get(device, "cpu") == "cpu" else share) for device in devices}

    def planned_on(self, node: str) -> Mapping[str, Instance]:
        """The instances on a node whose life has not begun, in the order in which they were made."""
        return self._planned.get(node, _NO_INSTANCES)

    def live_bytes(self, node: str, device: int) -> int:
        """Device memory of the instances that have a life, or had one and begin another."""
        key = (node, device)
        return self.committed_bytes.get(key, 0) - self.planned_bytes.get(key, 0)

    def lying_bytes(self, node: str, device: int) -> dict[str, int]:
        """Weights in device memory, also those on their way out, that no instance with a life uses; by checkpoint."""
        here = self._lying.get((node, device))
        if not here:
            return {}
        return {digest: size for digest, size in here.items() if not self._standing.get((node, device, digest))}

    def arena_live_bytes(self, node: str, digest: str) -> int:
        """Arena room held with this checkpoint, not counting the others that only planned instances hold."""
        held = self.arena_held_bytes.get(node, 0)
        planned: dict[str, int] = {}
        for instance in self.planned_on(node).values():
            planned[instance.digest] = planned.get(instance.digest, 0) + 1
        for other, count in planned.items():
            alone = self._holders.get((node, other), 0) == count and (node, other) not in self._pinned
            if other != digest and alone:
                held -= self.arena_bytes_of(node, other)
        return held if self.keeps_arena(node, digest) else held + self.arena_bytes_of(node, digest)

    def model_of_op(self, op: str) -> Model | None:
        return self._by_op.get(op)

    def operating_on(self, node: str) -> list[Model]:
        """Models with an operation on a node."""
        return list(self._ops_on.get(node, {}).values())

    # --- changing: the control loop only ---

    def add_node(self, node: Node) -> None:
        self.nodes[node.id] = node
        self.means += 1
        self._stale[node.id] = None
        if node.inventory is not None:
            self._measure(node.id)

    def set_node_state(self, node: Node, state: NodeState) -> None:
        """Change a node's state. Whether the transition is allowed is the caller's to judge."""
        node.state = state
        self.means += 1
        self._stale[node.id] = None

    def set_inventory(self, node: str, inventory: Inventory) -> None:
        """A node stated its means; what was promised on it is counted anew, since kinds and chunks may have changed."""
        old = self.nodes[node].inventory
        self.nodes[node].inventory = inventory
        if old is None or old.devices != inventory.devices or old.arena.chunk_bytes != inventory.arena.chunk_bytes:
            self._recount(node)
            self.means += 1
        elif old.arena.budget_bytes != inventory.arena.budget_bytes:
            self.means += 1
        self._stale[node] = None

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.checkpoints[checkpoint.digest] = checkpoint

    def drop_checkpoint(self, digest: str) -> None:
        del self.checkpoints[digest]

    def put_placement(self, record: PlacementRecord) -> None:
        if record.key in self.placements:
            self.drop_placement(record.key)
        self.placements[record.key] = record
        self._placed_on.setdefault(record.node, {})[record.key] = record
        self._placed_of.setdefault(record.digest, {})[record.key] = record
        self._placed_at.setdefault((record.digest, record.node), {})[record.key] = record
        if record.state is TierState.RESIDENT:
            nodes = self._resident.setdefault((record.digest, record.tier), {})
            nodes[record.node] = nodes.get(record.node, 0) + 1
        if record.tier is Tier.DRAM and record.users:
            self._hold(record.node, record.digest, 1)
        if record.tier is Tier.DRAM:
            self.dram_bytes[record.node] = self.dram_bytes.get(record.node, 0) + record.size_bytes
            self._pin_there(record.digest, record.node, True)
        if record.tier is Tier.DEVICE:
            self._lying.setdefault((record.node, record.device), {})[record.digest] = record.size_bytes
            self._weigh_idle(record.node, record.device, record.digest)

    def set_operation(self, model: Model, op: str | None, node: str | None) -> None:
        """The operation that a model waits for, and where it runs."""
        if model.op is not None:
            self._by_op.pop(model.op, None)
        if model.node is not None and model.name in self._ops_on.get(model.node, {}):
            _discard(self._ops_on, model.node, model.name)
        model.op, model.node = op, node
        self._note_operation(model)

    def _note_operation(self, model: Model) -> None:
        if model.op is not None:
            self._by_op[model.op] = model
        if model.node is not None:
            self._ops_on.setdefault(model.node, {})[model.name] = model

    def drop_placement(self, key: PlacementKey) -> None:
        record = self.placements.pop(key)
        _discard(self._placed_on, record.node, key)
        _discard(self._placed_of, record.digest, key)
        _discard(self._placed_at, (record.digest, record.node), key)
        if record.state is TierState.RESIDENT:
            nodes = self._resident[record.digest, record.tier]
            nodes[record.node] -= 1
            if not nodes[record.node]:
                _discard(self._resident, (record.digest, record.tier), record.node)
        if record.tier is Tier.DRAM and record.users:
            self._hold(record.node, record.digest, -1)
        if record.tier is Tier.DRAM:
            self.dram_bytes[record.node] -= record.size_bytes
            self._pin_there(record.digest, record.node, False)
        if record.tier is Tier.DEVICE:
            _discard(self._lying, (record.node, record.device), record.digest)
            self._weigh_idle(record.node, record.device, record.digest)

    def add_pin(self, key: PinKey, at: float) -> None:
        """Keep a checkpoint on a tier of a node."""
        self.pins[key] = at
        digest, node, tier = key
        if tier is Tier.DRAM and (digest, node, tier, 0) in self.placements:
            self._pin_there(digest, node, True)

    def drop_pin(self, key: PinKey) -> None:
        digest, node, tier = key
        if tier is Tier.DRAM:
            self._pin_there(digest, node, False)
        del self.pins[key]

    def add_model(self, model: Model) -> None:
        self.models[model.name] = model
        self._note_operation(model)
        if model.digest is not None:
            self._models_of.setdefault(model.digest, set()).add(model.name)

    def set_digest(self, model: Model, digest: str | None) -> None:
        if model.digest is not None:
            self._models_of[model.digest].discard(model.name)
            if not self._models_of[model.digest]:
                del self._models_of[model.digest]
        model.digest = digest
        if digest is not None:
            self._models_of.setdefault(digest, set()).add(model.name)

    def set_refusal(self, model: Model, refusal: str) -> None:
        """Remember why a model found no place, or, with "", that it waits for none."""
        if bool(refusal) != bool(model.refusal):
            self._line_up(model, -1)
            model.refusal = refusal
            self._line_up(model, 1)
        model.refusal = refusal
        if refusal:
            self.refused[model.name] = None
        else:
            self.refused.pop(model.name, None)

    def set_waiting_since(self, model: Model, since: float | None) -> None:
        """Remember when the first of those came who wait for a model."""
        self._line_up(model, -1)
        model.waiting_since = since
        self._line_up(model, 1)

    def _line_up(self, model: Model, sign: int) -> None:
        if model.waiting_since is None or not model.refusal:
            return
        entry = (model.waiting_since, model.name)
        if sign > 0:
            insort(self.line, entry)
        else:
            del self.line[bisect_left(self.line, entry)]

    def drop_model(self, name: str) -> None:
        self.set_digest(self.models[name], None)
        self.set_operation(self.models[name], None, None)
        self.set_refusal(self.models[name], "")
        del self.models[name]

    def add_instance(self, instance: Instance) -> None:
        self.instances[instance.id] = instance
        self._by_model.setdefault(instance.model, {})[instance.id] = instance
        self._by_node.setdefault(instance.node, {})[instance.id] = instance
        if instance.state in HOLDING:
            self._commit(instance, 1)
        if _rests(instance):
            self._promise(self.resting_bytes, instance, 1)
        if instance.state in LEAVING:
            self._promise(self.leaving_bytes, instance, 1)
        self._stand(instance, 1)

    def set_state(self, instance: Instance, state: InstanceState) -> None:
        """Change an instance's state and what it holds. Whether the transition is allowed is the caller's to judge."""
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
        del self.instances[instance.id]
        if _rests(instance):
            self._promise(self.resting_bytes, instance, -1)
        if instance.state in LEAVING:
            self._promise(self.leaving_bytes, instance, -1)
        self._stand(instance, -1)
        if instance.state in HOLDING:
            self._commit(instance, -1)
        _discard(self._by_model, instance.model, instance.id)
        _discard(self._by_node, instance.node, instance.id)

    def _commit(self, instance: Instance, sign: int) -> None:
        needs = self.device_need_bytes(instance.node, instance.digest, instance.devices, instance.kv_bytes)
        for device, need in needs.items():
            key = (instance.node, device)
            self.committed_bytes[key] = self.committed_bytes.get(key, 0) + sign * need
            self._room(instance.node, device, -sign * need, -sign * need)
            user = (instance.node, device, instance.digest)
            self._device_users[user] = self._device_users.get(user, 0) + sign
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
                _discard(self._planned, instance.node, instance.id)
        elif instance.state in STANDING:
            for device in instance.devices:
                user = (instance.node, device, instance.digest)
                self._standing[user] = self._standing.get(user, 0) + sign

    def _rest(self, instance: Instance, rested: bool) -> None:
        rests = _rests(instance)
        if rests != rested:
            self._promise(self.resting_bytes, instance, 1 if rests else -1)

    def _promise(self, promised: dict[tuple[str, int], int], instance: Instance, sign: int) -> None:
        needs = self.device_need_bytes(instance.node, instance.digest, instance.devices, instance.kv_bytes)
        for device, need in needs.items():
            key = (instance.node, device)
            promised[key] = promised.get(key, 0) + sign * need
            if promised is not self.planned_bytes:
                self._room(instance.node, device, 0, sign * need)

    def _weigh_idle(self, node: str, device: int, digest: str) -> None:
        """Weights in device memory are idle when neither the node counts a user nor an instance of ours is to use them."""
        record = self.placements.get((digest, node, Tier.DEVICE, device))
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
        key = (node, digest)
        kept = self.keeps_arena(node, digest)
        after = self._holders.get(key, 0) + sign
        if after:
            self._holders[key] = after
        else:
            del self._holders[key]
        self._weigh_arena(node, digest, kept)

    def _pin_there(self, digest: str, node: str, there: bool) -> None:
        """A checkpoint came to, or left, an arena in which it may be pinned."""
        kept = self.keeps_arena(node, digest)
        if there and (digest, node, Tier.DRAM) in self.pins:
            self._pinned[node, digest] = 1
        else:
            self._pinned.pop((node, digest), None)
        self._weigh_arena(node, digest, kept)

    def _weigh_arena(self, node: str, digest: str, kept: bool) -> None:
        """Count a checkpoint's arena room as held, or no more, if that has changed."""
        keeps = self.keeps_arena(node, digest)
        if keeps != kept:
            size = self.arena_bytes_of(node, digest)
            self.arena_held_bytes[node] = self.arena_held_bytes.get(node, 0) + (size if keeps else -size)

    def _recount(self, node: str) -> None:
        for promised in (self.committed_bytes, self.resting_bytes, self.leaving_bytes, self.planned_bytes):
            for key in [key for key in promised if key[0] == node]:
                del promised[key]
        for instance in self.instances_on(node).values():
            if instance.state in HOLDING:
                for device, need in self.device_need_bytes(node, instance.digest, instance.devices, instance.kv_bytes).items():
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


def _rests(instance: Instance) -> bool:
    return instance.state is InstanceState.READY and instance.idle_since is not None


_O = TypeVar("_O")
_K = TypeVar("_K")
_V = TypeVar("_V")


def _discard(index: dict[_O, dict[_K, _V]], outer: _O, key: _K) -> None:
    del index[outer][key]
    if not index[outer]:
        del index[outer]
