"""One model's line of waiting sequences, what the control loop is told of it, and what its past says of its pace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from schema.errors import Conflict, NotFound, SllmError
from schema.link import SamplingParams
from schema.spec import ModelSpec
from schema.states import ModelState
from sllmctl.control.events import DemandChanged, Event
from sllmctl.gateway.journal import Request, Sequence, Timer
from sllmctl.gateway.line import Line
from sllmctl.gateway.pace import Pace
from sllmctl.gateway.router_settings import RouterSettings

__all__ = ["CallLater", "ModelQueue", "RoutedModel"]

CallLater = Callable[[float, Callable[[], None]], Timer]
"""``call_later(delay_s, call)``, as an event loop has it."""


@dataclass(frozen=True, slots=True)
class RoutedModel:
    """A model as the gateway sees it. ``max_context_tokens`` bounds prompt and reply together; 0 is not known yet."""

    name: str
    spec: ModelSpec
    state: ModelState
    digest: str | None
    max_context_tokens: int


class ModelQueue:
    """``model`` is None for one that is not known (any more) while requests for it still end. ``live`` counts requests,
    ``waiting_requests`` those of them with a sequence in ``waiting``."""

    def __init__(self, name: str, settings: RouterSettings, post: Callable[[Event], None], call_later: CallLater) -> None:
        self.name = name
        self.model: RoutedModel | None = None
        self.waiting = Line()
        self.unarmed: list[Sequence] = []
        self.waiting_requests = 0
        self.live = 0
        self.start_s = 0.0
        self.pace = Pace(settings.reply_smoothing)
        self._settings = settings
        self._post = post
        self._call_later = call_later
        self._reply_tokens = float(settings.expected_reply_tokens)
        self._interval_s = 0.0
        self._ended_at: float | None = None
        self._said_waiting = 0
        self._demand_timer: Timer | None = None

    def put(self, sequence: Sequence, *, front: bool = False) -> None:
        """Let a sequence wait: last of its tenant's, or at the front when it ran already."""
        self.waiting.add(sequence, front=front)
        self.unarmed.append(sequence)
        sequence.request.waiting += 1
        if sequence.request.waiting == 1:
            self.waiting_requests += 1

    def take(self, sequence: Sequence, served_tokens: int = 0) -> bool:
        """Let it wait no more; False if it did not. ``served_tokens`` are charged to its tenant."""
        if sequence not in self.waiting:
            return False
        self.waiting.remove(sequence, served_tokens)
        if sequence.timer is not None:
            sequence.timer.cancel()
            sequence.timer = None
        sequence.request.waiting -= 1
        if sequence.request.waiting == 0:
            self.waiting_requests -= 1
        return True

    def refusal(self) -> SllmError | None:
        """Why the model takes no requests, or None if it does."""
        if self.model is None or self.model.state == ModelState.DELETING:
            return NotFound(f"there is no model {self.name!r}")
        if self.model.state == ModelState.INGESTING:
            return Conflict(f"model {self.name!r} is still being ingested; deploy it when that is done")
        if self.model.state == ModelState.FAILED:
            return Conflict(f"the ingest of model {self.name!r} failed; see `sllmctl model show {self.name}`")
        if self.model.state == ModelState.STOPPED:
            return Conflict(f"model {self.name!r} is stopped; deploy it with `sllmctl model deploy {self.name}`")
        return None

    def expected_tokens(self, params: SamplingParams) -> int:
        """How long a reply is taken to become: as the model's replies were of late, within what was asked for."""
        return min(params.max_tokens, int(self._reply_tokens))

    def request_ended(self, request: Request, now: float) -> None:
        """Learn from a request's end; ``live`` still counts it."""
        weight = self._settings.reply_smoothing
        if request.sequences and not request.cancelled and request.failure is None:
            longest = max(len(sequence.tokens) for sequence in request.sequences)
            self._reply_tokens += weight * (longest - self._reply_tokens)
        if self._ended_at is not None:
            since = max(0.0, now - self._ended_at)
            self._interval_s = since if self._interval_s == 0.0 else self._interval_s + weight * (since - self._interval_s)
        # Only the time between ends with work in between says something of the pace.
        self._ended_at = now if self.live > 1 else None

    def retry_after_s(self, *, cold: bool) -> float:
        """What to tell a client that found the queue full: a start if none is there, then those ahead at the recent pace."""
        pace = self._interval_s * (self.waiting_requests + 1)
        start = (self.start_s or self._settings.first_retry_after_s) if cold else 0.0
        known = pace + start if self._interval_s else max(start, self._settings.first_retry_after_s)
        return min(max(1.0, known), max(1.0, self._settings.longest_retry_after_s))

    def say_demand(self) -> None:
        """Tell the control loop: at once when waiting begins or ends, otherwise at most once in an interval."""
        waiting = self.waiting_requests
        if waiting == self._said_waiting:
            return
        if (waiting == 0) != (self._said_waiting == 0):
            self._say()
        elif self._demand_timer is None:
            self._demand_timer = self._call_later(self._settings.demand_interval_s, self._say_late)

    def close(self) -> None:
        """No timer of it fires any more."""
        if self._demand_timer is not None:
            self._demand_timer.cancel()
            self._demand_timer = None

    def _say_late(self) -> None:
        self._demand_timer = None
        if self.waiting_requests != self._said_waiting:
            self._say()

    def _say(self) -> None:
        self.close()
        self._said_waiting = self.waiting_requests
        self._post(DemandChanged(self.name, self.waiting_requests, self.live - self.waiting_requests))
