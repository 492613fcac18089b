"""The control loop's core: one event and a time in, rows and effects out. Synchronous, deterministic, never waiting."""

from __future__ import annotations

from schema.errors import Fault, SllmError
from schema.ids import EpochCounter, IdSource
from schema.link import InstanceUpdate, InventoryUpdate, NodeEvent, NodeTruth, OperationDone, PlacementUpdate
from schema.states import InstanceState, ModelState, NodeState
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.control import (
    applying,
    demand,
    drops,
    instances,
    learning,
    models,
    nodes,
    operations,
    pins,
    placing,
    prefetch,
    remotes,
    residency,
    scaling,
)
from sllmctl.control.decisions import Decisions
from sllmctl.control.effects import Connect, Log, Reply, Step
from sllmctl.control.events import (
    AddModel,
    AddNode,
    ApplyModels,
    Close,
    DemandChanged,
    DeployModel,
    EndOperation,
    Event,
    Forget,
    FromNode,
    InstanceActivity,
    NodeLost,
    Operate,
    Pin,
    PrefillTimed,
    RemoveModel,
    StopInstanceNow,
    StopModel,
    Tick,
)
from sllmctl.control.turn import Core, Turn
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Journals, NoJournals, Planner

__all__ = ["ControlLoop"]


class ControlLoop:
    """The owner of cluster state. ``view`` is its own: others read it between steps and change nothing.

    ``planner`` decides, over the same view and ``estimates``, which the loop keeps up to date. ``decisions`` are its latest.
    """

    def __init__(
        self,
        view: ClusterView,
        *,
        ids: IdSource,
        epochs: EpochCounter,
        settings: ControlSettings,
        estimates: Estimates,
        planner: Planner,
        journals: Journals | None = None,
    ) -> None:
        self.view = view
        self.settings = settings
        self.decisions = Decisions(settings.decisions_keep)
        self._core = Core(view, ids, epochs, settings, estimates, planner, journals or NoJournals(), self.decisions)

    def begin(self, now: float) -> Step:
        """The first step of a manager's life, after its state was loaded: nothing is connected, and the router knows nothing.

        Nodes count as unreachable until they state their truth; the grace, also for their instances, begins now.
        The clock may have been set back since the times of the rows were noted: none of them may lie so far ahead.
        """
        turn = Turn(self._core, now)
        for node in self.view.nodes.values():
            if node.state is NodeState.REMOVED:
                continue
            if node.state is NodeState.READY:
                nodes.move(turn, node, NodeState.UNREACHABLE)
            if node.state is NodeState.UNREACHABLE:
                node.unreachable_since = now
                turn.wake("node", node.id, now + self.settings.unreachable_grace_s)
        for model in list(self.view.models.values()):
            models.let_go(turn, model)
            models.say(turn, model)
            if model.state is ModelState.DEPLOYED:
                self.view.set_refusal(model, "no node has connected since the manager started")
            elif model.state is ModelState.INGESTING:
                model.changed_at = min(model.changed_at, now)
                turn.wake("model", model.name, model.changed_at + self.settings.ingest_timeout_s)
            else:
                turn.rescale[model.name] = None
        for instance in self.view.instances.values():
            instance.life_at = now
            if instance.state is InstanceState.FAILED:
                instance.retry_at = now  # another manager, perhaps of another version, sees for itself
                turn.wake("instance", instance.id, now)
            elif instance.retry_at is not None:
                instance.retry_at = min(instance.retry_at, now + self.settings.restart_longest_s)
            instances.route(turn, instance)
        for record in self.view.placements.values():
            record.used_at = min(record.used_at, now)
        if self.settings.prefetch_every_s:
            turn.wake("prefetch", "", now + self.settings.prefetch_every_s)
        for node in self.view.nodes.values():
            if node.state is not NodeState.REMOVED:
                turn.do(Connect(node.id, node.address))
        return self._finish(turn)

    def step(self, event: Event, now: float) -> Step:
        """Take one event in. Epochs, ids and times are the only things that two equal histories may be told apart by."""
        turn = Turn(self._core, now)
        match event:
            case FromNode():
                self._from_node(turn, event)
            case DemandChanged():
                self._demand(turn, event)
            case InstanceActivity():
                self._activity(turn, event)
            case NodeLost():
                nodes.lost(turn, event)
            case AddNode():
                nodes.add(turn, event)
            case PrefillTimed():
                learning.prefilled(turn, event)
            case Close():
                self._core.closing = True
            case Tick():
                self._tick(turn)
            case _:
                self._command(turn, event)
        return self._finish(turn)

    def _finish(self, turn: Turn) -> Step:
        """Settle what the event has stirred up: scale the models it touched, then those that wait for the room it freed."""
        aged_asked = False
        while turn.settle or turn.involved or turn.rescale or turn.freed:
            for node in _taken(turn.settle):
                placing.settle(turn, node)
            for instance in _taken(turn.involved):
                placing.follow(turn, instance)
            if turn.freed and not aged_asked:
                aged_asked = True
                scaling.place_aged(turn)
            for name in _taken(turn.rescale):
                model = self.view.models.get(name)
                if model is not None:
                    scaling.scale(turn, model)
                    models.finish_removal(turn, model)
            if turn.freed and not (turn.settle or turn.involved or turn.rescale):
                turn.freed = False
                scaling.place_refused(turn)
        return turn.finish()

    def _command(
        self,
        turn: Turn,
        event: AddModel
        | ApplyModels
        | DeployModel
        | StopModel
        | RemoveModel
        | StopInstanceNow
        | Operate
        | EndOperation
        | Pin
        | Forget,
    ) -> None:
        """What an operator asks for is checked before anything is changed, and answered with what became of it."""
        fault: Fault | None = None
        result: object = None
        try:
            match event:
                case AddModel():
                    models.add(turn, event)
                case ApplyModels():
                    result = applying.apply(turn, event)
                case DeployModel():
                    models.deploy(turn, event)
                case StopModel():
                    models.stop(turn, event)
                case RemoveModel():
                    models.remove(turn, event)
                case StopInstanceNow():
                    instances.stop_now(turn, event)
                case Operate():
                    operations.begin(turn, event)
                case EndOperation():
                    operations.cancel(turn, event)
                case Pin():
                    pins.change(turn, event)
                case Forget():
                    remotes.forget(turn, event)
        except SllmError as error:
            fault = Fault.of(error)
        turn.do(Reply(event.ticket, fault, result))

    def _from_node(self, turn: Turn, event: FromNode) -> None:
        node = self.view.nodes.get(event.node)
        if node is None or node.state is NodeState.REMOVED:
            turn.do(Log("warning", f"a message of node {event.node}, which is not known, was dropped"))
            return
        message = event.message
        if not isinstance(message, NodeTruth) and node.state is not NodeState.READY:
            turn.do(Log("debug", f"a message of node {node.name} from before its truth was dropped"))
            return
        match message:
            case NodeTruth():
                nodes.take_truth(turn, node, message)
            case InventoryUpdate(inventory=inventory):
                nodes.take_inventory(turn, node, inventory)
            case InstanceUpdate(truth=truth):
                instance = self.view.instances.get(truth.instance)
                if instance is not None and instance.node == node.id:
                    instances.adopt(turn, instance, truth, whole=False)
                elif truth.state is not InstanceState.STOPPED:
                    instances.stop_stranger(turn, node.id, truth)
            case PlacementUpdate(truth=checkpoint):
                nodes.take_checkpoint(turn, node, checkpoint)
            case OperationDone():
                models.operation_done(turn, node.id, message)
            case NodeEvent():
                residency.tell(turn, node, message)

    def _demand(self, turn: Turn, event: DemandChanged) -> None:
        model = self.view.models.get(event.model)
        if model is None:
            return
        model.waiting, model.running = event.waiting, event.running
        if not event.waiting:
            self.view.set_waiting_since(model, None)
        elif model.waiting_since is None:
            self.view.set_waiting_since(model, turn.now)
            if not self.view.instances_of(model.name):
                demand.called(model, turn.now, self.settings.heat_s)
        turn.rescale[model.name] = None

    def _activity(self, turn: Turn, event: InstanceActivity) -> None:
        instance = self.view.instances.get(event.instance)
        if instance is None:
            return
        resting = not event.running and instance.state is InstanceState.READY
        before = instance.running
        self.view.set_activity(instance, event.running, turn.now if resting else None)
        if event.running and not before:
            instance.served = True
            demand.called(self.view.models[instance.model], turn.now, self.settings.heat_s)
        if resting:
            turn.rescale[instance.model] = None
            if turn.core.takes_part(instance.id):
                turn.involved[instance.id] = None

    def _tick(self, turn: Turn) -> None:
        self._core.woken_at = None
        for kind, name in self._core.timers.pop(turn.now):
            match kind:
                case "instance":
                    if (instance := self.view.instances.get(name)) is not None:
                        instances.check(turn, instance)
                case "model":
                    if (model := self.view.models.get(name)) is not None:
                        models.check(turn, model)
                        turn.rescale[name] = None
                case "node":
                    if (node := self.view.nodes.get(name)) is not None:
                        nodes.check(turn, node)
                case "refused":
                    scaling.look_around(turn)
                case "prefetch":
                    prefetch.look(turn)
                case "settle":
                    turn.settle[name] = None
                case _:
                    drops.retry(turn, name)


def _taken(marks: dict[str, None]) -> list[str]:
    names = list(marks)
    marks.clear()
    return names
