"""Many simulations: every policy with every value of what is varied and every seed, one after the other or side by side."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from queue import Empty
from typing import Any

from schema.errors import Cancelled, Fault, InvalidInput, SllmError
from sllmctl.simulate.record import Record
from sllmctl.simulate.scenario import Scenario, override
from sllmctl.simulate.summary import Summary, cdf, startups, summarise
from sllmctl.simulate.textplot import Series
from sllmctl.simulate.workload import arrivals

__all__ = ["Outcome", "Run", "check_policies", "expected_requests", "outcomes", "runs"]

Value = float | int | str
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation. ``settings``: what is varied, with its value here."""

    scenario: Scenario
    policy: str
    settings: tuple[tuple[str, Value], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """All seeds of one policy and one value, and the distribution of their startup latencies."""

    summary: Summary
    distribution: Series


def runs(
    scenario: Scenario, policies: Sequence[str], key: str | None, values: Sequence[Value], seeds: Sequence[int]
) -> list[Run]:
    """Value by value, policy by policy, seed by seed. Raises InvalidInput for a value that the scenario cannot have."""
    made: list[Run] = []
    for value in values if key is not None else (None,):
        varied = scenario if value is None else override(scenario, [f"{key}={value}"])
        settings = () if key is None or value is None else ((key, value),)
        of_seeds = [override(varied, [f"seed={seed}"]) for seed in seeds]
        made += [Run(seeded, policy, settings) for policy in policies for seeded in of_seeds]
    return made


def expected_requests(scenario: Scenario) -> int:
    """How many requests a scenario has: as stated, else as its rate brings in the mean, else counted."""
    workload = scenario.workload
    most = math.inf if workload.requests is None else workload.requests
    if workload.trace is None and workload.counts is None and workload.rate is not None:
        return int(min(most, math.inf if workload.duration_s is None else workload.rate * workload.duration_s))
    return sum(1 for _ in arrivals(scenario, scenario.seed))


def outcomes(asked: Sequence[Run], jobs: int, progress: Callable[[int], None]) -> Iterator[Outcome]:
    """Carry the runs out, in ``jobs`` processes if that is more than one, and sum their seeds up, in the order of the runs.

    ``progress`` hears now and then how many requests have ended in all. The order in which processes finish changes nothing.
    """
    records: list[Record] = []
    done = _in_turn(asked, progress) if jobs == 1 else _side_by_side(asked, jobs, progress)
    for at, record in enumerate(done):
        records.append(record)
        following = asked[at + 1] if at + 1 < len(asked) else None
        if following is None or (following.policy, following.settings) != (asked[at].policy, asked[at].settings):
            yield _outcome(asked[at], records)
            records = []


def _outcome(run: Run, records: list[Record]) -> Outcome:
    timeout_s = run.scenario.timeout_s
    name = " ".join([run.policy, *(f"{key.rpartition('.')[2]}={value}" for key, value in run.settings)])
    return Outcome(summarise(records, timeout_s, dict(run.settings)), (name, cdf(startups(records, timeout_s))))


def _simulate(run: Run, progress: Callable[[int], None]) -> Record:
    from sllmctl.simulate.cluster import simulate
    from sllmctl.simulate.policies import policy_named

    return simulate(run.scenario, policy_named(run.policy), arrivals(run.scenario, run.scenario.seed), progress=progress)


def _in_turn(asked: Sequence[Run], progress: Callable[[int], None]) -> Iterator[Record]:
    before = 0
    for run in asked:
        record = _simulate(run, lambda ended, before=before: progress(before + ended))  # type: ignore[misc]
        before += len(record.arrived_at)
        yield record


# --- several processes ---

_said: Queue[tuple[int, int]]
_stop: Event
_parent: int


def _begin(said: Queue[tuple[int, int]], stop: Event, parent: int) -> None:
    """In each process, before its first simulation."""
    global _said, _stop, _parent
    _said, _stop, _parent = said, stop, parent


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started in here never hear an interrupt, from their first instruction on: it is their parent's to
    hear of, which says so by ``_stop``. One that comes meanwhile is heard afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(number: int, run: Run) -> Record | Fault:
    """Errors come back as faults, which every process can read."""

    def progress(ended: int) -> None:
        if os.getppid() != _parent:
            os._exit(1)  # it was killed: nobody hears what comes of this
        _said.put((number, ended))
        if _stop.is_set():
            raise Cancelled("the simulation was interrupted")

    try:
        progress(0)
        return _simulate(run, progress)
    except SllmError as error:
        return Fault.of(error)


def _side_by_side(asked: Sequence[Run], jobs: int, progress: Callable[[int], None]) -> Iterator[Record]:
    # Spawned: nothing of this process, its threads and locks, is in them.
    context = multiprocessing.get_context("spawn")
    said: Queue[tuple[int, int]] = context.Queue()
    stop = context.Event()
    ended = [0] * len(asked)
    with ProcessPoolExecutor(min(jobs, len(asked)), context, _begin, (said, stop, os.getpid())) as pool:
        try:
            with _deaf():
                futures: list[Future[Record | Fault]] = [pool.submit(_work, number, run) for number, run in enumerate(asked)]
            for future in futures:
                while not future.done():
                    wait([future], timeout=_POLL_S)
                    _hear(said, ended)
                    progress(sum(ended))
                try:
                    result: Any = future.result()
                except BrokenProcessPool as error:
                    raise SllmError("a simulation's process was killed, perhaps for its memory; try fewer --jobs") from error
                if isinstance(result, Fault):
                    raise result.to_error()
                yield result
        finally:
            stop.set()
            # What they share must outlast them, also one that is still being started.
            pool.shutdown(wait=True, cancel_futures=True)
    _hear(said, ended)


def _hear(said: Queue[tuple[int, int]], ended: list[int]) -> None:
    with suppress(Empty):
        while True:
            number, count = said.get_nowait()
            ended[number] = max(ended[number], count)


def check_policies(names: Sequence[str]) -> None:
    """Raises InvalidInput for a name that no policy has, or that is given twice."""
    from sllmctl.simulate.policies import policy_named

    for at, name in enumerate(names):
        policy_named(name)
        if name in names[:at]:
            raise InvalidInput(f"policy {name!r} is given twice", "policies")
