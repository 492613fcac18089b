"""The loop's clock: it follows the wall clock, and runs on where that is set back."""

from __future__ import annotations

import pytest

from sllmctl.control.clock import LoopClock


class Times:
    """A wall clock and a steady one; `pass_` moves both."""

    def __init__(self) -> None:
        self.wall = 1_000_000.0
        self.steady = 50.0
        self.clock = LoopClock(lambda: self.wall, lambda: self.steady)

    def pass_(self, seconds: float) -> float:
        self.wall += seconds
        self.steady += seconds
        return self.clock()


def test_it_is_the_wall_clock_while_nobody_sets_that() -> None:
    times = Times()
    for seconds in (0.0, 0.1, 30.0, 86400.0):
        assert times.pass_(seconds) == times.wall


def test_it_follows_a_clock_that_is_slowed_or_hurried() -> None:
    times = Times()
    for slew in (-0.01, 0.01):
        for _ in range(1000):
            times.wall += slew
            assert times.pass_(1.0) == pytest.approx(times.wall, abs=0.02)


def test_it_runs_on_when_the_clock_is_set_back_and_meets_it_again() -> None:
    times = Times()
    before = times.pass_(1.0)
    times.wall -= 3600.0
    assert times.pass_(10.0) == pytest.approx(before + 10.0)
    times.wall -= 3600.0
    assert times.pass_(10.0) == pytest.approx(before + 20.0)
    times.wall += 7200.0
    assert times.pass_(10.0) == pytest.approx(times.wall) == pytest.approx(before + 30.0)


def test_it_is_set_forward_with_the_clock() -> None:
    times = Times()
    times.wall += 3600.0
    assert times.pass_(1.0) == times.wall


def test_it_stands_still_for_a_small_step_back() -> None:
    times = Times()
    before = times.clock()
    times.wall -= 0.5
    assert times.pass_(0.2) == before
    assert times.pass_(0.4) == pytest.approx(before + 0.1)
