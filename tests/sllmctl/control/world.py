"""A cluster in one process: the real loop over a real schema, with agents and a router that are models of the real ones.

Time stands still until `World.pass_time`. Words between loop and agents are queued; `World.settle` delivers them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from sqlalchemy import create_engine, event
from sqlalchemy.pool import StaticPool

from schema.admin import EventView
from schema.errors import Fault
from schema.ids import Epoch, EpochCounter, IdSource, make_id
from schema.link import (
    ArenaInfo,
    CancelOperation,
    CheckpointTruth,
    DeviceInfo,
    DropCheckpoint,
    Ingest,
    InstanceTruth,
    InstanceUpdate,
    Inventory,
    ManagerMessage,
    NodeTruth,
    OperationDone,
    OperationsAcked,
    Placement,
    PlacementUpdate,
    StartInstance,
    StopInstance,
)
from schema.spec import EngineSpec, ModelSpec, PathSource, ScaleSpec
from schema.states import InstanceState, Tier, TierState
from schema.tables import Base
from sllmctl.control.effects import (
    AddModel,
    AddNode,
    CheckpointKnown,
    Connect,
    DemandChanged,
    DeployModel,
    Event,
    FromNode,
    InstanceActivity,
    Log,
    ModelChanged,
    NodeLost,
    PutInstance,
    RejectWaiting,
    Reply,
    RouteChanged,
    Send,
    Step,
    Tick,
    WakeAt,
)
from sllmctl.control.loop import ControlLoop
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import ClusterView, Instance
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.planner import LocalityPlanner
from sllmctl.planner.plans import Abilities, Journals, NoJournals
from sllmctl.state.rows import apply, read_view

__all__ = ["MIB", "Agent", "World", "control_loop", "digest_of", "spec"]

MIB = 1 << 20
_I = InstanceState
START = 1_000_000.0


def control_loop(
    view: ClusterView,
    *,
    ids: IdSource,
    epochs: EpochCounter,
    settings: ControlSettings,
    abilities: Abilities | None = None,
    journals: Journals | None = None,
) -> ControlLoop:
    """A loop with the production planner over estimates of its own."""
    estimates = Estimates(settings)
    journals = journals or NoJournals()
    planner = LocalityPlanner(view, estimates, journals, settings, abilities or Abilities())
    return ControlLoop(view, ids=ids, epochs=epochs, settings=settings, estimates=estimates, planner=planner, journals=journals)


def digest_of(name: str) -> str:
    return (name.encode().hex() * 64)[:64]


def spec(
    name: str = "m", *, least: int = 0, most: int = 1, keep_alive_s: float = 100.0, kv_mib: int = 10, node: str = ""
) -> ModelSpec:
    return ModelSpec(
        name=name,
        source=PathSource(f"/models/{name}", node),
        scale=ScaleSpec(min=least, max=most, keep_alive_s=keep_alive_s, max_concurrency=4),
        engine=EngineSpec(kv_bytes=kv_mib * MIB),
    )


@dataclass
class Agent:
    """A node that keeps its word: lives by epoch, operations by id, and never more on a device than it has."""

    name: str
    device_mib: int = 25
    arena_mib: int = 1000
    connected: bool = False
    checkpoints: dict[str, CheckpointTruth] = field(default_factory=dict)
    lives: dict[str, InstanceTruth] = field(default_factory=dict)
    starts: dict[str, StartInstance] = field(default_factory=dict)
    ops: dict[str, Ingest | DropCheckpoint] = field(default_factory=dict)
    done: dict[str, OperationDone] = field(default_factory=dict)
    heard: list[ManagerMessage] = field(default_factory=list)
    automatic: bool = True
    """Starts, drains, ingests and drops succeed as soon as they are asked for."""

    def truth(self) -> NodeTruth:
        inventory = Inventory(
            hostname=self.name,
            cpus=4,
            memory_bytes=1 << 34,
            devices=(DeviceInfo(index=0, kind="cpu", name="cpu", memory_bytes=self.device_mib * MIB),),
            arena=ArenaInfo(id="a", budget_bytes=self.arena_mib * MIB, chunk_bytes=2 * MIB),
        )
        return NodeTruth(
            node=self.name,
            inventory=inventory,
            checkpoints=tuple(self.checkpoints.values()),
            instances=tuple(self.lives.values()),
            ops=tuple(self.ops),
            done=tuple(self.done.values()),
        )

    def hold(self, name: str, *, image_mib: int = 8) -> None:
        """Have the checkpoint of a model on disk."""
        digest = digest_of(name)
        disk = Placement(tier=Tier.DISK, state=TierState.RESIDENT, size_bytes=image_mib * MIB)
        self.checkpoints[digest] = CheckpointTruth(
            digest=digest,
            architecture="Tiny",
            image_bytes=image_mib * MIB,
            kv_token_bytes=1024,
            max_context_tokens=512,
            placements=(disk,),
        )

    def hear(self, message: ManagerMessage) -> list[InstanceUpdate | PlacementUpdate | OperationDone]:
        self.heard.append(message)
        match message:
            case StartInstance():
                return self._start(message)
            case StopInstance(instance=instance, epoch=epoch, grace_s=grace_s):
                return self._stop(instance, epoch, grace_s)
            case Ingest(op=op) | DropCheckpoint(op=op):
                if op in self.done:
                    return [self.done[op]]
                self.ops[op] = message
                return self.finish(op) if self.automatic else []
            case CancelOperation(op=op):
                return self.finish(op, Fault("cancelled", "it was cancelled")) if op in self.ops else []
            case OperationsAcked(ops=ops):
                for op in ops:
                    self.done.pop(op, None)
                return []
            case _:
                raise AssertionError(f"the loop never says {message}")

    def finish(self, op: str, fault: Fault | None = None) -> list[InstanceUpdate | PlacementUpdate | OperationDone]:
        """End an operation, well or with a fault."""
        asked = self.ops.pop(op)
        update: list[InstanceUpdate | PlacementUpdate | OperationDone] = []
        digest = digest_of(asked.source.path.rsplit("/", 1)[1]) if isinstance(asked, Ingest) else asked.digest  # type: ignore[union-attr]
        if fault is None and isinstance(asked, Ingest):
            self.hold(asked.source.path.rsplit("/", 1)[1])  # type: ignore[union-attr]
            update.append(PlacementUpdate(truth=self.checkpoints[digest]))
        elif fault is None and digest in self.checkpoints:
            assert isinstance(asked, DropCheckpoint)
            left = tuple(one for one in self.checkpoints[digest].placements if one.tier is not asked.tier)
            truth = msgspec.structs.replace(self.checkpoints[digest], placements=left)
            self.checkpoints[digest] = truth
            if not left:
                del self.checkpoints[digest]
            update.append(PlacementUpdate(truth=truth))
        self.done[op] = OperationDone(op=op, digest=digest if fault is None else "", fault=fault)
        return [*update, self.done[op]]

    def _start(self, message: StartInstance) -> list[InstanceUpdate | PlacementUpdate | OperationDone]:
        known = self.lives.get(message.instance)
        if known is not None and known.epoch >= message.epoch:
            return []
        self.lives[message.instance] = InstanceTruth(
            instance=message.instance,
            epoch=message.epoch,
            digest=message.digest,
            state=_I.STARTING,
            devices=message.devices,
        )
        self.starts[message.instance] = message
        taken = sum(self.starts[one].options.kv_bytes for one, life in self.lives.items() if life.state is not _I.STOPPED)
        assert taken <= self.device_mib * MIB, f"{self.name} was asked to hold {taken // MIB} of {self.device_mib} MiB"
        assert message.digest in self.checkpoints
        return self.become(message.instance, _I.READY) if self.automatic else []

    def _stop(self, instance: str, epoch: Epoch, grace_s: float) -> list[InstanceUpdate | PlacementUpdate | OperationDone]:
        life = self.lives.get(instance)
        if life is None or life.epoch != epoch:
            return [InstanceUpdate(truth=InstanceTruth(instance=instance, epoch=epoch, digest="", state=_I.STOPPED))]
        if grace_s and not self.automatic and life.state is not _I.STOPPED:
            return self.become(instance, _I.DRAINING)
        del self.lives[instance]
        return [InstanceUpdate(truth=msgspec.structs.replace(life, state=_I.STOPPED))]

    def become(
        self, instance: str, state: InstanceState, fault: Fault | None = None
    ) -> list[InstanceUpdate | PlacementUpdate | OperationDone]:
        """A life changes; a stopped one is stated until the manager has heard of it and said so."""
        capacity = 4096 if state is _I.READY else 0
        life = msgspec.structs.replace(
            self.lives[instance], state=state, fault=fault, kv_capacity_tokens=capacity, max_context_tokens=512, pid=77
        )
        self.lives[instance] = life
        return [InstanceUpdate(truth=life)]


class World:
    """The loop, its durable rows, its agents, and what a router would know. Every effect is checked against the rows."""

    def __init__(
        self,
        *agents: Agent,
        settings: ControlSettings | None = None,
        abilities: Abilities | None = None,
        journals: Journals | None = None,
    ) -> None:
        self.abilities = abilities or Abilities()
        self.journals = journals or NoJournals()
        self.now = START
        self.settings = settings or ControlSettings()
        self.agents = {agent.name: agent for agent in agents}
        self.engine = create_engine("sqlite://", poolclass=StaticPool)
        event.listen(self.engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys=ON"))
        Base.metadata.create_all(self.engine)
        self.generation = 0
        self.history: list[tuple[Event | None, float, Step]] = []
        self.events: list[EventView] = []
        self.start_manager()

    def close(self) -> None:
        self.engine.dispose()

    def start_manager(self) -> None:
        """A manager begins, from the rows alone; agents are not connected."""
        self.generation += 1
        self.wake_at: float | None = None
        self.routes: dict[str, RouteChanged] = {}
        self.models: dict[str, ModelChanged] = {}
        self.rejected: list[RejectWaiting] = []
        self.replies: dict[int, Fault | None] = {}
        self.known: list[CheckpointKnown] = []
        self.dialled: list[str] = []
        self.queue: deque[Callable[[], None]] = deque()
        self.tickets = 0
        self.drawn = 0
        for agent in self.agents.values():
            agent.connected = False
        with self.engine.begin() as connection:
            self.view = read_view(connection)
        self.loop = control_loop(
            self.view,
            ids=self.make_id,
            epochs=EpochCounter(self.generation),
            settings=self.settings,
            abilities=self.abilities,
            journals=self.journals,
        )
        self.carry_out(None, self.loop.begin(self.now))

    def make_id(self, kind: str) -> str:
        self.drawn += 1
        return make_id(kind, self.now, self.generation.to_bytes(5, "big") + self.drawn.to_bytes(5, "big"))

    # --- driving ---

    def say(self, event: Event) -> Step:
        step = self.loop.step(event, self.now)
        self.carry_out(event, step)
        return step

    def settle(self) -> None:
        """Deliver what is under way until nothing more is said."""
        for _ in range(10_000):
            if not self.queue:
                return
            self.queue.popleft()()
        raise AssertionError("loop and agents talk without end")

    def do(self, event: Event) -> None:
        self.say(event)
        self.settle()

    def ask(self, make: Callable[[int], Event]) -> Fault | None:
        """An operator's command and its answer."""
        self.tickets += 1
        self.do(make(self.tickets))
        return self.replies.pop(self.tickets)

    def pass_time(self, seconds: float) -> None:
        """Let time go by, waking the loop when it asked for it."""
        end = self.now + seconds
        for _ in range(10_000):
            self.settle()
            if self.wake_at is None or self.wake_at > end:
                self.now = end
                return
            self.now, self.wake_at = max(self.now, self.wake_at), None
            self.say(Tick())
        raise AssertionError("the loop wakes itself without end")

    def connect(self, name: str) -> None:
        """A node's link comes up: it states its truth."""
        agent = self.agents[name]
        self.say(AddNode(name, name, f"unix:/run/{name}"))
        agent.connected = True
        self.do(FromNode(name, agent.truth()))

    def lose(self, name: str) -> None:
        self.agents[name].connected = False
        self.do(NodeLost(name, "the link broke"))

    def tell(self, name: str, messages: list[InstanceUpdate | PlacementUpdate | OperationDone]) -> None:
        """An agent speaks, if it is connected; else its truth will."""
        for message in messages:
            if self.agents[name].connected:
                self.say(FromNode(name, message))
        self.settle()

    def serve(self, model: ModelSpec) -> None:
        """Register, ingest and deploy."""
        assert self.ask(lambda ticket: AddModel(ticket, model)) is None
        assert self.ask(lambda ticket: DeployModel(ticket, model.name, None)) is None

    def demand(self, model: str, waiting: int, running: int = 0) -> None:
        self.do(DemandChanged(model, waiting, running))

    def busy(self, instance: Instance, running: int) -> None:
        self.do(InstanceActivity(instance.id, running))

    def only(self, model: str = "m") -> Instance:
        (instance,) = self.view.instances_of(model).values()
        return instance

    def crash(self, instance: Instance, fault: Fault | None = None) -> None:
        fault = fault or Fault("internal", "the worker was killed")
        agent = self.agents[instance.node]
        self.tell(instance.node, agent.become(instance.id, _I.STOPPED, fault))

    def reasons(self, kind: str = "") -> list[str]:
        return [one.reason for one in self.events if not kind or one.kind == kind]

    # --- carrying out, and checking ---

    def carry_out(self, event: Event | None, step: Step) -> None:
        self.history.append((event, self.now, step))
        with self.engine.begin() as connection:
            apply(connection, step.changes)
        self.events += [change for change in step.changes if isinstance(change, EventView)]
        for effect in step.effects:
            match effect:
                case Send(node, message):
                    self.check_intent(node, message)
                    self.queue.append(lambda node=node, message=message: self.deliver(node, message))  # type: ignore[misc]
                case RouteChanged():
                    self.routes[effect.instance] = effect
                    if effect.state in (_I.STOPPED, _I.FAILED):
                        del self.routes[effect.instance]
                case ModelChanged():
                    self.models[effect.model] = effect
                    if effect.spec is None:
                        del self.models[effect.model]
                case RejectWaiting():
                    self.rejected.append(effect)
                case Reply(ticket, fault):
                    self.replies[ticket] = fault
                case CheckpointKnown():
                    self.known.append(effect)
                case Connect(node):
                    self.dialled.append(node)
                case WakeAt(at):
                    self.wake_at = at
                case Log():
                    pass
                case _:
                    raise AssertionError(f"unexpected effect {effect}")

    def check_intent(self, node: str, message: ManagerMessage) -> None:
        """Nothing is started, and no ingest asked for, whose row is not durable."""
        with self.engine.begin() as connection:
            if isinstance(message, StartInstance):
                query = "SELECT epoch, state, node FROM instances WHERE id = ?"
                row = connection.exec_driver_sql(query, (message.instance,)).one()
                assert tuple(row) == (message.epoch, "starting", node)
            elif isinstance(message, Ingest):
                row = connection.exec_driver_sql("SELECT state, node FROM models WHERE op = ?", (message.op,)).one()
                assert tuple(row) == ("ingesting", node)

    def deliver(self, node: str, message: ManagerMessage) -> None:
        agent = self.agents[node]
        if agent.connected:
            for answer in agent.hear(message):
                self.say(FromNode(node, answer))

    def check_rows(self) -> None:
        """What is durable is what the view says, and the indexes are what a recount says."""
        with self.engine.begin() as connection:
            stored = read_view(connection)
        for id_, instance in self.view.instances.items():
            row = stored.instances[id_]
            assert (row.state, row.epoch, row.restarts) == (instance.state, instance.epoch, instance.restarts)
        assert stored.instances.keys() == self.view.instances.keys()
        assert {name: model.state for name, model in stored.models.items()} == {
            name: model.state for name, model in self.view.models.items()
        }
        assert stored.placements.keys() == self.view.placements.keys()
        committed = {key: value for key, value in self.view.committed_bytes.items() if value}
        held = {key: value for key, value in self.view.arena_held_bytes.items() if value}
        for node in list(self.view.nodes):
            self.view._recount(node)
        assert committed == {key: value for key, value in self.view.committed_bytes.items() if value}
        assert held == {key: value for key, value in self.view.arena_held_bytes.items() if value}

    def puts(self, instance: str) -> list[InstanceState]:
        """The states of an instance as they were committed."""
        rows = [one for _, _, step in self.history for one in step.changes if isinstance(one, PutInstance)]
        return [row.truth.state for row in rows if row.truth.instance == instance]
