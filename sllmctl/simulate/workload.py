"""Who asks for what and when: a scenario's requests, one after the other, the same for the same seed.

Each purpose has a random stream of its own, so that other lengths come at the same times, and other times have the same
lengths in the same order.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace
from itertools import accumulate
from random import Random

from sllmctl.simulate.lengths import Sampler
from sllmctl.simulate.parts import Arrival, Lengths, Scenario, Workload
from sllmctl.simulate.trace import read_counts, read_trace

__all__ = ["arrivals", "popularity"]


def arrivals(scenario: Scenario, seed: int) -> Iterator[Arrival]:
    """The requests in order of time, none kept; at most ``workload.requests``, and none at or after ``workload.duration_s``."""
    workload = scenario.workload
    made = _from_trace(scenario) if workload.trace is not None else _drawn(scenario, seed)
    end = math.inf if workload.duration_s is None else workload.duration_s
    most = math.inf if workload.requests is None else workload.requests
    for number, arrival in enumerate(made):
        if number >= most or arrival.at >= end:
            return
        yield arrival


def popularity(scenario: Scenario, seed: int) -> list[float]:
    """The share of all requests that goes to each model, in the order of ``scenario.model_names()``."""
    count = len(scenario.model_names())
    ranks = list(range(1, count + 1))
    _stream(seed, "ranks").shuffle(ranks)
    weights = [rank**-scenario.workload.popularity.zipf for rank in ranks]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _stream(seed: int, purpose: str) -> Random:
    # A string is hashed whole into the state, so neighbouring seeds and purposes have nothing in common.
    return Random(f"{seed}/{purpose}")  # noqa: S311 - reproducible draws, no secret


def _from_trace(scenario: Scenario) -> Iterator[Arrival]:
    assert scenario.workload.trace is not None
    return read_trace(scenario.workload.trace, scenario.contexts())


def _drawn(scenario: Scenario, seed: int) -> Iterator[Arrival]:
    """Times and models of a process, with drawn lengths."""
    workload, names = scenario.workload, scenario.model_names()
    prompt = _lengths(workload.input_tokens, seed, "input")
    output = _lengths(workload.output_tokens, seed, "output")
    if workload.counts is not None:
        calls = _expanded(workload, len(names), seed)
    elif workload.per_model:
        calls = _merged(workload, popularity(scenario, seed), seed)
    else:
        calls = _single(workload, popularity(scenario, seed), seed)
    for at, model in calls:
        yield Arrival(at, names[model], prompt(), output())


def _lengths(lengths: Lengths | None, seed: int, purpose: str) -> Sampler:
    assert lengths is not None, "checked with the scenario"
    return Sampler(lengths, _stream(seed, purpose))


class _Renewal:
    """Times of a stationary renewal process with Gamma gaps of a mean and a coefficient of variation.

    Stationary from 0 on: the gap that 0 falls into is drawn in proportion to its length (again Gamma, of a shape greater by
    one), and the first arrival is as far into it as a uniform draw says. Were 0 an arrival's time, all processes of high CV
    would burst there.
    """

    __slots__ = ("_random", "_scale", "_shape", "at")

    def __init__(self, rate: float, cv: float, random: Random) -> None:
        self._shape = cv**-2
        self._scale = 1 / (rate * self._shape)
        self._random = random
        self.at = random.random() * random.gammavariate(self._shape + 1, self._scale)

    def advance(self) -> None:
        self.at += self._random.gammavariate(self._shape, self._scale)


def _single(workload: Workload, shares: Sequence[float], seed: int) -> Iterator[tuple[float, int]]:
    """One process, each of its arrivals for a model drawn by its share."""
    assert workload.rate is not None
    bounds = list(accumulate(shares))
    renewal = _Renewal(workload.rate, workload.cv, _stream(seed, "times"))
    models = _stream(seed, "models")
    while True:
        # The last bound may miss 1 by rounding.
        yield renewal.at, min(bisect_right(bounds, models.random()), len(bounds) - 1)
        renewal.advance()


def _merged(workload: Workload, shares: Sequence[float], seed: int) -> Iterator[tuple[float, int]]:
    """A process for each model with its share of the rate, merged in order of time."""
    assert workload.rate is not None
    processes = [
        _Renewal(workload.rate * share, workload.cv, _stream(seed, f"times of {model}")) for model, share in enumerate(shares)
    ]
    heap = [(process.at, model) for model, process in enumerate(processes)]
    heapify(heap)
    while True:
        at, model = heap[0]
        yield at, model
        processes[model].advance()
        heapreplace(heap, (processes[model].at, model))


def _expanded(workload: Workload, models: int, seed: int) -> Iterator[tuple[float, int]]:
    """Invocations at uniform times within their minutes; the functions are dealt to the models in turn."""
    assert workload.counts is not None
    counts = read_counts(workload.counts)
    minute_s = 60.0 if workload.rate is None else counts.total / (workload.rate * counts.minutes)
    random = _stream(seed, "times")
    for minute in range(counts.minutes):
        calls = [
            ((minute + random.random()) * minute_s, number % models)
            for number, function in enumerate(counts.by_function)
            for _ in range(function[minute])
        ]
        calls.sort()
        yield from calls
