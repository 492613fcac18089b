"""Numbers learned from observations so that one outlier moves nothing: medians of small windows, and robust lines.

A `Window` begins with two copies of what is assumed; its value is the median of its latest samples, so that a single odd
observation is outvoted, and three in a row are believed. A `Line` is fitted by the median of the slopes of all pairs
(Theil 1950, Sen 1968), which up to 29 % of arbitrary observations cannot move without bound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

__all__ = ["Line", "Window"]

_WINDOW = 5
_ASSUMED = 2
_POINTS = 16
_LEAST_POINTS = 3
_LEAST_SPREAD_TOKENS = 16


class Window:
    """The median of the latest observations; ``value`` is kept, since it is read far more often than it changes."""

    __slots__ = ("_samples", "value")

    def __init__(self, samples: Sequence[float]) -> None:
        self._samples: deque[float] = deque(samples, _WINDOW)
        self.value = median(self._samples)

    @classmethod
    def assumed(cls, value: float) -> Window:
        return cls((value,) * _ASSUMED)

    def add(self, sample: float) -> None:
        self._samples.append(sample)
        self.value = median(self._samples)

    @property
    def samples(self) -> tuple[float, ...]:
        return tuple(self._samples)


class Line:
    """``seconds = slope * tokens + base`` through the latest observations, slope above 0 and base not below it."""

    __slots__ = ("_points", "base", "slope")

    def __init__(self, slope: float, base: float, points: Sequence[tuple[float, float]] = ()) -> None:
        self.slope = slope
        self.base = base
        self._points: deque[tuple[float, float]] = deque(points, _POINTS)
        self._fit()

    def add(self, tokens: float, seconds: float) -> None:
        self._points.append((tokens, seconds))
        self._fit()

    def at(self, tokens: float) -> float:
        return self.slope * tokens + self.base

    @property
    def samples(self) -> tuple[float, ...]:
        """The points one after the other, tokens before seconds."""
        return tuple(value for point in self._points for value in point)

    def _fit(self) -> None:
        points = list(self._points)
        if len(points) < _LEAST_POINTS:
            return
        slopes = [
            (seconds - before) / (tokens - earlier)
            for place, (tokens, seconds) in enumerate(points)
            for earlier, before in points[:place]
            if abs(tokens - earlier) >= _LEAST_SPREAD_TOKENS
        ]
        # Sequences of one length say nothing of the slope; then only the level follows them.
        if len(slopes) >= _LEAST_POINTS and (slope := median(slopes)) > 0:
            self.slope = slope
        self.base = max(0.0, median(seconds - self.slope * tokens for tokens, seconds in points))
