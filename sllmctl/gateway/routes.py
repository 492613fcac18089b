"""Routes: which instance of a model takes the next sequence. Pure bookkeeping; the router decides when to ask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from schema.ids import Epoch
from schema.link import InstanceLoad, StartPhases
from schema.states import InstanceState
from sllmctl.control.effects import RouteChanged
from sllmctl.gateway.journal import Attempt

__all__ = ["GONE", "Route", "Routes"]

GONE = frozenset({InstanceState.STOPPED, InstanceState.FAILED, InstanceState.BACKOFF})
"""States in which attempts of this life are lost."""


@dataclass(slots=True, eq=False)
class Route:
    """An instance as the router knows it. ``change`` is the control loop's last word, None before the first.

    ``attempts`` are all that count on it, those that are only waited for too; ``kv_tokens`` what they were taken to need,
    ``began_sum_s`` the sum of the times at which they began. A prefill's time is told from ``tell_prefill_at`` on.
    ``doubted`` is set when its node ended an attempt as lost: the life is over, or not what it was, and takes nothing until the
    control loop, whose word comes a commit later, has spoken of it again.
    """

    instance: str
    change: RouteChanged | None = None
    attempts: dict[Epoch, Attempt] = field(default_factory=dict)
    kv_tokens: int = 0
    began_sum_s: float = 0.0
    said_busy: bool = False
    doubted: bool = False
    load: InstanceLoad | None = None
    phases: StartPhases | None = None
    phases_epoch: int = 0
    tell_prefill_at: float = 0.0
    tell_prefill_s: float = 0.0

    def add(self, attempt: Attempt) -> None:
        self.attempts[attempt.epoch] = attempt
        self.kv_tokens += attempt.kv_tokens
        self.began_sum_s += attempt.began_at

    def remove(self, attempt: Attempt) -> None:
        if self.attempts.pop(attempt.epoch, None) is not None:
            self.kv_tokens -= attempt.kv_tokens
            # An empty sum is exact again, so that rounding never adds up.
            self.began_sum_s = self.began_sum_s - attempt.began_at if self.attempts else 0.0

    @property
    def idle_and_gone(self) -> bool:
        """Nothing is left to know of it."""
        return not self.attempts and (self.change is None or self.change.state == InstanceState.STOPPED)


class Routes:
    """All instances, by id and by model; ``up`` holds the nodes whose link is there and whose truth is complete."""

    def __init__(self) -> None:
        self.up: set[str] = set()
        self._by_instance: dict[str, Route] = {}
        self._by_model: dict[str, dict[str, Route]] = {}

    def get(self, instance: str) -> Route | None:
        return self._by_instance.get(instance)

    def make(self, instance: str) -> Route:
        """The route of an instance, made when it is not known yet: truth may speak of it before the control loop does."""
        return self._by_instance.setdefault(instance, Route(instance))

    def all(self) -> Iterable[Route]:
        return self._by_instance.values()

    def change(self, change: RouteChanged) -> Route | None:
        """Take in the control loop's word. None when it is of an older life than the known one."""
        route = self.make(change.instance)
        if route.change is not None and change.epoch < route.change.epoch:
            return None
        if route.change is not None and route.change.model != change.model:
            self._by_model.get(route.change.model, {}).pop(change.instance, None)
        route.change = change
        route.doubted = False
        self._by_model.setdefault(change.model, {})[change.instance] = route
        return route

    def forget(self, route: Route) -> None:
        self._by_instance.pop(route.instance, None)
        if route.change is not None:
            siblings = self._by_model.get(route.change.model, {})
            siblings.pop(route.instance, None)
            if not siblings:
                self._by_model.pop(route.change.model, None)

    def ready(self, model: str) -> Iterable[RouteChanged]:
        """The instances that take new sequences, full ones too."""
        for route in self._by_model.get(model, {}).values():
            if (change := self._open(route)) is not None:
                yield change

    def busy(self, model: str) -> tuple[int, float]:
        """How many attempts run on the instances that take new sequences, and the sum of the times at which they began."""
        running, began_sum_s = 0, 0.0
        for route in self._by_model.get(model, {}).values():
            if route.attempts and self._open(route) is not None:
                running += len(route.attempts)
                began_sum_s += route.began_sum_s
        return running, began_sum_s

    def pick(self, model: str, journal_tokens: int, expected_tokens: int, whole_tokens: int) -> Route | None:
        """The least busy instance with room for a journal and the reply it is expected to grow by; None if there is none.

        An idle instance has room for whatever fits its context, which must hold ``whole_tokens``, prompt and longest reply,
        unless no instance's does.
        """
        best: Route | None = None
        limit = self.limit(model)
        least = min(whole_tokens, limit) if limit else whole_tokens
        for route in self._by_model.get(model, {}).values():
            change = self._open(route)
            if change is None or len(route.attempts) >= change.max_concurrency:
                continue
            if 0 < change.max_context_tokens < max(least, journal_tokens + 1):
                continue
            needed = journal_tokens + expected_tokens
            if route.attempts and 0 < change.kv_capacity_tokens < route.kv_tokens + needed:
                continue
            if best is None or len(route.attempts) < len(best.attempts):
                best = route
        return best

    def limit(self, model: str) -> int:
        """The longest context that any instance now takes, in tokens; 0 when none is known or one has no limit."""
        limits = [change.max_context_tokens for change in self.ready(model)]
        return max(limits) if limits and all(limits) else 0

    def _open(self, route: Route) -> RouteChanged | None:
        change = route.change
        if change is None or route.doubted or change.state != InstanceState.READY:
            return None
        if not change.reachable or change.node not in self.up:
            return None
        return change
