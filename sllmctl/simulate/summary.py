"""A simulation in figures: quantiles of latencies, shares, counts; of one record, or of several seeds' together.

A request that failed counts as the scenario's timeout, in startup latency and in time to first token alike: leaving it out
would reward a policy for what it drops.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence

import msgspec

from sllmctl.simulate.record import Record

__all__ = ["Latency", "Summary", "cdf", "startups", "summarise"]


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. Quantiles are nearest-rank: each is a value that occurred."""

    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    most_s: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """``settings``: what was varied for this run, such as ``workload.rate``.

    ``within`` counts the requests that began within the timeout, ``cold`` those that waited for a start, ``failed`` those that
    ended with an error, by code in ``faults``. ``throughput_rps``: requests that ended well, over the time simulated.
    ``device_busy_h`` and ``device_held_h``: device-hours that were computed and that were promised to instances.
    ``simulated_rps``: requests per second of wall time.
    """

    scenario: str
    policy: str
    seeds: tuple[int, ...]
    settings: dict[str, float | int | str] = {}
    timeout_s: float
    requests: int
    startup: Latency
    first_token: Latency
    within: int
    within_share: float
    cold: int
    failed: int
    faults: dict[str, int]
    throughput_rps: float
    migrations: int
    preemptions: int
    evictions: int
    starts: int
    loads: dict[str, int]
    device_busy_h: float
    device_held_h: float
    simulated_s: float
    wall_s: float
    simulated_rps: float


def summarise(records: Sequence[Record], timeout_s: float, settings: dict[str, float | int | str] | None = None) -> Summary:
    """All requests of the records together; counts and times are summed. The records are of one scenario and policy."""
    startup = sorted(startups(records, timeout_s))
    first = sorted(_counted([(one.first_token_s, one.failed) for one in records], timeout_s))
    requests = len(startup)
    failed = sum(sum(one.failed) for one in records)
    within = sum(
        not lost and seconds <= timeout_s for one in records for seconds, lost in zip(one.startup_s, one.failed, strict=True)
    )
    simulated_s = sum(one.simulated_s for one in records)
    wall_s = sum(one.wall_s for one in records)
    return Summary(
        scenario=records[0].scenario,
        policy=records[0].policy,
        seeds=tuple(one.seed for one in records),
        settings=settings or {},
        timeout_s=timeout_s,
        requests=requests,
        startup=_latency(startup),
        first_token=_latency(first),
        within=within,
        within_share=within / requests if requests else 0.0,
        cold=sum(sum(one.cold) for one in records),
        failed=failed,
        faults=dict(sorted(_summed([one.faults for one in records]).items())),
        throughput_rps=(requests - failed) / simulated_s if simulated_s else 0.0,
        migrations=sum(one.migrations for one in records),
        preemptions=sum(one.preemptions for one in records),
        evictions=sum(one.evictions for one in records),
        starts=sum(one.starts for one in records),
        loads=dict(sorted(_summed([one.loads for one in records]).items())),
        device_busy_h=sum(one.device_busy_s for one in records) / 3600,
        device_held_h=sum(one.device_held_s for one in records) / 3600,
        simulated_s=simulated_s,
        wall_s=wall_s,
        simulated_rps=requests / wall_s if wall_s else 0.0,
    )


def startups(records: Sequence[Record], timeout_s: float) -> array[float]:
    """Startup latencies, failed ones as the timeout, in order of arrival."""
    return _counted([(one.startup_s, one.failed) for one in records], timeout_s)


def cdf(values: Sequence[float], points: int = 400) -> list[tuple[float, float]]:
    """(value, share of values that are at most so large), at most so many points, the first and last value among them.

    Dense towards the end, where the tail is told: half of the points are spread over the values, half over the last tenth.
    """
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        return []
    ranks = {0, count - 1}
    half = max(points // 2, 2)
    for start in (0, count - max(count // 10, 1)):
        ranks.update(start + (count - 1 - start) * step // (half - 1) for step in range(half))
    return [(ordered[rank], (rank + 1) / count) for rank in sorted(ranks)]


def _counted(pairs: Sequence[tuple[array[float], array[int]]], timeout_s: float) -> array[float]:
    counted = array("d")
    for values, failed in pairs:
        # NaN is unequal to itself: what never happened counts as a failure.
        counted.extend(timeout_s if lost or value != value else value for value, lost in zip(values, failed, strict=True))
    return counted


def _latency(ordered: Sequence[float]) -> Latency:
    if not ordered:
        return Latency(mean_s=0.0, p50_s=0.0, p95_s=0.0, p99_s=0.0, most_s=0.0)
    return Latency(
        mean_s=math.fsum(ordered) / len(ordered),
        p50_s=_quantile(ordered, 50),
        p95_s=_quantile(ordered, 95),
        p99_s=_quantile(ordered, 99),
        most_s=ordered[-1],
    )


def _quantile(ordered: Sequence[float], percent: int) -> float:
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def _summed(counters: Sequence[Counter[str]]) -> Counter[str]:
    return sum(counters, Counter())
