"""Channels that loads share: a network, a disk, the link to a device; and when a load that runs through several is done.

A load is a stream of small chunks through all channels of its path at once, without barriers. Where two loads meet, the one
that began earlier goes first and the later one takes what is left of the channel (first come, first served, in the limit of
small chunks). So the end of a load is known when it begins, and later loads never move it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

__all__ = ["Channel", "transfer"]

_LEAST_SHARE = 1e-9
"""Of a channel; less than this counts as none, so that rounding never makes a load creep."""


class Channel:
    """``free[i]`` of the channel, a share from 0 to 1, is free from ``times[i]`` until the next of them."""

    __slots__ = ("bps", "free", "times")

    def __init__(self, bps: float) -> None:
        self.bps = bps
        self.times = [0.0]
        self.free = [1.0]

    def forget(self, now: float) -> None:
        """Drop what lies before ``now``."""
        past = bisect_right(self.times, now) - 1
        if past > 0:
            del self.times[:past], self.free[:past]

    def take(self, begin: float, end: float, share: float) -> None:
        """Promise a share of it from ``begin`` until ``end``."""
        first, last = self._cut(begin), self._cut(end)
        for place in range(first, last):
            left = self.free[place] - share
            self.free[place] = left if left > _LEAST_SHARE else 0.0

    def _cut(self, time: float) -> int:
        """The place of the stretch that begins at ``time``, made if there is none."""
        place = bisect_right(self.times, time) - 1
        if self.times[place] == time:
            return place
        self.times.insert(place + 1, time)
        self.free.insert(place + 1, self.free[place])
        return place + 1


def transfer(path: Sequence[tuple[Channel, float]], now: float) -> float:
    """When a load that begins now is through; ``path`` is its channels, each with its bytes there. Takes what it needs."""
    works = [(channel, size / channel.bps) for channel, size in path if size > 0]
    for channel, _ in works:
        channel.forget(now)
    left, time = 1.0, now
    while left > 0 and works:
        rate, until = float("inf"), float("inf")
        for channel, seconds in works:
            place = bisect_right(channel.times, time) - 1
            rate = min(rate, channel.free[place] / seconds)
            if place + 1 < len(channel.times):
                until = min(until, channel.times[place + 1])
        if rate > 0:
            end = time + left / rate
            if end <= until:
                left, until = 0.0, end
            else:
                left -= (until - time) * rate
            for channel, seconds in works:
                channel.take(time, until, rate * seconds)
        time = until
    return time
