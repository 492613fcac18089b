"""Records in figures, and figures as tables: quantiles by definition, failures as the timeout, nothing lost in CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
from array import array
from collections import Counter
from random import Random

import msgspec
import pytest

from sllmctl.simulate.record import Record
from sllmctl.simulate.summary import Summary, cdf, summarise
from sllmctl.simulate.tables import COLUMNS, figures_of, seconds_text, to_csv, to_json, to_markdown


def record(startups: list[float], *, failed: tuple[int, ...] = (), seed: int = 0, policy: str = "p") -> Record:
    made = Record("s", policy, seed)
    for at, seconds in enumerate(startups):
        made.arrived_at.append(float(at))
        made.model.append(0)
        made.startup_s.append(math.nan if at in failed else seconds)
        made.first_token_s.append(math.nan if at in failed else seconds + 0.5)
        made.ended_s.append(math.nan if at in failed else seconds + 1)
        made.failed.append(at in failed)
        made.cold.append(seconds > 0)
    made.faults = Counter({"timed_out": len(failed)}) if failed else Counter()
    made.loads = Counter({"disk": 2, "dram": 1})
    made.simulated_s, made.wall_s, made.device_held_s, made.starts = 100.0, 2.0, 7200.0, 3
    return made


def test_quantiles_are_values_that_occurred() -> None:
    values = list(range(1, 101))
    Random(4).shuffle(values)
    found = summarise([record([float(value) for value in values])], 300.0)
    assert (found.startup.p50_s, found.startup.p95_s, found.startup.p99_s, found.startup.most_s) == (50, 95, 99, 100)
    assert found.startup.mean_s == pytest.approx(50.5)
    assert found.first_token.p50_s == 50.5


def test_failures_count_as_the_timeout() -> None:
    found = summarise([record([1.0, 2.0, 3.0, 4.0], failed=(1, 3))], 300.0)
    assert found.startup.mean_s == pytest.approx((1 + 3 + 600) / 4)
    assert found.first_token.most_s == 300.0
    assert (found.requests, found.failed, found.within, found.within_share) == (4, 2, 2, 0.5)
    assert found.faults == {"timed_out": 2}
    assert found.throughput_rps == pytest.approx(0.02)


def test_a_pause_may_put_a_request_beyond_the_timeout() -> None:
    found = summarise([record([1.0, 301.0])], 300.0)
    assert (found.within, found.failed) == (1, 0)


def test_seeds_are_told_together() -> None:
    found = summarise([record([1.0], seed=1), record([3.0], seed=2)], 300.0, {"workload.rate": 0.2})
    assert found.seeds == (1, 2)
    assert (found.requests, found.startup.mean_s, found.device_held_h, found.starts) == (2, 2.0, 4.0, 6)
    assert found.loads == {"disk": 4, "dram": 2}
    assert found.settings == {"workload.rate": 0.2}


def test_no_requests_are_no_error() -> None:
    found = summarise([record([])], 300.0)
    assert (found.requests, found.startup.p99_s, found.within_share) == (0, 0.0, 0.0)
    assert all(isinstance(column.cell(found), str) for column in COLUMNS)


def test_a_distribution_ends_at_its_last_value() -> None:
    random = Random(9)
    values = array("d", (random.expovariate(1.0) for _ in range(5000)))
    points = cdf(values, 100)
    assert points[-1] == (max(values), 1.0)
    assert points[0] == (min(values), 1 / 5000)
    assert len(points) <= 100
    assert points == sorted(points)
    for value, share in points:
        assert share == pytest.approx(sum(one <= value for one in values) / 5000)
    assert cdf([]) == []
    assert cdf([2.0]) == [(2.0, 1.0)]


def summaries() -> list[Summary]:
    return [
        summarise([record([1.0, 2.0], failed=(1,), policy="a")], 300.0, {"models[0].count": 64}),
        summarise([record([1.0, 0.0], policy="b")], 300.0, {"models[0].count": 128}),
    ]


def test_csv_and_json_hold_every_figure() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(summaries()))))
    assert [row["policy"] for row in rows] == ["a", "b"]
    assert rows[0]["settings.models[0].count"] == "64"
    assert rows[0]["faults.timed_out"] == "1"
    assert rows[1]["faults.timed_out"] == ""
    assert float(rows[0]["startup.mean_s"]) == pytest.approx(150.5)
    assert msgspec.json.decode(to_json(summaries()), type=list[Summary]) == summaries()


def test_what_was_varied_is_a_column() -> None:
    figures = figures_of(summaries())
    assert [figure.header for figure in figures[:3]] == ["POLICY", "COUNT", "REQUESTS"]
    assert [figures[1].cell(summary) for summary in summaries()] == ["64", "128"]


def test_a_share_is_whole_only_if_it_is() -> None:
    made = summarise([record([1.0] * 100_000, failed=(5,))], 300.0)
    assert next(figure.cell(made) for figure in COLUMNS if figure.header == "WITHIN") == "99.9 %"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.0123, "0.012"), (9.9994, "9.999"), (12.34, "12.3"), (300.0, "300.0")]
)
def test_seconds(value: float, text: str) -> None:
    assert seconds_text(value) == text


def test_markdown() -> None:
    assert to_markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"
