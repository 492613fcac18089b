"""Drawn requests: their statistics, their determinism, and that none is kept."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from random import Random
from statistics import fmean, linear_regression, pstdev

import pytest

from sllmctl.simulate.lengths import Sampler, cut_mean
from sllmctl.simulate.scenario import Lengths, Scenario, load_scenario, override
from sllmctl.simulate.workload import arrivals, popularity
from tests.examples import examples


def scenario(*assignments: str) -> Scenario:
    return override(load_scenario("demo"), ["workload.requests=10000000", *assignments])


@pytest.mark.parametrize("cv", [0.5, 1, 2, 4])
def test_gaps_of_one_process_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    one = scenario(f"workload.cv={cv}", "workload.per_model=false")
    times = [call.at for call in islice(arrivals(one, 5), examples(100_000))]
    gaps = [after - before for before, after in pairwise(times)]
    # Of n gaps the mean has the deviation mean * cv / sqrt(n).
    assert fmean(gaps) == pytest.approx(2.0, rel=4 * cv / math.sqrt(len(gaps)))
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.05)


def test_each_model_has_a_process_of_its_own_with_its_share() -> None:
    many = scenario("workload.per_model=true", "workload.cv=3", "workload.rate=50")
    shares = popularity(many, 2)
    calls = list(islice(arrivals(many, 2), examples(100_000)))
    assert [call.at for call in calls] == sorted(call.at for call in calls)
    by_model: dict[str, list[float]] = {}
    for call in calls:
        by_model.setdefault(call.model, []).append(call.at)
    for name, share in zip(many.model_names(), shares, strict=True):
        gaps = [after - before for before, after in pairwise(by_model[name])]
        assert 1 / fmean(gaps) == pytest.approx(50 * share, rel=4 * 3 / math.sqrt(len(gaps)))
        assert pstdev(gaps) / fmean(gaps) == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("per_model", ["true", "false"])
def test_the_rate_holds_from_the_beginning_on_at_any_variation(per_model: str) -> None:
    bursty = scenario("workload.cv=8", f"workload.per_model={per_model}", "workload.duration_s=20", "workload.rate=2")
    counts = [sum(1 for _ in arrivals(bursty, seed)) for seed in range(examples(2000))]
    assert fmean(counts) == pytest.approx(40, abs=4 * pstdev(counts) / math.sqrt(len(counts)))


def test_popularity_falls_with_rank_as_zipf_says() -> None:
    many = scenario("workload.popularity.zipf=0.9", "models[0].count=100", "workload.per_model=false")
    counts = Counter(call.model for call in islice(arrivals(many, 4), examples(300_000)))
    ranked = [count for _, count in counts.most_common(50)]
    slope, _ = linear_regression([math.log(rank + 1) for rank in range(50)], [math.log(count) for count in ranked])
    assert slope == pytest.approx(-0.9, abs=0.03)
    # The seed says which model is the busiest.
    assert len({max(range(100), key=popularity(many, seed).__getitem__) for seed in range(5)}) > 1
    assert popularity(scenario("workload.popularity.zipf=0"), 1) == pytest.approx([1 / 8] * 8)


@pytest.mark.parametrize(
    "lengths",
    [
        Lengths(mean=169, cv=1.5, least=4, most=1024),
        Lengths(mean=362, cv=1.0, least=4, most=1024),
        Lengths(mean=53, cv=0.38, least=8, most=256),
        Lengths(mean=10, cv=0, least=1, most=20),
        Lengths(mean=10, cv=3, least=8, most=12),
    ],
)
def test_lengths_stay_within_bounds_and_have_the_mean_that_is_stated(lengths: Lengths) -> None:
    draw = Sampler(lengths, Random(7))
    drawn = [draw() for _ in range(examples(100_000))]
    assert lengths.least <= min(drawn)
    assert max(drawn) <= lengths.most
    assert fmean(drawn) == pytest.approx(cut_mean(lengths), abs=4 * pstdev(drawn) / math.sqrt(len(drawn)) + 0.02)


def test_the_paper_s_lengths_have_the_means_that_the_evaluation_states() -> None:
    for name, means in (("opt-6.7b-gsm8k", (53, 91)), ("opt-6.7b-sharegpt", (161, 338))):
        workload = load_scenario(name).workload
        assert workload.input_tokens is not None
        assert workload.output_tokens is not None
        assert (round(cut_mean(workload.input_tokens)), round(cut_mean(workload.output_tokens))) == means


def test_a_seed_says_everything_and_a_purpose_has_its_own_stream() -> None:
    base = scenario()
    calls = list(islice(arrivals(base, 1), 500))
    assert calls == list(islice(arrivals(base, 1), 500))
    assert calls != list(islice(arrivals(base, 2), 500))
    longer = list(islice(arrivals(override(base, ["workload.output_tokens.mean=200"]), 1), 500))
    assert [(call.at, call.model, call.prompt_tokens) for call in longer] == [(c.at, c.model, c.prompt_tokens) for c in calls]
    faster = list(islice(arrivals(override(base, ["workload.rate=5"]), 1), 500))
    assert [(call.prompt_tokens, call.output_tokens) for call in faster] == [(c.prompt_tokens, c.output_tokens) for c in calls]
    assert [call.at for call in faster] == pytest.approx([call.at / 10 for call in calls])


def test_an_end_is_kept_whichever_comes_first() -> None:
    base = scenario("workload.per_model=false", "workload.cv=1")
    assert len(list(arrivals(override(base, ["workload.requests=17"]), 1))) == 17
    assert all(call.at < 100 for call in arrivals(override(base, ["workload.duration_s=100"]), 1))
    assert len(list(arrivals(override(base, ["workload.requests=17", "workload.duration_s=1e9"]), 1))) == 17


def test_requests_come_as_a_stream() -> None:
    base = scenario("workload.rate=1000")
    tracemalloc.start()
    try:
        assert sum(1 for _ in islice(arrivals(base, 1), 20_000)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
