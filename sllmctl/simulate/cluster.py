"""A simulated cluster: the production control loop, planner, estimates and router over simulated nodes, fed with arrivals."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random

from schema.admin import EventView
from schema.errors import InvalidInput, SllmError
from schema.ids import EpochCounter
from schema.link import (
    InstanceUpdate,
    ManagerMessage,
    OperationDone,
    PlacementUpdate,
    SamplingParams,
    Submit,
    Tokens,
    TruthEnd,
)
from schema.states import Tier
from sllmctl.cluster.changes import RowChange
from sllmctl.cluster.view import ClusterView
from sllmctl.control.effects import Connect, Effect, Migrate, ModelChanged, RejectWaiting, RouteChanged, Send
from sllmctl.control.events import Event, FromNode
from sllmctl.control.loop import ControlLoop
from sllmctl.gateway.journal import Sequence as Journal
from sllmctl.gateway.router import Router
from sllmctl.gateway.router_settings import RouterSettings
from sllmctl.planner.estimates import Estimates
from sllmctl.simulate.build import fill_view, models_of, place, settings_of
from sllmctl.simulate.kernel import Kernel, LoopRunner
from sllmctl.simulate.migration import Migration
from sllmctl.simulate.node import Life, SimNode, zeros
from sllmctl.simulate.policies import Policy
from sllmctl.simulate.record import Record
from sllmctl.simulate.scenario import Arrival, Scenario

__all__ = ["simulate"]

_PROGRESS_EVERY = 1000
_COLLECT_EVERY = 50_000
_NEVER = float("nan")


def simulate(
    scenario: Scenario, policy: Policy, arrivals: Iterable[Arrival], *, progress: Callable[[int], None] | None = None
) -> Record:
    """Run a scenario under a policy until every request has ended. ``progress`` is called now and then with how many have.

    The same scenario, policy and arrivals give the same record but for ``wall_s``. Raises InvalidInput for a setting of the
    control loop that does not exist and for an arrival of an unknown model.
    """
    began = time.perf_counter()
    cluster = _Cluster(scenario, policy, iter(arrivals), progress)
    # What is there by now stays, and need not be looked at each time that ended requests are collected; unless whoever calls
    # has seen to that, whose frozen objects would be let go with ours.
    thresholds = gc.get_threshold()
    freezes = not gc.get_freeze_count()
    if freezes:
        gc.collect()
        gc.freeze()
    gc.set_threshold(_COLLECT_EVERY, *thresholds[1:])
    try:
        cluster.run()
    finally:
        gc.set_threshold(*thresholds)
        if freezes:
            gc.unfreeze()
    cluster.record.wall_s = time.perf_counter() - began
    return cluster.record


class _Request:
    """A request under way: its place in the record, and since when it stands still because it was preempted or moved."""

    __slots__ = ("arrived_at", "index", "lost_at", "output")

    def __init__(self, index: int, arrived_at: float, output: int) -> None:
        self.index = index
        self.arrived_at = arrived_at
        self.output = output
        self.lost_at = -1.0


class _FreshJournals:
    """The router's journals; what an engine has made and not said yet is said before it is asked for."""

    def __init__(self, cluster: _Cluster) -> None:
        self._cluster = cluster

    def tokens(self, instance: str) -> Sequence[int]:
        self._cluster.say_tokens(instance)
        return self._cluster.router.journals.tokens(instance)

    def remaining_s(self, instance: str) -> float:
        self._cluster.say_tokens(instance)
        return self._cluster.router.journals.remaining_s(instance)

    def resumed(self, instance: str) -> int:
        return self._cluster.router.journals.resumed(instance)

    def wait_s(self, model: str) -> float | None:
        return self._cluster.router.journals.wait_s(model)


class _Cluster:
    """Everything that is simulated, wired together. Implements `NodeOwner`."""

    def __init__(
        self, scenario: Scenario, policy: Policy, arrivals: Iterator[Arrival], progress: Callable[[int], None] | None
    ) -> None:
        self.scenario = scenario
        self.kernel = Kernel()
        self.record = Record(scenario.name, policy.name, scenario.seed)
        self.view = ClusterView()
        self._arrivals = arrivals
        self._progress = progress
        self._requests: dict[str, _Request] = {}
        self._params: dict[int, SamplingParams] = {}
        self._name = ""
        self._ended = self._ids = 0
        self._more = True
        settings = settings_of(scenario, policy)
        epochs = EpochCounter(1)
        self.models = models_of(scenario)
        by_digest = {model.digest: model for model in self.models.values()}
        self.nodes = {
            name: SimNode(self.kernel, name, group, by_digest, self)
            for group in scenario.nodes
            for name in (f"{group.name}-{number:04d}" for number in range(group.count))
        }
        place(scenario, self.models, {name: node.store for name, node in self.nodes.items()})
        fill_view(self.view, scenario, policy, self.models, self.nodes)
        self.router = Router(
            send=self._send,
            post=self._post,
            epochs=epochs,
            ids=self._make_id,
            settings=RouterSettings(max_journal_tokens=1 << 62, remembered_requests=1),
            clock=self.kernel.clock,
            call_later=self.kernel.call_later,
        )
        estimates = Estimates(settings)
        journals = _FreshJournals(self)
        draws = Random(f"{scenario.seed} {policy.name}")  # noqa: S311 - to be drawn again, not to be secret
        planner = policy.make(self.view, estimates, journals, settings, policy.abilities, draws)
        loop = ControlLoop(
            self.view,
            ids=self._make_id,
            epochs=epochs,
            settings=settings,
            estimates=estimates,
            planner=planner,
            journals=journals,
        )
        self.runner = LoopRunner(loop, self.kernel, self._perform, self._rows)

    # --- running ---

    def run(self) -> None:
        kernel = self.kernel
        self._next_arrival()
        self.runner.begin()
        kernel.run(lambda: not self._more and not self._requests)
        if self._more or self._requests:
            raise SllmError(f"the simulation stands still at {kernel.now} s with {len(self._requests)} requests under way")
        record = self.record
        record.simulated_s = kernel.now
        record.events = kernel.events
        for node in self.nodes.values():
            for device in node.store.devices:
                device.settle()
                device.compute.settle()
                record.device_held_s += device.held_s
                record.device_busy_s += device.compute.busy_s
        if self._progress is not None:
            self._progress(self._ended)

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._more = False
        else:
            self.kernel.at(arrival.at, lambda: self._arrive(arrival))

    def _arrive(self, arrival: Arrival) -> None:
        self._next_arrival()
        model = self.models.get(arrival.model)
        if model is None:
            raise InvalidInput(
                f"a request at {arrival.at:g} s is for model {arrival.model!r}, which the scenario does not have"
            )
        record, now = self.record, self.kernel.now
        index = len(record.arrived_at)
        record.arrived_at.append(now)
        record.model.append(model.index)
        for times in (record.startup_s, record.first_token_s, record.ended_s):
            times.append(_NEVER)
        record.failed.append(0)
        record.cold.append(0)
        # A client that names no length gets what is left of the context, as the gateway has it.
        most = max(self.router.model(arrival.model).max_context_tokens - arrival.prompt_tokens, 1)
        params = self._params.get(most)
        if params is None:
            params = self._params[most] = SamplingParams(max_tokens=most)
        self._name = name = f"req_{index}"
        self._requests[name] = _Request(index, now, max(arrival.output_tokens, 1))
        try:
            request = self.router.submit(arrival.model, zeros(arrival.prompt_tokens), params)
        except SllmError as error:
            self._end(name, error)
            return
        journal = request.sequences[0]
        if journal.done:
            self._end(name, journal.failure)
        else:
            journal.on_end = self._journal_ended

    def _journal_ended(self, journal: Journal) -> None:
        self._end(journal.request.id, journal.failure)

    def _end(self, name: str, failure: SllmError | None) -> None:
        """A request has ended, once and for all."""
        request = self._requests.pop(name)
        record = self.record
        if failure is None:
            record.ended_s[request.index] = self.kernel.now - request.arrived_at
        else:
            record.failed[request.index] = 1
            record.faults[failure.code] += 1
        self._ended += 1
        if self._progress is not None and self._ended % _PROGRESS_EVERY == 0:
            self._progress(self._ended)

    def _make_id(self, kind: str) -> str:
        if kind == "req":
            return self._name
        self._ids += 1
        return f"{kind}_{self._ids:012d}"

    # --- between loop, router and nodes ---

    def _send(self, node: str, message: ManagerMessage) -> None:
        self.nodes[node].hear(message)

    def _post(self, event: Event) -> None:
        self.runner.post(event)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(node, message):
                self.nodes[node].hear(message)
            case RouteChanged():
                self.router.route_changed(effect)
            case ModelChanged():
                self.router.model_changed(effect)
            case RejectWaiting():
                self.router.reject_waiting(effect)
            case Migrate(source, target):
                self._migrate(source, target)
            case Connect(node):
                self.kernel.soon(lambda: self._connect(node))
            case _:
                return

    def _rows(self, changes: Sequence[RowChange]) -> None:
        """Rows go nowhere; what an event says of evictions is counted."""
        for change in changes:
            if type(change) is EventView and change.reason == "Evicted":
                self.record.evictions += 1

    def _connect(self, name: str) -> None:
        """A node's link comes up, as sllmctl.nodes has it: the loop hears of the truth before the router acts on it."""
        truth = self.nodes[name].truth()
        self.router.truth_began(name, truth)
        self.runner.post(FromNode(name, truth))
        self.router.truth_ended(name, TruthEnd(attempts=0))

    def _migrate(self, source: str, target: str) -> None:
        lives = [self._life(source), self._life(target)]
        if lives[0] is not None and lives[1] is not None:
            Migration(lives[0], lives[1], self._migrated).begin()

    def _migrated(self) -> None:
        self.record.migrations += 1

    def _life(self, instance: str) -> Life | None:
        known = self.view.instances.get(instance)
        return None if known is None else self.nodes[known.node].lives.get(instance)

    def say_tokens(self, instance: str) -> None:
        life = self._life(instance)
        if life is not None and life.engine is not None:
            jobs = life.engine.advance()
            life.node.deliver(jobs, [None] * len(jobs))

    # --- as the owner of nodes ---

    def said(self, node: str, message: InstanceUpdate | PlacementUpdate | OperationDone) -> None:
        if type(message) is InstanceUpdate and message.truth.phases is not None:
            self.router.instance_started(message.truth.instance, message.truth.epoch, message.truth.phases)
        self.runner.post(FromNode(node, message))

    def delivered(self, node: str, tokens: Tokens) -> None:
        self.router.tokens(node, tokens)
        if tokens.ends:
            self.router.batch_ended(node)

    def started(self, life: Life, tier: Tier, peer: bool) -> None:
        self.record.starts += 1
        self.record.loads["peer" if peer else tier.value] += 1

    def taken(self, life: Life, submit: Submit) -> int:
        request = self._requests.get(submit.request)
        if request is None:
            return 1
        record, index = self.record, request.index
        if record.startup_s[index] != record.startup_s[index]:
            record.startup_s[index] = self.kernel.now - request.arrived_at
            record.cold[index] = life.ready_at > request.arrived_at
        return request.output

    def first_token(self, request: str) -> None:
        known = self._requests.get(request)
        if known is None:
            return
        record, index, now = self.record, known.index, self.kernel.now
        if record.first_token_s[index] != record.first_token_s[index]:
            record.first_token_s[index] = now - known.arrived_at
        if known.lost_at >= 0:
            record.startup_s[index] += now - known.lost_at
            known.lost_at = -1.0

    def lost(self, life: Life, requests: list[str], *, preempted: bool) -> None:
        if preempted:
            self.record.preemptions += len(requests)
        for name in requests:
            request = self._requests.get(name)
            if request is not None and request.lost_at < 0:
                request.lost_at = self.kernel.now

    def dropped(self, digest: str) -> None:
        self.record.evictions += 1

    def source(self, instance: str) -> tuple[Tier, str] | None:
        known = self.view.instances.get(instance)
        plan = None if known is None else known.plan
        return None if plan is None else (plan.best.source, plan.best.peer)

    def peer(self, node: str) -> SimNode:
        return self.nodes[node]
