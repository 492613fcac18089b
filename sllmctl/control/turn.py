"""One step in the making: what it has changed, what it asks for, and what it must still look at.

Handlers change the view through a `Turn` and mark what they touched; `finish` makes each touched record into one row, in an
order that foreign keys allow, however often a step changed it.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Final

from schema.admin import EventKind, EventView
from schema.ids import EpochCounter, IdSource
from schema.link import InstanceTruth, ManagerMessage
from schema.states import NodeState, Tier
from sllmctl.cluster.changes import (
    PutCheckpoint,
    PutInstance,
    PutModel,
    PutNode,
    PutPin,
    PutPlacement,
    PutPublication,
    RemoveCheckpointRow,
    RemoveInstance,
    RemoveModelRow,
    RemovePin,
    RemovePlacement,
    RemovePublication,
    RowChange,
)
from sllmctl.cluster.records import Checkpoint, Instance, Model, Node, PinKey, PlacementKey, PlacementRecord, Publication
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.control.decisions import Decisions
from sllmctl.control.effects import Effect, Log, Send, Step, WakeAt
from sllmctl.control.spout import Spout
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Journals, Planner

__all__ = ["Core", "Drop", "Left", "Moving", "Timers", "Turn"]

TimerKey = tuple[str, str]
"""What is to be looked at when its time has come: ("model" | "instance" | "node" | "drop" | "refused" | "prefetch" | "settle",
its id)."""
_LEFT_KEPT: Final = 1000
"""So many ingests that no model waits for are remembered, the latest ones: a node may stay away for good."""


class Timers:
    """The times at which something is to be looked at again; a key has one time, the earliest that was asked for."""

    def __init__(self) -> None:
        self._due: dict[TimerKey, float] = {}
        self._heap: list[tuple[float, TimerKey]] = []

    def set(self, key: TimerKey, at: float) -> None:
        if at < self._due.get(key, float("inf")):
            self._due[key] = at
            heapq.heappush(self._heap, (at, key))

    def pop(self, now: float) -> list[TimerKey]:
        """Take out what is due, in order of time."""
        keys: list[TimerKey] = []
        while (at := self.next()) is not None and at <= now:
            _, key = heapq.heappop(self._heap)
            del self._due[key]
            keys.append(key)
        return keys

    def next(self) -> float | None:
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None


@dataclass(slots=True)
class Drop:
    """A checkpoint on its way out of one tier of a node, and how often that was tried."""

    node: str
    digest: str
    tier: Tier
    attempts: int


@dataclass(frozen=True, slots=True)
class Left:
    """An ingest for which no model waits any more, and what it has brought, if it has ended before its node stated that."""

    node: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Moving:
    """A busy instance whose sequences go to ``target``, so that ``cause`` gets its room; ``made``: the target is there only
    for it."""

    source: str
    target: str
    cause: str
    made: bool


@dataclass(slots=True)
class Core:
    """What lasts from step to step. ``dropping`` finds a drop by what it drops; ``prefetches`` are loads ahead of need by
    operation, each a node and a checkpoint; ``kept``: weights that a node did not drop from its devices, and until when it is
    not asked again. ``left`` are ingests that no model waits for any more, of which it is not known yet what they bring.
    ``moves`` are by source. ``look_at``: a model is not planned for before then. ``closing``: the manager is ending. ``spouts``
    bound the events that a node has of each kind. ``turned`` and ``unasked`` are of `scaling.look_around`: whose turn is next,
    and how many were not asked yet."""

    view: ClusterView
    ids: IdSource
    epochs: EpochCounter
    settings: ControlSettings
    estimates: Estimates
    planner: Planner
    journals: Journals
    decisions: Decisions
    timers: Timers = field(default_factory=Timers)
    drops: dict[str, Drop] = field(default_factory=dict)
    dropping: dict[tuple[str, str, Tier], str] = field(default_factory=dict)
    prefetches: dict[str, tuple[str, str]] = field(default_factory=dict)
    kept: dict[tuple[str, str], float] = field(default_factory=dict)
    left: dict[str, Left] = field(default_factory=dict)
    moves: dict[str, Moving] = field(default_factory=dict)
    look_at: dict[str, float] = field(default_factory=dict)
    spouts: dict[tuple[str, str], Spout] = field(default_factory=dict)
    closing: bool = False
    turned: int = 0
    unasked: int = 0
    prefill_outcome_at: float = 0.0
    woken_at: float | None = None
    _moves_of: dict[str, dict[str, Moving]] = field(default_factory=dict)

    def leave(self, op: str, left: Left) -> None:
        """No model waits for an ingest any more. One that is forgotten may leave a checkpoint on its node that no model has."""
        self.left[op] = left
        for oldest in list(self.left)[:-_LEFT_KEPT]:
            del self.left[oldest]

    def begin_move(self, moving: Moving) -> None:
        self.moves[moving.source] = moving
        for name in (moving.source, moving.target, moving.cause):
            self._moves_of.setdefault(name, {})[moving.source] = moving

    def end_move(self, moving: Moving) -> None:
        del self.moves[moving.source]
        for name in (moving.source, moving.target, moving.cause):
            del self._moves_of[name][moving.source]
            if not self._moves_of[name]:
                del self._moves_of[name]

    def moves_of(self, instance: str) -> list[Moving]:
        """The moves that an instance has to do with, as source, target or cause."""
        return list(self._moves_of.get(instance, {}).values())

    def is_moved_to(self, instance: str) -> bool:
        return any(moving.target == instance for moving in self._moves_of.get(instance, {}).values())

    def takes_part(self, instance: str) -> bool:
        return instance in self._moves_of


class Turn:
    """The state of one step. ``rescale`` names models whose number of instances must be looked at before it ends;
    ``freed`` says that room may have appeared for those that were refused, ``asked`` who was asked for that since; ``settle``
    names nodes on which what is planned may have its room now, ``involved`` instances that changed and have to do with a
    move."""

    def __init__(self, core: Core, now: float) -> None:
        self.core = core
        self.view = core.view
        self.settings = core.settings
        self.now = now
        self.rescale: dict[str, None] = {}
        self.freed = False
        self.asked: set[str] = set()
        self.settle: dict[str, None] = {}
        self.involved: dict[str, None] = {}
        self.effects: list[Effect] = []
        self._nodes: dict[str, Node] = {}
        self._checkpoints: dict[str, Checkpoint] = {}
        self._models: dict[str, Model] = {}
        self._placements: dict[PlacementKey, PlacementRecord] = {}
        self._instances: dict[str, Instance] = {}
        self._pins: dict[PinKey, float] = {}
        self._publications: dict[tuple[str, str], Publication] = {}
        self._gone: list[RowChange] = []
        self._events: list[EventView] = []
        self._appended: list[RowChange] = []

    # --- marking rows ---

    def put_node(self, node: Node) -> None:
        self._nodes[node.id] = node

    def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._checkpoints[checkpoint.digest] = checkpoint

    def put_model(self, model: Model) -> None:
        model.changed_at = self.now
        self._models[model.name] = model

    def put_placement(self, record: PlacementRecord) -> None:
        self._placements[record.key] = record

    def touch(self, digest: str, node: str) -> None:
        """A start or a load begins from a checkpoint that lies on this node."""
        for record in self.view.placements_at(digest, node).values():
            if record.tier is not Tier.DEVICE:
                record.used_at = self.now
                self.put_placement(record)

    def put_instance(self, instance: Instance) -> None:
        instance.changed_at = self.now
        self._instances[instance.id] = instance

    def remove_instance(self, instance: Instance) -> None:
        self.view.drop_instance(instance)
        self._instances.pop(instance.id, None)
        self._gone.append(RemoveInstance(instance.id))

    def remove_model(self, model: Model) -> None:
        self.view.drop_model(model.name)
        self._models.pop(model.name, None)
        self._gone.append(RemoveModelRow(model.name))

    def remove_placement(self, record: PlacementRecord) -> None:
        self.view.drop_placement(record.key)
        self._placements.pop(record.key, None)
        self._gone.append(RemovePlacement(*record.key))

    def put_pin(self, key: PinKey) -> None:
        self.view.add_pin(key, self.now)
        self._pins[key] = self.now

    def remove_pin(self, key: PinKey) -> None:
        self.view.drop_pin(key)
        self._pins.pop(key, None)
        self._gone.append(RemovePin(*key))

    def put_publication(self, publication: Publication) -> None:
        self.view.put_publication(publication)
        self._publications[publication.digest, publication.url] = publication

    def remove_publication(self, publication: Publication) -> None:
        key = (publication.digest, publication.url)
        self.view.drop_publication(publication)
        self._publications.pop(key, None)
        self._gone.append(RemovePublication(*key))

    def remove_checkpoint(self, digest: str) -> None:
        for publication in self.view.publications_of(digest):
            self.remove_publication(publication)
        for key in [key for key in self.view.pins if key[0] == digest]:
            self.remove_pin(key)
        self.view.drop_checkpoint(digest)
        self._checkpoints.pop(digest, None)
        self._gone.append(RemoveCheckpointRow(digest))

    def forget_unheld(self, digest: str) -> None:
        """The row of a checkpoint goes when no node holds it, it lies on no remote, and no model means it any more."""
        view = self.view
        held = view.placements_of(digest) or view.publications_of(digest)
        if digest in view.checkpoints and not held and not any(view.models_of(digest)):
            self.remove_checkpoint(digest)

    def append(self, row: RowChange) -> None:
        """A row that depends on no other."""
        self._appended.append(row)

    # --- effects, events, times ---

    def do(self, effect: Effect) -> None:
        self.effects.append(effect)

    def send(self, node: str, message: ManagerMessage) -> None:
        """Say something to a node, if it is connected: the truth of its next connection decides anew."""
        if self.view.nodes[node].state is NodeState.READY:
            self.effects.append(Send(node, message))

    def event(self, kind: EventKind, name: str, reason: str, message: str, *, level: str = "info") -> None:
        event_id = self.core.ids("ev")
        self._events.append(
            EventView(id=event_id, at=self.now, level=level, kind=kind, object=name, reason=reason, message=message)
        )
        self.effects.append(Log(level, f"{kind} {name}: {reason}: {message}"))

    def free(self) -> None:
        """Room may have appeared."""
        self.freed = True
        self.asked.clear()

    def look_now(self, model: str) -> None:
        """What a model was to wait for has changed: it is planned for again when it is scaled next. One that was refused
        waits for room."""
        if self.core.look_at.get(model, float("inf")) != float("inf"):
            del self.core.look_at[model]

    def wake(self, kind: str, name: str, at: float) -> None:
        self.core.timers.set((kind, name), at)

    # --- the end of the step ---

    def finish(self) -> Step:
        changes: list[RowChange] = [_node_row(node) for node in self._nodes.values()]
        changes += [_checkpoint_row(checkpoint) for checkpoint in self._checkpoints.values()]
        changes += [_model_row(model) for model in self._models.values()]
        changes += [_placement_row(record) for record in self._placements.values()]
        changes += [PutPin(*key, at) for key, at in self._pins.items()]
        changes += [PutPublication(p.digest, p.url, p.layout, p.published_at, p.doubt) for p in self._publications.values()]
        changes += [_instance_row(instance) for instance in self._instances.values()]
        changes += sorted(self._gone, key=_removal_order)
        changes += self._events
        changes += self._appended
        at = self.core.timers.next()
        if at is not None and at != self.core.woken_at:
            self.effects.append(WakeAt(at))
            self.core.woken_at = at
        return Step(changes, self.effects)


_REMOVALS = (RemoveInstance, RemoveModelRow, RemovePin, RemovePublication, RemovePlacement, RemoveCheckpointRow)


def _removal_order(change: RowChange) -> int:
    return next(place for place, kind in enumerate(_REMOVALS) if type(change) is kind)


def _node_row(node: Node) -> PutNode:
    return PutNode(node.id, node.name, node.address, node.state, node.cordoned, node.created_at, node.seen_at)


def _checkpoint_row(checkpoint: Checkpoint) -> PutCheckpoint:
    return PutCheckpoint(
        checkpoint.digest,
        checkpoint.architecture,
        checkpoint.image_bytes,
        checkpoint.kv_token_bytes,
        checkpoint.max_context_tokens,
        checkpoint.created_at,
        checkpoint.step,
    )


def _placement_row(record: PlacementRecord) -> PutPlacement:
    return PutPlacement(record.digest, record.node, record.tier, record.device, record.state, record.size_bytes, record.used_at)


def _model_row(model: Model) -> PutModel:
    return PutModel(
        model.spec,
        model.state,
        model.digest,
        model.op,
        model.node,
        model.fault,
        model.created_at,
        model.changed_at,
        model.deploy_next,
    )


def _instance_row(instance: Instance) -> PutInstance:
    truth = InstanceTruth(
        instance=instance.id,
        epoch=instance.epoch,
        digest=instance.digest,
        state=instance.state,
        devices=instance.devices,
        kv_capacity_tokens=instance.kv_capacity_tokens,
        max_context_tokens=instance.max_context_tokens,
        phases=instance.phases,
        fault=instance.fault,
        pid=instance.pid,
    )
    return PutInstance(
        truth,
        instance.model,
        instance.node,
        instance.working_bytes,
        instance.restarts,
        instance.retry_at,
        instance.reason,
        instance.created_at,
        instance.changed_at,
    )
