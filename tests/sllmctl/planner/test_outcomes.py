"""The distribution of the estimates' errors."""

from __future__ import annotations

import pytest

from schema.admin import OutcomeView
from sllmctl.planner.outcomes import summarise


def outcome(kind: str, source: str, estimated_s: float, actual_s: float) -> OutcomeView:
    return OutcomeView(at=0.0, kind=kind, model="m", node="n", source=source, estimated_s=estimated_s, actual_s=actual_s)


def test_errors_are_told_by_kind_and_source() -> None:
    starts = [outcome("start", "disk", 1.0, 1.0 + error / 100) for error in range(-50, 50)]
    found = summarise([outcome("start", "dram", 1.0, 3.0), *starts, outcome("prefill", "", 2.0, 1.0)])
    prefill, disk, dram = found
    assert (disk.source, disk.count) == ("disk", 100)
    assert disk.bias_s == pytest.approx(-0.005)
    assert (disk.p50_s, disk.p90_s, disk.p99_s) == pytest.approx((0.25, 0.45, 0.49))
    assert (dram.source, dram.count, dram.bias_s, dram.p99_s, dram.median_actual_s) == ("dram", 1, 2.0, 2.0, 3.0)
    assert (prefill.kind, prefill.bias_s, prefill.p50_s) == ("prefill", -1.0, 1.0)


def test_no_outcomes_are_no_errors() -> None:
    assert summarise([]) == ()
