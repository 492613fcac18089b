"""Numbers of tokens: log-normal, cut to bounds."""

from __future__ import annotations

import math
from random import Random

from sllmctl.simulate.parts import Lengths

__all__ = ["Sampler", "cut_mean"]


def _log_parameters(lengths: Lengths) -> tuple[float, float]:
    """Mean and deviation of the logarithm, from mean and coefficient of variation of what is uncut."""
    variance = math.log1p(lengths.cv**2)
    return math.log(lengths.mean) - variance / 2, math.sqrt(variance)


class Sampler:
    """Draws lengths one by one: what falls outside the bounds becomes the bound, the rest is rounded."""

    def __init__(self, lengths: Lengths, random: Random) -> None:
        self._mu, self._sigma = _log_parameters(lengths)
        self._least, self._most = lengths.least, lengths.most
        self._random = random

    def __call__(self) -> int:
        drawn = self._random.lognormvariate(self._mu, self._sigma)
        return min(max(round(min(drawn, self._most)), self._least), self._most)


def cut_mean(lengths: Lengths) -> float:
    """The mean after the cut: weight above ``most`` moves down to it, weight below ``least`` moves up (rounding left out).

    Of a log-normal X with parameters mu and s, E[X; X < b] = mean * Phi((ln b - mu) / s - s).
    """
    mu, sigma = _log_parameters(lengths)
    if sigma == 0:
        return min(max(lengths.mean, lengths.least), lengths.most)
    low = (math.log(lengths.least) - mu) / sigma
    high = (math.log(lengths.most) - mu) / sigma
    inside = lengths.mean * (_phi(high - sigma) - _phi(low - sigma))
    return lengths.least * _phi(low) + inside + lengths.most * (1 - _phi(high))


def _phi(x: float) -> float:
    """The normal distribution's share below x."""
    return 0.5 * math.erfc(-x / math.sqrt(2))
