"""Tables that put published and simulated figures side by side: each figure in its place, none that is not there."""

from __future__ import annotations

import msgspec
import pytest

from sllmctl.simulate.compare import PUBLISHED, RATES, SCENARIOS, Comparison
from sllmctl.simulate.scenario import shipped_scenarios
from sllmctl.simulate.summary import Summary, summarise
from tests.sllmctl.simulate.test_summary import record


def summary(scenario: str, policy: str, seconds: float, **settings: float) -> Summary:
    made = summarise(
        [record([seconds, seconds], policy=policy)], 300.0, {key.replace("__", "."): settings[key] for key in settings}
    )
    return msgspec.structs.replace(made, scenario=scenario)


def rates(scenario: str, policy: str, seconds: float) -> list[Summary]:
    return [summary(scenario, policy, seconds * rate, workload__rate=rate) for rate in RATES]


def row(text: str, begin: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {begin} |")]
    assert lines, f"no row {begin!r} in:\n{text}"
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def test_every_published_workload_is_shipped() -> None:
    assert set(PUBLISHED) == set(SCENARIOS) <= set(shipped_scenarios())


def test_published_paper_and_ours_stand_side_by_side() -> None:
    found = Comparison([*rates("opt-30b-gsm8k", "paper", 10.0), *rates("opt-30b-gsm8k", "sllmctl", 1.0)]).markdown()
    assert row(found, "opt-30b-gsm8k") == [
        "opt-30b-gsm8k",
        "213",
        "199.2",
        "7.5",
        "2.000",
        "8.000",
        "14.0",
        "0.200",
        "0.800",
        "1.400",
    ]


def test_aims_name_the_least_favourable_workload() -> None:
    found = Comparison(
        [
            *rates("opt-6.7b-gsm8k", "shepherd", 10.0),
            *rates("opt-6.7b-gsm8k", "sllmctl", 1.0),
            *rates("opt-13b-gsm8k", "shepherd", 5.0),
            *rates("opt-13b-gsm8k", "sllmctl", 2.0),
        ]
    ).markdown()
    told = row(found, "P99 of shepherd / ours, gsm8k, at 1.4")
    assert told[1:] == ["at least 3", "10.00 (opt-6.7b-gsm8k), 2.50 (opt-13b-gsm8k)", "no"]


@pytest.mark.parametrize(("many_s", "reached"), [(0.9, "yes"), (1.1, "no")])
def test_the_number_of_models(many_s: float, reached: str) -> None:
    runs = [summary("many-models", "sllmctl", seconds) for seconds in (0.5, many_s)]
    counted = [
        msgspec.structs.replace(one, settings={"models[0].count": count}) for one, count in zip(runs, (64, 256), strict=True)
    ]
    found = Comparison(counted).markdown()
    assert row(found, "mean with 256 models / with 64")[1:] == ["at most 2", f"{many_s / 0.5:.2f}", reached]
    assert row(found, "sllmctl") == ["sllmctl", "0.500", "0.500", f"{many_s:.3f}", f"{many_s:.3f}"]


def test_what_was_not_simulated_is_left_open() -> None:
    found = Comparison(rates("opt-6.7b-gsm8k", "sllmctl", 1.0)).markdown()
    assert row(found, "opt-6.7b-gsm8k")[4:7] == ["-", "-", "-"]
    assert "by number of models" not in found
    assert Comparison([]).markdown() == ""
