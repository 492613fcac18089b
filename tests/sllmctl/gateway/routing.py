"""A router on a bench: what it sends and posts is kept, its clock and timers are moved by hand."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from schema.ids import Epoch, EpochCounter, epoch_of
from schema.link import (
    ArenaInfo,
    AttemptTruth,
    Ended,
    Inventory,
    ManagerMessage,
    NodeTruth,
    SamplingParams,
    Submit,
    TokenRun,
    Tokens,
    TruthEnd,
)
from schema.spec import ModelSpec, PathSource, ScaleSpec
from schema.states import EndReason, InstanceState, ModelState
from sllmctl.control.effects import ModelChanged, RouteChanged
from sllmctl.control.events import Event
from sllmctl.gateway.router import Router
from sllmctl.gateway.router_settings import RouterSettings

M = TypeVar("M")
GENERATION = 7


@dataclass(order=True)
class FakeTimer:
    at: float
    order: int
    call: Callable[[], None] = field(compare=False)
    cancelled: bool = field(default=False, compare=False)

    def cancel(self) -> None:
        self.cancelled = True


def inventory() -> Inventory:
    return Inventory(hostname="h", cpus=1, memory_bytes=1, devices=(), arena=ArenaInfo(id="a", budget_bytes=1, chunk_bytes=1))


class Bench:
    def __init__(self, settings: RouterSettings | None = None) -> None:
        self.now = 1000.0
        self.sent: list[tuple[str, ManagerMessage]] = []
        self.posted: list[Event] = []
        self.frames: dict[str, int] = {}
        self._timers: list[FakeTimer] = []
        self._ids = 0
        self.router = Router(
            send=lambda node, message: self.sent.append((node, message)),
            post=lambda event: self.posted.append(event),
            epochs=EpochCounter(GENERATION),
            ids=self._id,
            settings=settings or RouterSettings(),
            clock=lambda: self.now,
            call_later=self._call_later,
        )

    def _id(self, kind: str) -> str:
        self._ids += 1
        return f"{kind}_{self._ids}"

    def _call_later(self, delay_s: float, call: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer(self.now + delay_s, len(self._timers), call)
        heapq.heappush(self._timers, timer)
        return timer

    @property
    def timers(self) -> int:
        return sum(not timer.cancelled for timer in self._timers)

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while self._timers and self._timers[0].at <= until:
            timer = heapq.heappop(self._timers)
            self.now = max(self.now, timer.at)
            if not timer.cancelled:
                timer.call()
        self.now = until

    def take(self, kind: type[M]) -> list[M]:
        """The messages of a kind sent since the last look, in order; all others are dropped too."""
        sent, self.sent = self.sent, []
        return [message for _, message in sent if isinstance(message, kind)]

    def events(self, kind: type[M]) -> list[M]:
        posted, self.posted = self.posted, []
        return [event for event in posted if isinstance(event, kind)]

    # --- the cluster around it

    def model(self, name: str = "m", *, state: ModelState = ModelState.DEPLOYED, context: int = 1000, **scale: int) -> None:
        spec = ModelSpec(name=name, source=PathSource("/m"), scale=ScaleSpec(**scale), cold_start_timeout_s=60.0)
        self.router.model_changed(ModelChanged(name, spec, state, "d" * 64, context))

    def node_truth(self, node: str = "n") -> NodeTruth:
        return NodeTruth(node=node, inventory=inventory())

    def node(self, node: str = "n", attempts: tuple[AttemptTruth, ...] = ()) -> None:
        self.frames[node] = 0
        self.router.truth_began(node, self.node_truth(node))
        for attempt in attempts:
            self.router.attempt_truth(node, attempt)
        self.router.truth_ended(node, TruthEnd(attempts=len(attempts)))

    def instance(
        self,
        instance: str = "i",
        *,
        node: str = "n",
        model: str = "m",
        epoch: Epoch | None = None,
        state: InstanceState = InstanceState.READY,
        reachable: bool = True,
        kv: int = 0,
        context: int = 0,
        concurrency: int = 64,
    ) -> None:
        self.router.route_changed(
            RouteChanged(
                model, node, instance, epoch or epoch_of(1, 1), state, reachable, kv, context, concurrency, f"{node}.example"
            )
        )

    def warm(self, **scale: int) -> None:
        """A model with one ready instance on one connected node."""
        self.node()
        self.model(**scale)
        self.instance()

    def tokens(self, *parts: TokenRun | Ended, node: str = "n") -> None:
        self.frames[node] += 1
        runs = tuple(part for part in parts if isinstance(part, TokenRun))
        ends = tuple(part for part in parts if isinstance(part, Ended))
        self.router.tokens(node, Tokens(frame=self.frames[node], runs=runs, ends=ends))
        self.router.batch_ended(node)


def params(max_tokens: int = 10, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **more)  # type: ignore[arg-type]


def run(submit: Submit, *ids: int, start: int | None = None) -> TokenRun:
    return TokenRun(submit.attempt, len(submit.generated) if start is None else start, ids)


def end(submit: Submit, position: int, reason: EndReason = EndReason.LENGTH, **more: object) -> Ended:
    return Ended(attempt=submit.attempt, position=position, reason=reason, **more)  # type: ignore[arg-type]
