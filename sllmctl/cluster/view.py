"""The cluster as the control loop holds it: rows, live truth, and the indexes that the planner reads by reference.

Fields of the records may be read freely. What an index depends on (an instance's state, a placement, an inventory) is
changed only through the methods of `ClusterView`; only the control loop calls them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from schema.link import Inventory
from schema.states import InstanceState, NodeState, Tier, TierState
from sllmctl.cluster.ledger import MemoryLedger
from sllmctl.cluster.nested import discard
from sllmctl.cluster.records import (
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

__all__ = ["ClusterView"]


_NO_PLACEMENTS: Mapping[PlacementKey, PlacementRecord] = {}
_NO_INSTANCES: Mapping[str, Instance] = {}
_NO_NODES: Mapping[str, int] = {}


@dataclass(slots=True)
class ClusterView:
    """Nodes, checkpoints, placements, models and instances, with indexes kept incrementally.

    ``memory`` is the ledger of what is promised and free. ``pins`` are by (digest, node, tier), with when each was made.
    ``means`` counts changes of which nodes take instances, and of what they have.
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
    memory: MemoryLedger = field(init=False)
    means: int = 0
    refused: dict[str, None] = field(default_factory=dict)
    line: list[tuple[float, str]] = field(default_factory=list)
    _published: dict[str, dict[str, Publication]] = field(default_factory=dict)
    _placed_at: dict[tuple[str, str], dict[PlacementKey, PlacementRecord]] = field(default_factory=dict)
    _resident: dict[tuple[str, Tier], dict[str, int]] = field(default_factory=dict)
    _by_model: dict[str, dict[str, Instance]] = field(default_factory=dict)
    _by_node: dict[str, dict[str, Instance]] = field(default_factory=dict)
    _placed_on: dict[str, dict[PlacementKey, PlacementRecord]] = field(default_factory=dict)
    _placed_of: dict[str, dict[PlacementKey, PlacementRecord]] = field(default_factory=dict)
    _by_op: dict[str, Model] = field(default_factory=dict)
    _ops_on: dict[str, dict[str, Model]] = field(default_factory=dict)
    _models_of: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = MemoryLedger(self.nodes, self.checkpoints)

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

    def models_of(self, digest: str) -> Iterable[str]:
        """The names of the models that use a checkpoint, in order."""
        return sorted(self._models_of.get(digest, ()))

    def node_named(self, name: str) -> Node | None:
        return next((node for node in self.nodes.values() if node.name == name), None)

    def has_replaceable_copy(self, instance: Instance, state: TierState) -> bool:
        """True if the copy on the disk of an instance's node is in this state, and a sound one can be had elsewhere."""
        record = self.placements.get((instance.digest, instance.node, Tier.DISK, 0))
        if record is None or record.state is not state:
            return False
        elsewhere = any(node != instance.node for node in self.nodes_with(instance.digest, Tier.DISK))
        return elsewhere or bool(self.trusted_publications_of(instance.digest))

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
        discard(self._published, publication.digest, publication.url)

    def model_of_op(self, op: str) -> Model | None:
        return self._by_op.get(op)

    def operating_on(self, node: str) -> list[Model]:
        """Models with an operation on a node."""
        return list(self._ops_on.get(node, {}).values())

    # --- changing: the control loop only ---

    def add_node(self, node: Node) -> None:
        self.nodes[node.id] = node
        self.means += 1
        self.memory.add_node(node)

    def set_node_state(self, node: Node, state: NodeState) -> None:
        """Change a node's state. Whether the transition is allowed is the caller's to judge."""
        node.state = state
        self.means += 1
        self.memory.note_node(node.id)

    def set_inventory(self, node: str, inventory: Inventory) -> None:
        """A node stated its means; what was promised on it is counted anew, since kinds and chunks may have changed."""
        old = self.nodes[node].inventory
        self.nodes[node].inventory = inventory
        if old is None or old.devices != inventory.devices or old.arena.chunk_bytes != inventory.arena.chunk_bytes:
            self.memory.recount(node, self.instances_on(node).values())
            self.means += 1
        elif old.arena.budget_bytes != inventory.arena.budget_bytes:
            self.means += 1
        self.memory.note_node(node)

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is known, or known better: what it takes where it is held already is counted anew."""
        known = self.checkpoints.get(checkpoint.digest)
        self.checkpoints[checkpoint.digest] = checkpoint
        if known is None or known.image_bytes == checkpoint.image_bytes:
            return
        lying = {record.node for record in self.placements_of(checkpoint.digest).values()}
        for node in lying | {each.node for each in self.instances.values() if each.digest == checkpoint.digest}:
            if self.nodes[node].inventory is not None:
                self.memory.recount(node, self.instances_on(node).values())

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
        self.memory.add_copy(record, (record.digest, record.node, record.tier) in self.pins)

    def set_operation(self, model: Model, op: str | None, node: str | None) -> None:
        """The operation that a model waits for, and where it runs."""
        if model.op is not None:
            self._by_op.pop(model.op, None)
        if model.node is not None and model.name in self._ops_on.get(model.node, {}):
            discard(self._ops_on, model.node, model.name)
        model.op, model.node = op, node
        self._note_operation(model)

    def _note_operation(self, model: Model) -> None:
        if model.op is not None:
            self._by_op[model.op] = model
        if model.node is not None:
            self._ops_on.setdefault(model.node, {})[model.name] = model

    def drop_placement(self, key: PlacementKey) -> None:
        record = self.placements.pop(key)
        discard(self._placed_on, record.node, key)
        discard(self._placed_of, record.digest, key)
        discard(self._placed_at, (record.digest, record.node), key)
        if record.state is TierState.RESIDENT:
            nodes = self._resident[record.digest, record.tier]
            nodes[record.node] -= 1
            if not nodes[record.node]:
                discard(self._resident, (record.digest, record.tier), record.node)
        self.memory.drop_copy(record)

    def add_pin(self, key: PinKey, at: float) -> None:
        """Keep a checkpoint on a tier of a node."""
        self.pins[key] = at
        digest, node, tier = key
        if tier is Tier.DRAM and (digest, node, tier, 0) in self.placements:
            self.memory.pin(node, digest)

    def drop_pin(self, key: PinKey) -> None:
        digest, node, tier = key
        if tier is Tier.DRAM:
            self.memory.unpin(node, digest)
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
            model.complaint = ""
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
        self.memory.add_instance(instance)

    def set_state(self, instance: Instance, state: InstanceState) -> None:
        """Change an instance's state and what it holds. Whether the transition is allowed is the caller's to judge."""
        self.memory.set_state(instance, state)

    def set_activity(self, instance: Instance, running: int, idle_since: float | None) -> None:
        """The router's account of an instance, and since when it has nothing to do."""
        self.memory.set_activity(instance, running, idle_since)

    def drop_instance(self, instance: Instance) -> None:
        del self.instances[instance.id]
        self.memory.drop_instance(instance)
        discard(self._by_model, instance.model, instance.id)
        discard(self._by_node, instance.node, instance.id)
