"""The router: owns journals and routes, puts every sequence on an instance, and takes in what nodes say of it.

Synchronous and driven by calls, all on the event loop's thread. Each public call leaves it settled: whoever can run has been
submitted, and the control loop has been told what changed. Warm requests wait on no timer and never pass the control loop.

Recovery is one rule: an attempt that is lost, however that came to be known, puts its journal to the front of its model's
queue, and the next attempt goes on from there. What a lost attempt may still say is told by its epoch, and dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from msgspec import structs

from schema.admin import ProgressView, RequestView
from schema.errors import (
    Conflict,
    ContextOverflow,
    Fault,
    InvalidCheckpoint,
    InvalidInput,
    NotFound,
    Overloaded,
    SllmError,
    Unreachable,
    Unschedulable,
)
from schema.ids import Epoch, EpochCounter, IdSource, generation_of, made_at
from schema.link import (
    AttemptTruth,
    Cancel,
    EngineCounts,
    InstanceLoad,
    ManagerMessage,
    NodeTruth,
    Progress,
    RetryKey,
    SamplingParams,
    StartPhases,
    Tokens,
    TruthEnd,
)
from sllmctl.control.effects import ModelChanged, RejectWaiting, RouteChanged
from sllmctl.control.events import Event
from sllmctl.gateway import story
from sllmctl.gateway.dispatcher import Dispatcher
from sllmctl.gateway.engines import EngineTotals
from sllmctl.gateway.errors import KeyReused
from sllmctl.gateway.journal import Attempt, Request, Sequence
from sllmctl.gateway.journals import LiveJournals
from sllmctl.gateway.progress import ProgressBoard
from sllmctl.gateway.queues import CallLater, ModelQueue, RoutedModel
from sllmctl.gateway.reconcile import NodeLink
from sllmctl.gateway.router_settings import RouterSettings
from sllmctl.gateway.routes import GONE

__all__ = ["Request", "RoutedModel", "Router", "Sequence"]


class Router:
    """``send`` says something to a node, ``post`` tells the control loop; neither may call back before it returns.
    ``journals`` is what the planner may ask, ``engines`` what the engines have done so far."""

    def __init__(
        self,
        *,
        send: Callable[[str, ManagerMessage], None],
        post: Callable[[Event], None],
        epochs: EpochCounter,
        ids: IdSource,
        settings: RouterSettings,
        clock: Callable[[], float] = time.time,
        call_later: CallLater | None = None,
    ) -> None:
        self._core = Dispatcher(
            send=send,
            post=post,
            epochs=epochs,
            settings=settings,
            clock=clock,
            call_later=call_later or (lambda delay_s, call: asyncio.get_running_loop().call_later(delay_s, call)),
        )
        self._generation = epochs.generation
        self._ids = ids
        self._settings = settings
        self._progress = ProgressBoard(settings.remembered_progress)
        self.journals = LiveJournals(self._core)
        self.engines = EngineTotals()

    # --- from the control loop's effects

    def route_changed(self, effect: RouteChanged) -> None:
        """An instance came, changed or went. Attempts of lives that are over go on elsewhere."""
        route = self._core.routes.change(effect)
        if route is None:
            return
        for attempt in route.attempts.values():
            if attempt.sequence.request.instance == effect.instance:
                attempt.sequence.request.node = effect.node_name  # of one that was found on the node before this was known
        newest_lost = effect.epoch if effect.state in GONE else effect.epoch - 1
        doomed = [attempt for attempt in route.attempts.values() if attempt.instance_epoch <= newest_lost]
        for attempt in doomed:
            self._core.lose(attempt, Fault("unreachable", f"instance {effect.instance} went away ({effect.state})"))
        self._core.touch_route(route)
        self._core.touch_model(effect.model)
        self._core.settle()

    def model_changed(self, effect: ModelChanged) -> None:
        """A model was deployed, changed, stopped or removed; one that takes no requests fails those that wait."""
        queue = self._core.queue(effect.model)
        if effect.spec is None:
            queue.model = None
        else:
            queue.model = RoutedModel(effect.model, effect.spec, effect.state, effect.digest, effect.max_context_tokens)
        refusal = queue.refusal()
        if refusal is not None:
            self._core.fail_waiting(queue, refusal)
        self._core.touch_model(effect.model)
        self._core.settle()

    def reject_waiting(self, effect: RejectWaiting) -> None:
        """Nothing can come for this model: whoever waits for it is told why."""
        error = effect.fault.to_error()
        if isinstance(error, Unschedulable):
            error.retry_after_s = effect.retry_after_s
        self._core.fail_waiting(self._core.queue(effect.model), error)
        self._core.touch_model(effect.model)
        self._core.settle()

    def start_nothing(self, why: SllmError) -> None:
        """The control loop has ended: who has an instance goes on, who waits or comes and has none is told why."""
        self._core.ending = Unreachable(f"the manager is ending, and starts nothing any more: {why.message}")
        for model in list(self._core.queues):
            self._core.touch_model(model)
        self._core.settle()

    # --- from links

    def truth_began(self, node: str, truth: NodeTruth) -> None:
        """A new connection to a node states what it holds."""
        self._core.node(node).begin()
        self._core.routes.node_down(node)
        for instance in truth.instances:
            if instance.phases is not None:
                self.instance_started(instance.instance, instance.epoch, instance.phases)

    def attempt_truth(self, node: str, truth: AttemptTruth) -> None:
        """One attempt as the node holds it. Raises LinkError for one that does not fit its journal."""
        link = self._core.node(node)
        epoch = truth.submit.attempt
        attempt = self._core.attempts.get(epoch)
        if attempt is None or attempt.node != node:
            if not self._core.retries.holds(epoch):
                link.unknown(truth, self._generation)
            return
        link.seen.add(epoch)
        if attempt.wanted:
            self._core.append(attempt.sequence, truth.run)
        if truth.end is not None:
            self._core.end(node, truth.end)

    def truth_ended(self, node: str, end: TruthEnd) -> None:
        """The truth is complete: what is not in it is lost, what is not known is cancelled, or adopted at first sight."""
        link = self._core.node(node)
        for attempt in [attempt for attempt in self._core.attempts.values() if attempt.node == node]:
            if attempt.epoch not in link.seen and attempt.link < link.count:
                self._core.lose(attempt, Fault("unreachable", f"node {node} does not have the sequence any more"))
        self._core.routes.node_up(node)
        for truths in link.complete().values():
            self._adopt(node, link, truths)
        cancels = [Cancel(attempt=epoch) for epoch in link.take_cancels()]
        mine = [attempt for attempt in self._core.attempts.values() if attempt.node == node]
        cancels += [attempt.cancel for attempt in mine if attempt.cancel is not None]
        for cancel in cancels:
            self._core.send(node, cancel)
        self._core.flush(node, link)
        for route in self._core.routes.all():
            if route.change is not None and route.change.node == node:
                self._core.touch_model(route.change.model)
        self._core.settle()

    def tokens(self, node: str, tokens: Tokens) -> None:
        """New tokens and ends. Raises LinkError for a gap: the link is closed, and the next truth repairs it."""
        link = self._core.node(node)
        attempts = self._core.attempts
        try:
            for run in tokens.runs:
                attempt = attempts.get(run.attempt)
                if attempt is not None and attempt.wanted and attempt.node == node:
                    self._core.append(attempt.sequence, run)
            for end in tokens.ends:
                self._core.end(node, end)
            link.frame = tokens.frame
        finally:
            if tokens.ends:
                self._core.settle()

    def batch_ended(self, node: str) -> None:
        """All that came in one read was handed over: acknowledge what is due."""
        link = self._core.node(node)
        if link.due:
            self._core.flush(node, link)

    def instance_load_changed(self, node: str, load: InstanceLoad) -> None:
        """The engine's own account of how busy it is; of an older life it is dropped."""
        route = self._core.routes.get(load.instance)
        if route is None or (route.load is not None and route.load.epoch > load.epoch):
            return
        if load.counts is not None and route.change is not None:
            before = route.load.counts if route.load is not None and route.load.epoch == load.epoch else None
            if before is None:  # what it did for an earlier manager is not counted again
                before = load.counts if generation_of(load.epoch) < self._generation else EngineCounts()
            self.engines.add(route.change.model, load.counts, before)
        route.load = load

    def progressed(self, node: str, progress: Progress) -> None:
        """How far an operation or a start has come."""
        self._progress.take(progress, self._core.clock(), node)

    def instance_started(self, instance: str, epoch: Epoch, phases: StartPhases) -> None:
        """An instance is ready and has all its weights; said before the control loop hears of it, so that those who wait get
        its phases. It may have been given requests before."""
        route = self._core.routes.make(instance)
        if epoch >= route.phases_epoch:
            route.phases, route.phases_epoch = phases, epoch
        for attempt in route.attempts.values():
            request = attempt.sequence.request
            if attempt.instance_epoch == epoch and request.cold and request.start is None:
                request.start = phases

    def progress_ended(self, op: str) -> None:
        """An operation is done, or an instance's start over: its progress is not shown any more."""
        self._progress.drop(op)

    def link_lost(self, node: str) -> None:
        """The connection broke. Its sequences may well go on, so they wait: for its next truth, or for the control loop to
        give the instances up."""
        self._core.node(node).lost()
        self._core.routes.node_down(node)
        self._core.settle()

    # --- for the gateway

    def model(self, name: str) -> RoutedModel:
        """Raises NotFound."""
        queue = self._core.queues.get(name)
        if queue is None or queue.model is None:
            raise NotFound(f"there is no model {name!r}")
        return replace(queue.model, max_context_tokens=self._limit(queue))

    def models(self) -> list[RoutedModel]:
        """All models, by name."""
        return [self.model(name) for name, queue in sorted(self._core.queues.items()) if queue.model is not None]

    def submit(
        self,
        model: str,
        prompt: tuple[int, ...],
        params: SamplingParams,
        choices: int = 1,
        tenant: str = "",
        retry: RetryKey | None = None,
        request_id: str = "",
    ) -> Request:
        """Take a request of a ``tenant`` in: its sequences run at once where there is room, and wait in line otherwise.
        Its id is ``request_id``, unless that is "" or another's.

        With ``retry`` its clients may come again, by `join`; the key must not be known.

        Raises NotFound or Conflict for a model that takes none, InvalidInput for an empty prompt, ContextOverflow, and
        Overloaded when the line or the journals' memory is full.
        """
        queue = self._core.queues.get(model)
        refusal = NotFound(f"there is no model {model!r}") if queue is None else queue.refusal()
        if refusal is not None:
            raise refusal
        assert queue is not None
        self._check(queue, prompt, params)
        request = self._request(request_id, model, params, tenant, retry)
        request.readers = 1
        for choice in range(choices):
            request.sequences.append(Sequence(request, choice, prompt))
        self._core.register(request)
        story.accepted(request)
        for sequence in request.sequences:
            queue.put(sequence)
        self._core.touch_model(model)
        self._core.settle()
        if request.waiting:
            story.queued(request, queue.waiting_requests, cold=request.cold)
        return request

    def join(self, retry: RetryKey) -> Request | None:
        """The request of a key, from its beginning, with one more reader; None for a key that is not known.

        Raises KeyReused when something else was asked with the key.
        """
        request = self._core.retries.get(retry)
        if request is None:
            return None
        request.readers += 1
        self._core.read(request, None)
        if request.live:
            request.orphaned = False
            if request.timer is not None:
                request.timer.cancel()
                request.timer = None
            queue = self._core.queue(request.model)
            for sequence in request.sequences:
                # Of choices that no node spoke of after a restart, nothing is known to run.
                if not sequence.done and sequence.attempt is None and sequence not in queue.waiting:
                    queue.put(sequence)
            self._core.touch_model(request.model)
            self._core.settle()
        return request

    # --- for the admin API

    @property
    def live(self) -> int:
        """Requests that have not ended, those without a client too."""
        return len(self._core.requests)

    def requests(self) -> list[RequestView]:
        """Those remembered, then the live ones, in the order in which they ended or came in."""
        return [*self._core.remembered.values(), *(request.view() for request in self._core.requests.values())]

    def request(self, id: str) -> RequestView:  # noqa: A002 - the name that every view of a request has
        """Raises NotFound for one that is not live and not remembered."""
        if (request := self._core.requests.get(id)) is not None:
            return request.view()
        if (view := self._core.remembered.get(id)) is not None:
            return view
        raise NotFound(f"there is no request {id!r}, or it ended too long ago to be remembered")

    def cancel(self, id: str) -> None:  # noqa: A002 - as above
        """End a request. Raises NotFound, and Conflict for one that has ended already."""
        if (request := self._core.requests.get(id)) is None:
            raise Conflict(f"request {id} has ended already: it is {self.request(id).state.value}")
        self._cancel(request)

    def model_counts(self, model: str) -> tuple[int, int]:
        """(waiting, running) requests of a model now."""
        queue = self._core.queues.get(model)
        return (0, 0) if queue is None else (queue.waiting_requests, queue.live - queue.waiting_requests)

    def instance_load(self, instance: str) -> InstanceLoad | None:
        route = self._core.routes.get(instance)
        return None if route is None else route.load

    def instance_running(self, instance: str) -> int:
        """Sequences that count on an instance now, cancelled ones until their end is known."""
        route = self._core.routes.get(instance)
        return 0 if route is None else len(route.attempts)

    def progress(self, op: str) -> ProgressView | None:
        """Of an operation, or of an instance's start by the instance's id."""
        return self._progress.view(op)

    def loads(self, node: str) -> list[tuple[str, ProgressView]]:
        """What moves bytes on a node now, by operation or instance."""
        return self._progress.on(node, self._core.clock())

    def moving(self) -> list[tuple[str, str]]:
        """(operation or instance, node) of all that moves bytes now."""
        return self._progress.moving(self._core.clock())

    # --- taking requests in

    def _check(self, queue: ModelQueue, prompt: tuple[int, ...], params: SamplingParams) -> None:
        assert queue.model is not None
        if not prompt:
            raise InvalidInput("the prompt has no tokens", "prompt")
        asked, limit = len(prompt) + params.max_tokens, self._limit(queue)
        if asked > limit:
            raise ContextOverflow(
                f"model {queue.name!r} takes {limit} tokens, prompt and reply together; this request has {len(prompt)} in its "
                f"prompt and asks for {params.max_tokens} more: shorten one of them"
            )
        if self._core.journal_tokens + len(prompt) > self._settings.max_journal_tokens:
            raise Overloaded(
                f"requests of {self._core.journal_tokens} tokens are being served, as many as fit; try again later",
                queue.retry_after_s(cold=False),
            )
        crowded = queue.waiting_requests >= queue.model.spec.scale.queue_limit
        if crowded and (queue.waiting or self._core.pick(queue, len(prompt), 0, params) is None):
            raise Overloaded(
                f"{queue.waiting_requests} requests wait for model {queue.name!r} already, as many as may; try again later",
                queue.retry_after_s(cold=self._core.is_cold(queue.name)),
            )

    def _limit(self, queue: ModelQueue) -> int:
        """The longest sequence that this model takes now, in tokens."""
        assert queue.model is not None
        engine = queue.model.spec.engine.max_context_tokens or 0
        known = (
            queue.model.max_context_tokens,
            engine,
            self._core.routes.limit(queue.name),
            self._settings.max_sequence_tokens,
        )
        return min(limit for limit in known if limit)

    def _adopt(self, node: str, link: NodeLink, truths: list[AttemptTruth]) -> None:
        """Make a request of what a node holds since before this manager began; without a client it is cancelled in time.

        What cannot be adopted is refused: of a request that another node was first to speak of, unless its client may retry;
        then choices come from several nodes, and a retry that came before them gets what it waits for from them.
        """
        asked = truths[0].submit
        retry = asked.retry
        try:
            request = self._core.requests.get(asked.request) if retry is None else self._core.retries.get(retry)
            fits = request is None or retry is not None
        except KeyReused:
            fits = False
        if not fits:
            for truth in truths:
                link.refuse(truth)
            return
        if request is None:
            request = self._request(asked.request, asked.model, asked.params, asked.tenant, retry)
            # No later than now, whatever this machine's clock was at then.
            request.received_at = min(made_at(asked.request) or request.received_at, request.received_at)
            request.orphaned = True
            choices = [truth.submit.choice for truth in truths] if retry is None else range(retry.choices)
            request.sequences += [Sequence(request, choice, asked.prompt) for choice in choices]
            self._core.register(request)
            request.timer = self._core.call_later(self._settings.orphan_grace_s, request.cancel)
        by_choice = {sequence.choice: sequence for sequence in request.sequences}
        for truth in truths:
            sequence = by_choice.get(truth.submit.choice)
            if sequence is None or not self._fits(truth, sequence):
                link.refuse(truth)
                continue
            request.params = truth.submit.params
            self._core.queue(request.model).take(sequence)
            self._take_over(node, link, sequence, truth)

    def _fits(self, truth: AttemptTruth, sequence: Sequence) -> bool:
        """Whether what a node holds is this sequence's, which has nothing yet."""
        request, submit = sequence.request, truth.submit
        if sequence.done or sequence.tokens or sequence.attempt is not None or sequence.prompt != submit.prompt:
            return False
        untouched = all(not each.done and not each.tokens and each.attempt is None for each in request.sequences)
        # A retry that came first has drawn a seed of its own, if its client gave none.
        seed = submit.params.seed if untouched else request.params.seed
        return structs.replace(request.params, seed=seed) == submit.params

    def _take_over(self, node: str, link: NodeLink, sequence: Sequence, truth: AttemptTruth) -> None:
        """Go on with a sequence as a node has it."""
        submit, core = truth.submit, self._core
        sequence.tokens.extend((*submit.generated, *truth.new_ids))
        sequence.logprobs += submit.logprobs + truth.logprobs
        core.journal_tokens += sequence.size_tokens
        if truth.end is not None:
            if truth.end.timing is not None:
                sequence.request.engine = truth.end.timing
                sequence.cached_tokens = truth.end.timing.cached_tokens
            core.finish(sequence, truth.end.reason)
            if not core.retries.hold(sequence.request, node, submit.attempt):
                link.refuse(truth)
            return
        attempt = Attempt(
            epoch=submit.attempt,
            sequence=sequence,
            node=node,
            instance=submit.instance,
            instance_epoch=submit.instance_epoch,
            link=link.count,
            began_at=core.clock(),
            start=len(submit.generated),
            kv_tokens=len(submit.prompt) + len(sequence.tokens),
            max_tokens=submit.params.max_tokens,
        )
        core.place(attempt, core.routes.make(submit.instance))
        sequence.wake()

    def _request(self, asked_id: str, model: str, params: SamplingParams, tenant: str, retry: RetryKey | None) -> Request:
        """A request of the id that is asked for, unless that is "" or another's."""
        taken = not asked_id or asked_id in self._core.requests or asked_id in self._core.remembered
        return Request(
            self._ids("req") if taken else asked_id,
            model,
            params,
            self._core.clock(),
            self._cancel,
            complete=self._complete,
            leave=self._leave,
            tenant=tenant,
            retry=retry,
        )

    def _leave(self, request: Request, error: SllmError | None) -> None:
        request.readers -= 1
        if isinstance(error, InvalidCheckpoint):  # what one reader cannot decode no other can
            self._core.fail(request, error)
            self._core.settle()
        if request.readers:
            return
        self._core.read(request, error)
        if request.retry is None or not self._settings.retry_grace_s:
            self._give_up(request)
        elif request.live:
            request.timer = self._core.call_later(self._settings.retry_grace_s, partial(self._give_up, request))

    def _give_up(self, request: Request) -> None:
        """Nobody reads it, and no retry may come any more."""
        if request.unread is None:
            self._core.cancel(request)
        else:
            self._core.fail(request, request.unread)
        self._core.settle()

    def _cancel(self, request: Request) -> None:
        self._core.cancel(request)
        self._core.settle()

    def _complete(self, sequence: Sequence) -> None:
        self._core.complete(sequence)
        self._core.settle()
