"""Whole simulations of small clusters: every request ends once, nothing is lost, and one seed gives one history."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from hashlib import sha256
from math import isnan
from random import Random
from typing import Any

import pytest
from msgspec import structs

from schema.errors import InvalidInput
from sllmctl.simulate.cluster import simulate
from sllmctl.simulate.policies import Policy
from sllmctl.simulate.record import Record
from sllmctl.simulate.scenario import Arrival, ModelGroup, NodeGroup, Scenario, Speed, Workload
from tests.sllmctl.simulate.planners import first_fit

GB = 10**9
SPEED = Speed(prefill_base_s=0.03, prefill_token_s=0.0002, decode_step_s=0.03, decode_sequence_s=0.0002, decode_token_s=1e-6)


def scenario(**more: object) -> Scenario:
    """Two nodes of two devices, each of which has room for one of the six models."""
    facts: dict[str, object] = {
        "name": "small",
        "seed": 3,
        "nodes": (
            NodeGroup(
                name="n", count=2, devices=2, device_bytes=30 * GB, device_bps=20 * GB, dram_bytes=60 * GB,
                disk_bps=5 * GB, network_bps=GB,
            ),
        ),
        "models": (
            ModelGroup(
                name="m", count=6, weights_bytes=16 * GB, kv_token_bytes=1_000_000, kv_bytes=8 * GB, speed=SPEED,
                build_s=0.25, finish_s=0.05, max_concurrency=8,
            ),
        ),
        "workload": Workload(rate=1.0, requests=1),
    }  # fmt: skip
    return Scenario(**{**facts, **more})  # type: ignore[arg-type]


def drawn(count: int, rate: float, *, models: int = 6, seed: int = 1, most: int = 300) -> list[Arrival]:
    random = Random(seed)
    at = 0.0
    arrivals = []
    for _ in range(count):
        at += random.expovariate(rate)
        model = f"m-{random.randrange(models):05d}"
        arrivals.append(Arrival(at, model, random.randint(10, 400), random.randint(1, most)))
    return arrivals


ARRIVALS = drawn(200, 0.7)


def check(record: Record, arrivals: list[Arrival]) -> None:
    """Every arrival has ended, well or not, and its times are in order."""
    assert list(record.arrived_at) == [one.at for one in arrivals]
    assert sum(record.failed) == sum(record.faults.values())
    for index, one in enumerate(arrivals):
        if record.failed[index]:
            assert isnan(record.ended_s[index])
            continue
        startup, first, ended = record.startup_s[index], record.first_token_s[index], record.ended_s[index]
        assert 0 <= startup <= ended
        assert 0 < first <= ended
        # It cannot be done sooner than alone on an idle instance.
        alone = SPEED.prefill_base_s + one.prompt_tokens * SPEED.prefill_token_s + (one.output_tokens - 1) * SPEED.decode_step_s
        assert ended >= alone - 1e-6
    assert record.starts == sum(record.loads.values())
    assert 0 < record.device_busy_s <= record.device_held_s <= 4 * record.simulated_s + 1e-6


POLICIES = [
    first_fit(),
    first_fit(batching=False),
    first_fit(exclusive=True),
    first_fit("preempt"),
    first_fit("move"),
    first_fit("move", batching=False),
]


def _called(policy: Policy) -> str:
    how = [name for name, is_so in (("exclusive", policy.exclusive), ("batching", policy.batching)) if is_so]
    return "-".join([*policy.name.split(), *how])


def history(policy: Policy) -> Record:
    return simulate(scenario(), policy, iter(ARRIVALS))


def _param(policy: Policy) -> Any:
    return pytest.param(policy, id=_called(policy), marks=() if policy in (POLICIES[0], POLICIES[4]) else pytest.mark.slow)


@pytest.fixture(scope="module", params=[_param(policy) for policy in POLICIES])
def played(request: pytest.FixtureRequest) -> tuple[Policy, Record]:
    """A policy, and its history of the ARRIVALS."""
    return request.param, history(request.param)


def test_every_request_ends_once(played: tuple[Policy, Record]) -> None:
    _, record = played
    check(record, ARRIVALS)
    assert not sum(record.failed), record.faults
    assert record.evictions


def test_one_seed_gives_one_history(played: tuple[Policy, Record]) -> None:
    policy, first = played
    records = (first, history(policy))
    for part in fields(Record):
        if part.name == "wall_s":
            continue
        one, two = (getattr(record, part.name) for record in records)
        # NaNs are not equal to each other, but their bytes are.
        assert (one.tobytes() == two.tobytes()) if hasattr(one, "tobytes") else one == two, part.name


def fingerprint() -> str:
    """Of a simulation in which everything happens."""
    record = simulate(scenario(), first_fit("move"), iter(drawn(150, 0.8, seed=5)))
    return sha256(b"".join(part.tobytes() for part in (record.startup_s, record.first_token_s, record.ended_s))).hexdigest()


@pytest.mark.slow
def test_two_processes_find_the_same() -> None:
    """Sets of names come in another order in each process, so nothing may depend on it."""
    code = "from tests.sllmctl.simulate.test_cluster import fingerprint; print(fingerprint())"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in "12"
    }
    assert found == {fingerprint() + "\n"}


def test_overload_ends_in_timeouts_and_nothing_worse() -> None:
    arrivals = drawn(500, 5.0)
    record = simulate(scenario(timeout_s=20.0), first_fit(batching=False), iter(arrivals))
    check(record, arrivals)
    assert record.faults.keys() == {"timed_out"}
    assert sum(record.failed) > 100


def test_preempted_requests_resume_and_their_pauses_count() -> None:
    arrivals = drawn(300, 0.7, most=600)
    record = simulate(scenario(), first_fit("preempt"), iter(arrivals))
    check(record, arrivals)
    assert record.preemptions
    assert not sum(record.failed)


def test_moved_requests_keep_their_tokens_and_hardly_stand_still() -> None:
    """Of two nodes only one has the second model; whoever is busy there goes to the other."""
    (machines,) = scenario().nodes
    (models,) = scenario().models
    moved = 0
    for seed in range(4):
        asked = scenario(
            seed=seed,
            nodes=tuple(structs.replace(machines, name=name, count=1, devices=1) for name in "ab"),
            models=(
                structs.replace(models, name="all", count=1, max_instances=1),
                structs.replace(models, name="rare", count=1, on_disk=1),
            ),
        )
        arrivals = [Arrival(at, "all-00000", 500, 1500) for at in (0.0, 1.0, 2.0)]
        arrivals.append(Arrival(20.0, "rare-00000", 100, 100))
        record = simulate(asked, first_fit("move"), iter(arrivals))
        assert not sum(record.failed)
        # It waits for its own load alone, or for the one of the instance that goes as well.
        assert record.startup_s[3] < (10.0 if record.migrations else 4.0)
        moved += record.migrations
        for index, at in enumerate((0.0, 1.0, 2.0)):
            # The target has computed all but a few tokens when the source lets go.
            pause = record.startup_s[index] - (3.25 - at)
            assert (0.03 < pause < 0.15) if record.migrations else abs(pause) < 1e-9
    assert 0 < moved < 4


def test_a_request_that_no_model_takes_fails_with_its_reason() -> None:
    record = simulate(scenario(), first_fit(), iter([Arrival(0.0, "m-00000", 5000, 10), Arrival(1.0, "m-00000", 10, 10)]))
    assert list(record.failed) == [1, 0]
    assert record.faults == {"context_overflow": 1}


def test_what_is_not_in_the_scenario_is_refused() -> None:
    with pytest.raises(InvalidInput, match="which the scenario does not have"):
        simulate(scenario(), first_fit(), iter([Arrival(0.0, "other", 10, 10)]))
    with pytest.raises(InvalidInput, match="no_such_setting"):
        simulate(scenario(control={"no_such_setting": 1.0}), first_fit(), iter([]))


def test_what_its_caller_froze_stays_frozen() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    simulate(scenario(), first_fit(), iter([Arrival(0.0, "m-00000", 10, 10)]))
    assert gc.get_freeze_count() > 0.9 * before, "but for what was let go meanwhile"


def test_arrivals_are_drawn_as_time_goes_on() -> None:
    """A million of them need not be in memory at once."""
    ahead: list[int] = []
    ended = 0

    def arrivals() -> Iterator[Arrival]:
        for number, one in enumerate(drawn(3000, 2.0, models=2, most=40)):
            ahead.append(number - ended)
            yield one

    def progress(count: int) -> None:
        nonlocal ended
        ended = count

    record = simulate(scenario(), first_fit(), arrivals(), progress=progress)
    assert ended == len(record.arrived_at) == 3000
    assert max(ahead) < 1200
