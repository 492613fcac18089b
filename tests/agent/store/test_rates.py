"""Rates of loads under way, by a clock of their own."""

from __future__ import annotations

from agent.store.rates import Rates


def test_a_rate_is_that_of_the_last_step() -> None:
    rates = Rates()
    assert rates.step("a", 0, 10.0) == 0.0
    assert rates.step("a", 100, 10.5) == 200.0
    assert rates.step("b", 5, 10.5) == 0.0
    assert rates.step("a", 100, 10.5) == 200.0
    assert rates.step("a", 110, 11.5) == 10.0
    rates.end("a")
    assert rates.step("a", 0, 12.0) == 0.0
    assert rates.step("b", 15, 12.5) == 5.0
