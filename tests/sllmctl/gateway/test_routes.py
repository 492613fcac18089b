"""Which instance takes the next sequence: the one that a look at all of them would find, whatever happened before."""

from __future__ import annotations

import random

import pytest

from schema.ids import epoch_of
from schema.link import SamplingParams
from schema.states import InstanceState
from sllmctl.control.effects import RouteChanged
from sllmctl.gateway.journal import Attempt, Request, Sequence
from sllmctl.gateway.routes import Route, Routes
from tests.examples import examples

MODELS, NODES = ("a", "b"), ("n", "o", "p")


class Twin:
    """The same rule over plain lists."""

    def __init__(self) -> None:
        self.up: set[str] = set()
        self.known: dict[str, dict[str, Route]] = {model: {} for model in MODELS}

    def open(self, model: str) -> list[Route]:
        return [
            route
            for route in self.known[model].values()
            if route.change is not None
            and (route.change.state, route.change.reachable, route.doubted) == (InstanceState.READY, True, False)
            and route.change.node in self.up
        ]

    def limit(self, model: str) -> int:
        limits = [route.change.max_context_tokens for route in self.open(model) if route.change is not None]
        return max(limits) if limits and all(limits) else 0

    def pick(self, model: str, journal: int, expected: int, whole: int) -> Route | None:
        least = min(whole, self.limit(model)) if self.limit(model) else whole
        best: Route | None = None
        for route in self.open(model):
            change = route.change
            assert change is not None
            if len(route.attempts) >= change.max_concurrency:
                continue
            if 0 < change.max_context_tokens < max(least, journal + 1):
                continue
            if route.attempts and 0 < change.kv_capacity_tokens < route.kv_tokens + journal + expected:
                continue
            if best is None or len(route.attempts) < len(best.attempts):
                best = route
        return best


def _attempt(epoch: int, route: Route, model: str, kv_tokens: int) -> Attempt:
    request = Request(f"r{epoch}", model, SamplingParams(max_tokens=1), 0.0, lambda request: None)
    return Attempt(epoch_of(1, epoch), Sequence(request, 0, (1,)), "n", route.instance, epoch_of(1, 1), 0, 5.0, 0, kv_tokens, 1)


@pytest.mark.parametrize("seed", range(examples(8)))
def test_the_pick_is_that_of_a_look_at_all(seed: int) -> None:
    rng = random.Random(seed)
    routes, twin, life, picked = Routes(), Twin(), 0, 0
    running: list[tuple[Route, Attempt]] = []
    for step in range(3000):
        model, node = rng.choice(MODELS), rng.choice(NODES)
        act = rng.choices(("change", "node", "doubt", "forget", "end", "submit"), (8, 2, 1, 3, 38, 48))[0]
        some = rng.choice(list(twin.known[model].values()) or [None])
        if act == "change":
            life += 1
            instance = some.instance if some is not None and rng.random() < 0.7 else f"{model}{step}"
            state = rng.choices((InstanceState.READY, InstanceState.DRAINING, InstanceState.STOPPED), (8, 1, 1))[0]
            sizes = (rng.choice((0, 60, 400)), rng.choice((0, 30, 100)), rng.randint(1, 6))
            route = routes.change(
                RouteChanged(model, node, instance, epoch_of(1, life), state, rng.random() < 0.9, *sizes, node)
            )
            assert route is not None
            twin.known[model].setdefault(instance, route)
        elif act == "node" and rng.random() < 0.3 and node in twin.up:
            twin.up.discard(node)
            routes.node_down(node)
        elif act == "node":
            twin.up.add(node)
            routes.node_up(node)
        elif act == "doubt" and some is not None:
            routes.doubt(some)
        elif act == "forget" and some is not None and not some.attempts:
            del twin.known[model][some.instance]
            routes.forget(some)
        elif act == "end" and running:
            route, attempt = running.pop(rng.randrange(len(running)))
            route.remove(attempt)
        elif act == "submit":
            size = (rng.randint(1, 40), rng.randint(0, 30), rng.randint(1, 90))
            found = routes.pick(model, *size)
            assert found is twin.pick(model, *size), (seed, step)
            if found is not None:
                picked += 1
                attempt = _attempt(step, found, model, size[0] + size[1])
                found.add(attempt)
                running.append((found, attempt))
        for name in MODELS:
            opened = twin.open(name)
            assert routes.limit(name) == twin.limit(name)
            assert routes.any_open(name) == bool(opened)
            count, began_sum_s = routes.busy(name)
            assert count == sum(len(route.attempts) for route in opened)
            assert began_sum_s == pytest.approx(5.0 * count)
    assert picked > 500
