"""Journals: what a request is made of, prompt and tokens, and where each of its sequences runs.

A *request* has one *sequence* per choice; a sequence has one running *attempt* at most. All of it is changed by the router
alone, on the event loop's thread; a consumer only reads and waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from schema.admin import RequestTimeline, RequestView
from schema.errors import Fault, SllmError
from schema.ids import Epoch
from schema.link import Cancel, EngineTiming, RetryKey, SamplingParams, StartPhases
from schema.sampling import LOGPROB_BYTES
from schema.states import EndReason, RequestState

__all__ = ["Attempt", "Request", "Sequence", "Timer"]

_FAULT_CHARACTERS = 2000
"""Ended requests are remembered by the thousand, and a library may say pages."""


class Timer(Protocol):
    """What a timer service returns, as asyncio's `call_later` does."""

    def cancel(self) -> None: ...


@dataclass(slots=True, eq=False)
class Attempt:
    """One run of a sequence on one life of an instance.

    ``link`` is the count of the node's connection over which it was submitted: a later truth without it says that it was
    lost. ``began_at`` is when it was submitted, with ``start`` tokens of the reply. ``kv_tokens`` is what it was taken to
    need; ``max_tokens`` what its reply may have on this instance. ``cancel`` is what its node was told once its tokens were not
    ``wanted`` any more: then only its end is waited for.
    """

    epoch: Epoch
    sequence: Sequence
    node: str
    instance: str
    instance_epoch: Epoch
    link: int
    began_at: float
    start: int
    kv_tokens: int
    max_tokens: int
    cancel: Cancel | None = None

    @property
    def wanted(self) -> bool:
        return self.cancel is None


class Sequence:
    """One choice of a request. ``tokens`` only grows: read it, never write; ``finish`` is set once, after its last token.
    ``logprobs`` has a record for each of them where they were asked for (`schema.sampling.read_logprobs`).

    ``fruitless`` counts its attempts since the last token that one of them brought. ``cached_tokens``: how many the latest
    attempt to end found in the prefix cache, None until one has ended. ``on_end`` is called once, at the end or
    failure; it may not call the router.
    """

    __slots__ = (
        "_waiters", "attempt", "cached_tokens", "choice", "failure", "finish", "fruitless", "logprobs", "on_end", "prompt",
        "request", "timer", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, choice: int, prompt: tuple[int, ...]) -> None:
        self.request = request
        self.choice = choice
        self.prompt = prompt
        self.tokens: list[int] = []
        self.logprobs = bytearray()
        self.finish: EndReason | None = None
        self.failure: SllmError | None = None
        self.attempt: Attempt | None = None
        self.fruitless = 0
        self.cached_tokens: int | None = None
        self.timer: Timer | None = None
        self.on_end: Callable[[Sequence], None] | None = None
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def done(self) -> bool:
        return self.finish is not None or self.failure is not None

    @property
    def size_tokens(self) -> int:
        """What its reply takes of memory, a log-probability counted as a token, which it is as large as."""
        return len(self.tokens) + len(self.logprobs) // LOGPROB_BYTES

    def complete(self) -> None:
        """End it as it stands: its text is complete. Its request goes on; after the end nothing happens."""
        self.request.complete(self)

    async def wait(self, position: int) -> None:
        """Return when there are more than ``position`` tokens, or ``finish`` is set.

        A failed sequence raises its SllmError once its tokens beyond ``position`` are read; ``finish`` then stays None.
        How long this may take is bounded where the sequence is: by the cold start's timeout while it waits for an instance,
        by the link's and the node's timeouts while it runs.
        """
        while len(self.tokens) <= position and self.finish is None:
            if self.failure is not None:
                raise self.failure
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append((position, waiter))
            try:
                await waiter
            finally:
                if waiter.cancelled():
                    self._waiters.remove((position, waiter))

    def wake(self) -> None:
        """Let those who wait look again; tokens on the way to where someone waits wake nobody."""
        if self.on_end is not None and self.done:
            call, self.on_end = self.on_end, None
            call(self)
        if self._waiters:
            have = len(self.tokens)
            later: list[tuple[int, asyncio.Future[None]]] = []
            for position, waiter in self._waiters:
                if waiter.done():
                    # Cancelled; it takes itself off the list.
                    later.append((position, waiter))
                elif have > position or self.done:
                    waiter.set_result(None)
                else:
                    later.append((position, waiter))
            self._waiters = later


class Request:
    """One request of a client, or one found on a node without a client (``orphaned``). Times are the router's clock.

    ``readers`` counts the clients that want it: one, and those of its retries, which are known by ``retry``. ``unread`` is
    what the last of them was told instead of its reply, where that was no failure of the request's own.
    """

    __slots__ = (
        "_cancel", "_leave", "attempts", "cancelled", "cold", "complete", "ended_at", "engine", "first_token_at", "id",
        "instance", "live", "model", "node", "orphaned", "params", "readers", "received_at", "retry", "routed_at", "sequences",
        "start", "tenant", "timer", "unread", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        id: str,  # noqa: A002 - the name that every view of a request has
        model: str,
        params: SamplingParams,
        received_at: float,
        cancel: Callable[[Request], None],
        *,
        complete: Callable[[Sequence], None] = lambda _: None,
        leave: Callable[[Request, SllmError | None], None] = lambda *_: None,
        tenant: str = "",
        retry: RetryKey | None = None,
        orphaned: bool = False,
    ) -> None:
        self.id = id
        self.model = model
        self.params = params
        self.received_at = received_at
        self.tenant = tenant
        self.retry = retry
        self.orphaned = orphaned
        self.readers = 0
        self.sequences: list[Sequence] = []
        self.live = 0
        self.waiting = 0
        self.attempts = 0
        self.cancelled = False
        self.cold = False
        self.node: str | None = None
        self.instance: str | None = None
        self.routed_at: float | None = None
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.start: StartPhases | None = None
        self.engine: EngineTiming | None = None
        self.timer: Timer | None = None
        self.unread: SllmError | None = None
        self._cancel = cancel
        self._leave = leave
        self.complete = complete

    def cancel(self) -> None:
        """End it for good: nothing more is delivered. May be called again, and after the end."""
        self._cancel(self)

    def leave(self, error: SllmError | None = None) -> None:
        """A client reads no more of it, which ends it unless it has ended, others read it, or a retry may come; with the
        ``error`` that ended its reply. One that says that nobody can read it ends it anyway."""
        self._leave(self, error)

    @property
    def failure(self) -> SllmError | None:
        """What it ended with instead of a reply."""
        for sequence in self.sequences:
            if sequence.failure is not None:
                return sequence.failure
        return None

    @property
    def fault(self) -> SllmError | None:
        """Why it failed, None if it did not: what it ended with, or what its last reader was told instead of its reply."""
        return self.failure or (self.unread if self.live == 0 and not self.cancelled else None)

    @property
    def state(self) -> RequestState:
        if self.fault is not None:
            return RequestState.FAILED
        if self.cancelled:
            return RequestState.CANCELLED
        if self.live == 0:
            return RequestState.FINISHED
        return RequestState.WAITING if self.waiting else RequestState.RUNNING

    @property
    def generated(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum([len(sequence.tokens) for sequence in self.sequences])

    @property
    def size_tokens(self) -> int:
        """What it takes of memory: its prompt and what was generated, a log-probability counted as a token."""
        return len(self.sequences[0].prompt) + sum([sequence.size_tokens for sequence in self.sequences])

    def timeline(self) -> RequestTimeline:
        def since(at: float | None) -> float | None:
            return None if at is None else max(0.0, at - self.received_at)

        return RequestTimeline(
            cold=self.cold,
            routed_s=since(self.routed_at),
            first_token_s=since(self.first_token_at),
            ended_s=since(self.ended_at),
            start=self.start,
            engine=self.engine,
        )

    def view(self) -> RequestView:
        return RequestView(
            id=self.id,
            model=self.model,
            state=self.state,
            node=self.node,
            instance=self.instance,
            attempts=self.attempts,
            prompt_tokens=len(self.sequences[0].prompt) if self.sequences else 0,
            generated_tokens=self.generated,
            orphaned=self.orphaned,
            received_at=self.received_at,
            timeline=self.timeline(),
            fault=None if (fault := self.fault) is None else _fault(fault),
        )


def _fault(error: SllmError) -> Fault:
    """What is remembered of it."""
    message = error.message
    if len(message) > _FAULT_CHARACTERS:
        message = message[: _FAULT_CHARACTERS - 1] + "…"
    return Fault(error.code, message)
