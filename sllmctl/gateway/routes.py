"""Routes: which instance of a model takes the next sequence. Pure bookkeeping; the router decides when to ask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

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
    ``siblings`` are those of its model, once that is known, and keep its place among them (``order``, ``open``).
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
    siblings: _Siblings | None = None
    order: int = 0
    open: bool = False

    def add(self, attempt: Attempt) -> None:
        self.attempts[attempt.epoch] = attempt
        self.kv_tokens += attempt.kv_tokens
        self.began_sum_s += attempt.began_at
        if self.siblings is not None:
            self.siblings.counted(self)

    def remove(self, attempt: Attempt) -> None:
        if self.attempts.pop(attempt.epoch, None) is not None:
            self.kv_tokens -= attempt.kv_tokens
            # An empty sum is exact again, so that rounding never adds up.
            self.began_sum_s = self.began_sum_s - attempt.began_at if self.attempts else 0.0
            if self.siblings is not None:
                self.siblings.counted(self)

    @property
    def full(self) -> bool:
        """It runs as many sequences as it may."""
        return self.change is None or len(self.attempts) >= self.change.max_concurrency

    def takes(self, journal_tokens: int, expected_tokens: int, least_context: int) -> bool:
        """Whether a journal and the reply it is expected to grow by have room on it; whether it is open is not asked."""
        change = self.change
        if change is None or self.full:
            return False
        if 0 < change.max_context_tokens < max(least_context, journal_tokens + 1):
            return False
        needed = self.kv_tokens + journal_tokens + expected_tokens
        return not (self.attempts and 0 < change.kv_capacity_tokens < needed)

    @property
    def idle_and_gone(self) -> bool:
        """Nothing is left to know of it."""
        return not self.attempts and (self.change is None or self.change.state == InstanceState.STOPPED)


class _Siblings:
    """The instances of one model, and the least busy of them, found without looking at all.

    ``open`` are those that take new sequences, in the order in which they became known; ``limit`` is the longest context that
    any of them takes, 0 when none is known or one has no limit. Both are as of the last `refresh`, which is due when ``stale``
    or when ``version`` is not that of the routes. ``_line`` is a heap of (attempts, order, route) with an entry for every open
    one that is not full; one whose number is not that of its route any more is passed over.
    """

    __slots__ = ("_line", "_made", "limit", "open", "routes", "stale", "version")

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.open: list[Route] = []
        self.limit = 0
        self.stale = True
        self.version = 0
        self._line: list[tuple[int, int, Route]] = []
        self._made = 0

    def put(self, route: Route) -> None:
        self.stale = True
        if route.siblings is not self:
            self._made += 1
            route.siblings, route.order = self, self._made
            self.routes[route.instance] = route

    def pop(self, route: Route) -> None:
        self.stale = True
        route.siblings, route.open = None, False
        del self.routes[route.instance]

    def refresh(self, up: set[str], version: int) -> None:
        for route in self.routes.values():
            route.open = _is_open(route, up)
        self.open = [route for route in self.routes.values() if route.open]
        limits = [route.change.max_context_tokens for route in self.open if route.change is not None]
        self.limit = max(limits) if limits and all(limits) else 0
        self._line_up()
        self.stale, self.version = False, version

    def counted(self, route: Route) -> None:
        """The number of a route's attempts has changed."""
        if route.open and not self.stale:
            if len(self._line) > 4 * len(self.open) + 16:
                self._line_up()
            elif not route.full:
                heappush(self._line, (len(route.attempts), route.order, route))

    def idlest(self) -> Route | None:
        """The open one with the fewest attempts, of several the first that became known; None if all are full."""
        line = self._line
        while line:
            count, _, route = line[0]
            if count == len(route.attempts):
                return route
            heappop(line)
        return None

    def _line_up(self) -> None:
        self._line = [(len(route.attempts), route.order, route) for route in self.open if not route.full]
        heapify(self._line)


def _is_open(route: Route, up: set[str]) -> bool:
    change = route.change
    return (
        change is not None
        and not route.doubted
        and change.state == InstanceState.READY
        and change.reachable
        and change.node in up
    )


class Routes:
    """All instances, by id and by model, and the nodes whose link is there and whose truth is complete."""

    def __init__(self) -> None:
        self._up: set[str] = set()
        self._version = 0
        self._by_instance: dict[str, Route] = {}
        self._by_model: dict[str, _Siblings] = {}

    def get(self, instance: str) -> Route | None:
        return self._by_instance.get(instance)

    def make(self, instance: str) -> Route:
        """The route of an instance, made when it is not known yet: truth may speak of it before the control loop does."""
        route = self._by_instance.get(instance)
        if route is None:
            route = self._by_instance[instance] = Route(instance)
        return route

    def all(self) -> Iterable[Route]:
        return self._by_instance.values()

    def node_up(self, node: str) -> None:
        """A node's link is there, and its truth is complete."""
        self._up.add(node)
        self._version += 1

    def is_up(self, node: str) -> bool:
        return node in self._up

    def node_down(self, node: str) -> None:
        self._up.discard(node)
        self._version += 1

    def doubt(self, route: Route) -> None:
        """Put nothing more on a route before the control loop has spoken of it again."""
        route.doubted = True
        if route.siblings is not None:
            route.siblings.stale = True

    def change(self, change: RouteChanged) -> Route | None:
        """Take in the control loop's word. None when it is of an older life than the known one."""
        route = self.make(change.instance)
        if route.change is not None and change.epoch < route.change.epoch:
            return None
        if route.change is not None and route.change.model != change.model:
            self._leave(route, route.change.model)
        route.change = change
        route.doubted = False
        siblings = self._by_model.get(change.model)
        if siblings is None:
            siblings = self._by_model[change.model] = _Siblings()
        siblings.put(route)
        return route

    def forget(self, route: Route) -> None:
        self._by_instance.pop(route.instance, None)
        if route.change is not None:
            self._leave(route, route.change.model)

    def any_open(self, model: str) -> bool:
        """Whether an instance of it takes new sequences, full ones too."""
        siblings = self._siblings(model)
        return siblings is not None and bool(siblings.open)

    def busy(self, model: str) -> tuple[int, float]:
        """How many attempts run on the instances that take new sequences, and the sum of the times at which they began."""
        siblings = self._siblings(model)
        routes = [] if siblings is None else siblings.open
        return sum(len(route.attempts) for route in routes), sum(route.began_sum_s for route in routes)

    def pick(self, model: str, journal_tokens: int, expected_tokens: int, whole_tokens: int) -> Route | None:
        """The least busy instance with room for a journal and the reply it is expected to grow by; None if there is none.

        An idle instance has room for whatever fits its context, which must hold ``whole_tokens``, prompt and longest reply,
        unless no instance's does.
        """
        siblings = self._siblings(model)
        if siblings is None:
            return None
        best = siblings.idlest()
        least = min(whole_tokens, siblings.limit) if siblings.limit else whole_tokens
        if best is None or best.takes(journal_tokens, expected_tokens, least):
            return best
        others = [route for route in siblings.open if route.takes(journal_tokens, expected_tokens, least)]
        return min(others, key=lambda route: len(route.attempts), default=None)

    def limit(self, model: str) -> int:
        """The longest context that any instance now takes, in tokens; 0 when none is known or one has no limit."""
        siblings = self._siblings(model)
        return 0 if siblings is None else siblings.limit

    def _siblings(self, model: str) -> _Siblings | None:
        """The instances of a model, as they are now."""
        siblings = self._by_model.get(model)
        if siblings is not None and (siblings.stale or siblings.version != self._version):
            siblings.refresh(self._up, self._version)
        return siblings

    def _leave(self, route: Route, model: str) -> None:
        siblings = self._by_model.get(model)
        if siblings is not None and route.siblings is siblings:
            siblings.pop(route)
            if not siblings.routes:
                del self._by_model[model]
