"""The control loop's time: the wall clock's, but it is not set back, since what waits for a time would wait for longer."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["LoopClock"]

_SLACK_S = 1.0
"""A clock that goes back by less stands still instead."""


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LoopClock:
    """Unix seconds that never go back. After the wall clock was set back they run on, ahead of it, until it is set forward
    again or the manager is started anew. ``steady`` counts seconds from anywhere, and nobody sets it."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = _since_boot) -> None:
        self._wall = wall
        self._steady = steady
        self._ahead_s = 0.0
        self._last = wall()
        self._last_steady = steady()

    def __call__(self) -> float:
        wall, steady = self._wall(), self._steady()
        expected = self._last + steady - self._last_steady
        if abs(wall + self._ahead_s - expected) > _SLACK_S:
            self._ahead_s = max(0.0, expected - wall)
        self._last, self._last_steady = max(self._last, wall + self._ahead_s), steady
        return self._last
