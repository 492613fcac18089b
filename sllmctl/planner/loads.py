"""Loads under way, by the channels that they queue for: first come, first served."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Loads"]

ChannelKey = tuple[str, str, int]
"""(node, channel, device); the device is 0 but on the links to devices."""


class _Queue:
    """The loads on one channel by their seconds of it, in order; the first has had it since ``head_since``."""

    __slots__ = ("head_s", "head_since", "loads", "rest_s")

    def __init__(self) -> None:
        self.loads: dict[str, float] = {}
        self.head_since = 0.0
        self.head_s = 0.0
        self.rest_s = 0.0

    def add(self, load: str, seconds: float, now: float) -> None:
        if self.loads:
            self.rest_s += seconds
        else:
            self.head_since, self.head_s = now, seconds
        self.loads[load] = seconds

    def remove(self, load: str, now: float) -> None:
        first = next(iter(self.loads))
        seconds = self.loads.pop(load)
        if not self.loads:
            self.rest_s = 0.0
        elif load == first:
            self.head_since, self.head_s = now, next(iter(self.loads.values()))
            self.rest_s = max(0.0, self.rest_s - self.head_s)
        else:
            self.rest_s = max(0.0, self.rest_s - seconds)

    def wait_s(self, now: float) -> float:
        """One that is overdue is about to end; how long that will take, nobody knows."""
        return max(0.0, self.head_since + self.head_s - now) + self.rest_s


class Loads:
    """The queues of all channels. Holds no clock."""

    def __init__(self) -> None:
        self._queues: dict[ChannelKey, _Queue] = {}
        self._of: dict[str, list[ChannelKey]] = {}

    def begin(self, load: str, parts: Sequence[tuple[ChannelKey, float]], now: float) -> None:
        """``parts``: each channel on its path, with the seconds that it needs of it."""
        self.end(load, now)
        self._of[load] = [key for key, _ in parts]
        for key, seconds in parts:
            queue = self._queues.get(key)
            if queue is None:
                queue = self._queues[key] = _Queue()
            queue.add(load, seconds, now)

    def end(self, load: str, now: float) -> None:
        for key in self._of.pop(load, ()):
            queue = self._queues[key]
            queue.remove(load, now)
            if not queue.loads:
                del self._queues[key]

    def wait_s(self, key: ChannelKey, now: float) -> float:
        queue = self._queues.get(key)
        return 0.0 if queue is None else queue.wait_s(now)

    @property
    def none(self) -> bool:
        return not self._queues
