from __future__ import annotations

from schema.pauses import growing_pause_s


def test_pauses_double_up_to_the_longest_however_long_that_goes_on() -> None:
    assert [growing_pause_s(0.5, 5.0, pauses) for pauses in range(6)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert growing_pause_s(1.0, 1800.0, 10**6) == 1800.0
