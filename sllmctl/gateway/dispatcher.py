"""The router's inside: which sequence waits, which runs where, and how each comes to its one end.

Every change leaves notes on what it touched; `settle` then puts whoever can run on an instance and tells the control loop what
changed. Its callers settle once, when all that happened at the same time has been taken in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from schema.admin import RequestView
from schema.errors import Cancelled, ContextOverflow, Fault, LinkError, SllmError, TimedOut
from schema.ids import Epoch, EpochCounter
from schema.link import Cancel, Ended, EngineTiming, ManagerMessage, SamplingParams, Submit, TokenRun
from schema.sampling import LOGPROB_BYTES
from schema.states import EndReason
from sllmctl.control.events import Event, InstanceActivity, PrefillTimed
from sllmctl.gateway import story
from sllmctl.gateway.journal import Attempt, Request, Sequence
from sllmctl.gateway.queues import CallLater, ModelQueue
from sllmctl.gateway.reconcile import REPLIES, NodeLink
from sllmctl.gateway.retries import End, Retries
from sllmctl.gateway.router_settings import RouterSettings
from sllmctl.gateway.routes import Route, Routes

__all__ = ["Dispatcher"]


class Dispatcher:
    """Requests, attempts, routes and queues, consistent with each other at all times."""

    def __init__(
        self,
        *,
        send: Callable[[str, ManagerMessage], None],
        post: Callable[[Event], None],
        epochs: EpochCounter,
        settings: RouterSettings,
        clock: Callable[[], float],
        call_later: CallLater,
    ) -> None:
        self.send = send
        self.call_later = call_later
        self.clock = clock
        self.routes = Routes()
        self.queues: dict[str, ModelQueue] = {}
        self.requests: dict[str, Request] = {}
        self.remembered: OrderedDict[str, RequestView] = OrderedDict()
        self.attempts: dict[Epoch, Attempt] = {}
        self.retries = Retries(settings, call_later, self._release)
        self.journal_tokens = 0
        self.ending: SllmError | None = None
        """Why nothing is started any more."""
        self._nodes: dict[str, NodeLink] = {}
        self._post = post
        self._epochs = epochs
        self._settings = settings
        # Notes for the next settling; dicts, so that the order is that of the calls.
        self._lost: list[tuple[Sequence, Fault]] = []
        self._models: dict[str, None] = {}
        self._routes: dict[Route, None] = {}

    def queue(self, model: str) -> ModelQueue:
        """A model's queue, made when it is not known: a node may run sequences of a model that is gone."""
        queue = self.queues.get(model)
        if queue is None:
            queue = self.queues[model] = ModelQueue(model, self._settings, self._post, self.call_later)
        return queue

    def node(self, node: str) -> NodeLink:
        link = self._nodes.get(node)
        if link is None:
            link = self._nodes[node] = NodeLink()
        return link

    def is_cold(self, model: str) -> bool:
        """True when no instance of it takes sequences."""
        return not self.routes.any_open(model)

    def touch_model(self, model: str) -> None:
        self._models[model] = None

    def touch_route(self, route: Route) -> None:
        self._routes[route] = None

    def register(self, request: Request) -> None:
        """Count a request in, with all its sequences."""
        self.requests[request.id] = request
        request.live = len(request.sequences)
        self.queue(request.model).live += 1
        self.journal_tokens += request.size_tokens
        if request.retry is not None:
            self.retries.add(request)

    def _release(self, ends: list[End]) -> None:
        """Acknowledge ends that were held for retries; a node that is away states them again, and is told then."""
        for node, attempt in ends:
            self.node(node).ends.append(attempt)
        for node in {node for node, _ in ends}:
            if self.routes.is_up(node):
                self.flush(node, self.node(node))

    def flush(self, node: str, link: NodeLink) -> None:
        """Acknowledge what there is to a node."""
        if (acked := link.take_acked()) is not None:
            self.send(node, acked)

    # --- attempts

    def pick(self, queue: ModelQueue, prompt_tokens: int, generated_tokens: int, params: SamplingParams) -> Route | None:
        """The instance that a sequence of this size goes to now, if any."""
        journal, whole = prompt_tokens + generated_tokens, prompt_tokens + params.max_tokens
        return self.routes.pick(queue.name, journal, queue.expected_tokens(params), whole)

    def _start(self, queue: ModelQueue, route: Route, sequence: Sequence) -> None:
        """Submit a sequence's journal to an instance, as a new attempt."""
        change, request = route.change, sequence.request
        assert change is not None
        params = request.params
        if change.max_context_tokens and len(sequence.prompt) + params.max_tokens > change.max_context_tokens:
            # Only for what came in before an instance had said how much it takes, when none takes more.
            params = replace(params, max_tokens=change.max_context_tokens - len(sequence.prompt))
        start = len(sequence.tokens)
        attempt = Attempt(
            epoch=self._epochs.next(),
            sequence=sequence,
            node=change.node,
            instance=route.instance,
            instance_epoch=change.epoch,
            link=self.node(change.node).count,
            began_at=self.clock(),
            start=start,
            kv_tokens=len(sequence.prompt) + start + queue.expected_tokens(params),
            max_tokens=params.max_tokens,
        )
        self.place(attempt, route)
        if request.routed_at is None:
            request.routed_at = attempt.began_at
            if request.cold and route.phases_epoch == change.epoch:
                request.start = route.phases
        story.placed(attempt)
        self.send(
            change.node,
            Submit(
                attempt=attempt.epoch,
                instance=route.instance,
                instance_epoch=change.epoch,
                request=request.id,
                model=request.model,
                tenant=request.tenant,
                choice=sequence.choice,
                prompt=sequence.prompt,
                generated=tuple(sequence.tokens),
                logprobs=bytes(sequence.logprobs),
                params=params,
                retry=request.retry,
            ),
        )

    def place(self, attempt: Attempt, route: Route) -> None:
        """Count an attempt on its instance, as its sequence's own."""
        self.attempts[attempt.epoch] = attempt
        route.add(attempt)
        self.touch_route(route)
        attempt.sequence.attempt = attempt
        attempt.sequence.fruitless += 1
        request = attempt.sequence.request
        request.attempts += 1
        request.instance = route.instance
        request.node = attempt.node if route.change is None else route.change.node_name

    def _close(self, attempt: Attempt) -> None:
        """It counts nowhere any more; whoever waits for its room is looked at."""
        del self.attempts[attempt.epoch]
        if attempt.wanted:
            attempt.sequence.attempt = None
        route = self.routes.make(attempt.instance)
        route.remove(attempt)
        self.touch_route(route)
        self.touch_model(attempt.sequence.request.model)

    def _abandon(self, attempt: Attempt, reason: EndReason) -> None:
        """Its tokens are not wanted any more. It counts until its end is known, since it takes room until then."""
        attempt.cancel = Cancel(attempt=attempt.epoch, reason=reason)
        attempt.sequence.attempt = None
        self.send(attempt.node, attempt.cancel)

    def append(self, sequence: Sequence, run: TokenRun) -> None:
        """Add what is new of a run of tokens to a journal. Raises LinkError when some before it are missing."""
        have = len(sequence.tokens)
        if run.start > have:
            raise LinkError(f"tokens from position {run.start} came for a sequence of {have}: those between are missing")
        new = run if run.start == have else run.since(have)
        if not new.ids:
            return
        sequence.tokens.extend(new.ids)
        sequence.logprobs += new.logprobs
        sequence.fruitless = 0
        self.journal_tokens += len(new.ids) + len(new.logprobs) // LOGPROB_BYTES
        if sequence.request.first_token_at is None:
            sequence.request.first_token_at = self.clock()
            story.first_token(sequence.request)
        sequence.wake()

    def end(self, node: str, end: Ended) -> None:
        """Take in the end of an attempt; of an unknown one it means nothing. It is acknowledged with the next flush, unless a
        retry may come for the reply. Raises LinkError when tokens are missing."""
        attempt = self.attempts.get(end.attempt)
        if attempt is None or attempt.node != node:
            if not self.retries.holds(end.attempt):
                self.node(node).ends.append(end.attempt)
            return
        sequence = attempt.sequence
        self._end(attempt, node, end)
        replied = sequence.finish in REPLIES and end.reason in REPLIES
        if not (replied and self.retries.hold(sequence.request, node, end.attempt)):
            self.node(node).ends.append(end.attempt)

    def _end(self, attempt: Attempt, node: str, end: Ended) -> None:
        sequence = attempt.sequence
        if attempt.wanted and end.position > len(sequence.tokens):
            raise LinkError(f"a sequence of {len(sequence.tokens)} tokens ended at {end.position}: those between are missing")
        if end.timing is not None:
            self._learn(attempt, end.position, end.timing)
            sequence.cached_tokens = end.timing.cached_tokens
            request = sequence.request
            request.engine = end.timing
            self._show_again(request)  # the engine speaks of a cancelled request only after it was given up here
        if end.reason == EndReason.LOST:
            self._doubt(attempt)
        if not attempt.wanted:
            self._close(attempt)
        elif end.reason in REPLIES:
            self._close(attempt)
            self.finish(sequence, end.reason)
        elif end.reason == EndReason.LOST:
            self.lose(attempt, end.fault or Fault("unreachable", f"instance {attempt.instance} went away"))
        else:
            self._close(attempt)
            unasked = Cancelled(f"node {node} ended the sequence ({end.reason}) without saying why")
            self.fail(sequence.request, unasked if end.fault is None else end.fault.to_error())

    def _learn(self, attempt: Attempt, position: int, timing: EngineTiming) -> None:
        """Take in how fast an attempt went; a few times, tell the control loop what its prefill cost."""
        sequence = attempt.sequence
        self.queue(sequence.request.model).pace.ended(position - attempt.start, timing)
        now, route = self.clock(), self.routes.make(attempt.instance)
        if timing.prefill_s > 0 and now >= route.tell_prefill_at:
            wait_s = max(2 * route.tell_prefill_s, self._settings.prefill_interval_s)
            route.tell_prefill_s = min(wait_s, self._settings.prefill_longest_s)
            route.tell_prefill_at = now + route.tell_prefill_s
            computed = len(sequence.prompt) + attempt.start - timing.cached_tokens
            self._post(PrefillTimed(attempt.instance, max(1, computed), timing.prefill_s))

    def _doubt(self, attempt: Attempt) -> None:
        """Put nothing more on the life that lost this attempt, unless it is already known to be over."""
        route = self.routes.make(attempt.instance)
        if route.change is not None and route.change.epoch == attempt.instance_epoch:
            self.routes.doubt(route)

    def lose(self, attempt: Attempt, fault: Fault) -> None:
        """The attempt will say nothing more; its sequence goes on elsewhere when this settles, if it is still wanted."""
        self._close(attempt)
        if not attempt.wanted:
            return
        sequence = attempt.sequence
        # Its end may have been on its way when it was lost: then nothing is left to run.
        if (ended := _natural_end(sequence, attempt)) is not None:
            self.finish(sequence, ended)
        else:
            self._lost.append((sequence, fault))

    # --- ends of sequences and requests

    def cancel(self, request: Request) -> None:
        """End it for good; nothing happens when it has ended."""
        if request.live:
            request.cancelled = True
            for sequence in self._halt(request):
                sequence.finish = EndReason.CANCELLED
                sequence.wake()
            self._retire(request)

    def complete(self, sequence: Sequence) -> None:
        """End it where it stands, since no more of it is wanted; nothing happens when it has ended."""
        if not sequence.done:
            self.queue(sequence.request.model).take(sequence)
            if sequence.attempt is not None:
                self._abandon(sequence.attempt, EndReason.STOP)
            self.finish(sequence, EndReason.STOP)

    def fail(self, request: Request, error: SllmError) -> None:
        """End it with an error: one choice that cannot be had fails the whole request."""
        if request.live:
            for sequence in self._halt(request):
                sequence.failure = error
                sequence.wake()
            self._retire(request)

    def read(self, request: Request, error: SllmError | None) -> None:
        """Take down what its last reader was told instead of a reply; None for one that got it, or is at it."""
        if not request.cancelled and request.failure is None and request.unread is not error:
            request.unread = error
            self._show_again(request)

    def fail_waiting(self, queue: ModelQueue, error: SllmError) -> None:
        """Fail every request that has a sequence in the queue."""
        for request in list({sequence.request: None for sequence in queue.waiting}):
            self.fail(request, error)

    def finish(self, sequence: Sequence, reason: EndReason) -> None:
        """End it with a reply."""
        sequence.finish = reason
        sequence.request.live -= 1
        sequence.wake()
        if sequence.request.live == 0:
            self._retire(sequence.request)

    def _halt(self, request: Request) -> list[Sequence]:
        """Stop all of a request's sequences that have not ended, and return them for their end to be said."""
        open_ones = [sequence for sequence in request.sequences if not sequence.done]
        for sequence in open_ones:
            self.queue(request.model).take(sequence)
            if sequence.attempt is not None:
                self._abandon(sequence.attempt, EndReason.CANCELLED)
        request.live = 0
        return open_ones

    def _retire(self, request: Request) -> None:
        """Account for a request whose sequences have all ended, and remember what there is to show of it."""
        request.ended_at = self.clock()
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None
        del self.requests[request.id]
        self.remembered[request.id] = request.view()
        story.ended(request)
        self.journal_tokens -= request.size_tokens
        queue = self.queue(request.model)
        queue.request_ended(request, request.ended_at)
        queue.live -= 1
        self.touch_model(request.model)
        self.retries.ended(request)
        if len(self.remembered) > self._settings.remembered_requests:
            self.remembered.popitem(last=False)

    def _show_again(self, request: Request) -> None:
        """Remember a request that has ended as it is now, if it still is remembered."""
        if request.id in self.remembered:
            self.remembered[request.id] = request.view()

    def _expire(self, sequence: Sequence) -> None:
        queue = self.queue(sequence.request.model)
        if sequence in queue.waiting and queue.model is not None:
            why = "no instance is ready" if self.is_cold(queue.name) else "all its instances are full"
            limit_s = queue.model.spec.cold_start_timeout_s
            message = f"waited {limit_s:g} s (cold_start_timeout_s) for an instance of model {queue.name!r}: {why}"
            self.fail(sequence.request, TimedOut(message))
            self.settle()

    # --- settling

    def settle(self) -> None:
        """Put whoever can run on an instance, then tell the control loop what changed."""
        models: dict[str, None] = {}
        while self._lost or self._models:
            lost, self._lost = self._lost, []
            # The first that was lost is to be the first in line.
            for sequence, fault in reversed(lost):
                self._requeue(sequence, fault)
            touched, self._models = self._models, {}
            for name in touched:
                self._drain(self.queue(name))
            models |= touched
        routes, self._routes = self._routes, {}
        for route in routes:
            busy = bool(route.attempts)
            if busy != route.said_busy:
                route.said_busy = busy
                self._post(InstanceActivity(route.instance, len(route.attempts)))
            if route.idle_and_gone:
                self.routes.forget(route)
        for name in models:
            queue = self.queue(name)
            queue.say_demand()
            if queue.model is None and queue.live == 0:
                queue.close()
                del self.queues[name]

    def _requeue(self, sequence: Sequence, fault: Fault) -> None:
        request = sequence.request
        queue = self.queue(request.model)
        if sequence.done:
            return
        if request.orphaned and request.retry is None:
            self.cancel(request)
        elif (refusal := queue.refusal()) is not None:
            self.fail(request, refusal)
        elif sequence.fruitless >= self._settings.max_attempts:
            self.fail(request, fault.to_error())
        else:
            story.moved(request, fault)
            queue.put(sequence, front=True)
            self.touch_model(request.model)

    def _drain(self, queue: ModelQueue) -> None:
        while queue.waiting:
            sequence = queue.waiting.first()
            journal = len(sequence.prompt) + len(sequence.tokens)
            route = self.pick(queue, len(sequence.prompt), len(sequence.tokens), sequence.request.params)
            if route is not None:
                queue.take(sequence, journal + queue.expected_tokens(sequence.request.params))
                self._start(queue, route, sequence)
            elif not sequence.tokens and 0 < (limit := self.routes.limit(queue.name)) <= journal:
                message = f"the prompt has {journal} tokens; the instances of model {queue.name!r} take {limit}, reply included"
                self.fail(sequence.request, ContextOverflow(message))
            else:
                break
        if self.ending is not None and self.is_cold(queue.name):
            self.fail_waiting(queue, self.ending)
        waits, queue.unarmed = queue.unarmed, []
        for sequence in waits:
            if sequence in queue.waiting and sequence.timer is None and queue.model is not None:
                sequence.request.cold |= self.is_cold(queue.name)
                sequence.timer = self.call_later(queue.model.spec.cold_start_timeout_s, partial(self._expire, sequence))


def _natural_end(sequence: Sequence, attempt: Attempt) -> EndReason | None:
    """How the tokens that are there end the sequence by themselves, if they do."""
    params = sequence.request.params
    if sequence.tokens and sequence.tokens[-1] in params.stop_token_ids and len(sequence.tokens) >= params.min_tokens:
        return EndReason.STOP
    return EndReason.LENGTH if len(sequence.tokens) >= attempt.max_tokens else None
