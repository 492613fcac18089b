"""A cluster in one process: the real loop over a real schema, with agents and a router that are models of the real ones.

Time stands still until `World.pass_time`. Words between loop and agents are queued; `World.settle` delivers them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sqlalchemy import create_engine, event
from sqlalchemy.pool import StaticPool

from schema.admin import EventView
from schema.errors import Fault
from schema.ids import EpochCounter, IdSource, make_id
from schema.link import (
    Ingest,
    InstanceUpdate,
    ManagerMessage,
    OperationDone,
    PlacementUpdate,
    StartInstance,
)
from schema.spec import EngineSpec, ModelSpec, PathSource, ScaleSpec
from schema.states import InstanceState
from schema.tables import Base
from sllmctl.cluster.changes import PutInstance
from sllmctl.cluster.records import Instance
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.control.effects import (
    CheckpointKnown,
    Connect,
    Log,
    Migrate,
    ModelChanged,
    RejectWaiting,
    Reply,
    RouteChanged,
    Send,
    Step,
    WakeAt,
)
from sllmctl.control.events import (
    AddModel,
    AddNode,
    DemandChanged,
    DeployModel,
    Event,
    FromNode,
    InstanceActivity,
    NodeLost,
    Tick,
)
from sllmctl.control.loop import ControlLoop
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Abilities, Journals, NoJournals, Planner
from sllmctl.planner.planner import LocalityPlanner
from sllmctl.state.rows import apply, read_view
from tests.sllmctl.control.agents import MIB, Agent, digest_of
from tests.sllmctl.control.recount import check_indexes

__all__ = ["MIB", "Agent", "World", "control_loop", "digest_of", "spec"]

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
    planner: Planner | None = None,
) -> ControlLoop:
    """A loop with the production planner, or another, over estimates of its own."""
    estimates = Estimates(settings)
    journals = journals or NoJournals()
    planner = planner or LocalityPlanner(view, estimates, journals, settings, abilities or Abilities())
    return ControlLoop(view, ids=ids, epochs=epochs, settings=settings, estimates=estimates, planner=planner, journals=journals)


def spec(
    name: str = "m",
    *,
    least: int = 0,
    most: int = 1,
    keep_alive_s: float | None = 100.0,
    kv_mib: int = 10,
    node: str = "",
    devices: int = 1,
) -> ModelSpec:
    return ModelSpec(
        name=name,
        source=PathSource(f"/models/{name}", node),
        scale=ScaleSpec(min=least, max=most, keep_alive_s=keep_alive_s, max_concurrency=4),
        engine=EngineSpec(kv_bytes=kv_mib * MIB),
        devices=devices,
    )


class World:
    """The loop, its durable rows, its agents, and what a router would know. Every effect is checked against the rows."""

    def __init__(
        self,
        *agents: Agent,
        settings: ControlSettings | None = None,
        abilities: Abilities | None = None,
        journals: Journals | None = None,
        planner: Planner | None = None,
    ) -> None:
        self.abilities = abilities or Abilities()
        self.planner = planner
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
        self.told: object = None
        self.known: list[CheckpointKnown] = []
        self.migrated: list[Migrate] = []
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
            planner=self.planner,
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
        for _ in range(10_000 + int(seconds)):
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

    def served(self, model: str, running: int = 0) -> Instance:
        """A request for a model has come and found its one instance, on which so many run now."""
        self.demand(model, 1)
        instance = self.only(model)
        self.busy(instance, 1)
        self.demand(model, 0, running)
        self.busy(instance, running)
        return instance

    def only(self, model: str = "m") -> Instance:
        (instance,) = self.view.instances_of(model).values()
        return instance

    def crash(self, instance: Instance, fault: Fault | None = None, remote: str = "") -> None:
        fault = fault or Fault("internal", "the worker was killed")
        agent = self.agents[instance.node]
        self.tell(instance.node, agent.become(instance.id, _I.STOPPED, fault, remote))

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
                case Reply(ticket, fault, result):
                    self.replies[ticket], self.told = fault, result
                case Migrate():
                    assert self.abilities.migrate, "not asked for where it cannot be done"
                    self.migrated.append(effect)
                    self.queue.append(lambda effect=effect: self.migrate(effect))  # type: ignore[misc]
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

    def migrate(self, effect: Migrate) -> None:
        """The router moves what runs on the source; the source, which takes nothing new any more, ends."""
        source, target = (self.view.instances.get(one) for one in (effect.source, effect.target))
        if source is None or target is None or target.state is not _I.READY:
            return
        assert source.model == target.model
        if source.running:
            self.say(InstanceActivity(target.id, target.running + source.running))
            self.say(InstanceActivity(source.id, 0))
        self.queue.append(lambda: self.end_drained(effect.source))

    def end_drained(self, instance: str) -> None:
        source = self.view.instances.get(instance)
        life = self.agents[source.node].lives.get(instance) if source is not None else None
        if source is not None and life is not None and life.state is _I.DRAINING:
            self.tell(source.node, self.agents[source.node].become(instance, _I.STOPPED))

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
        for key, record in self.view.placements.items():
            assert (stored.placements[key].state, stored.placements[key].size_bytes) == (record.state, record.size_bytes)
        check_indexes(self.view)

    def puts(self, instance: str) -> list[InstanceState]:
        """The states of an instance as they were committed."""
        rows = [one for _, _, step in self.history for one in step.changes if isinstance(one, PutInstance)]
        return [row.truth.state for row in rows if row.truth.instance == instance]
