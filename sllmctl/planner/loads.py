"""Loads under way, by the channels that they queue for: first come, first served; and what they took once they are over."""

from __future__ import annotations

from collections.abc import Sequence

from schema.states import Tier

__all__ = ["ChannelKey", "Loads", "Path", "Record"]

ChannelKey = tuple[str, str, int]
"""(node, channel, device); the device is 0 but on the links to devices."""

Path = Sequence[tuple[ChannelKey, float]]
"""The channels that a load runs through, with the seconds that it needs of each."""


class Record:
    """A load as it began: what was ahead of it on its path, so that its own time can be told from its wait.

    ``place``: the node and the checkpoint. ``ahead`` is None if its time tells nothing, since it shares another's load.
    ``ended_at`` is when its weights were there, known once its start was reported; ``over``: it has left its queues.
    """

    __slots__ = ("ahead", "began_at", "ended_at", "over", "place", "slowest", "source")

    def __init__(
        self, place: tuple[str, str], source: Tier, path: Path, ahead: Sequence[Record] | None, began_at: float
    ) -> None:
        self.place = place
        self.source = source
        self.slowest = max(path, key=lambda part: part[1])[0][:2] if path else None
        self.ahead = ahead
        self.began_at = began_at
        self.ended_at: float | None = None
        self.over = False

    def alone_s(self, load_s: float) -> float:
        """How long it took, from when the last one ahead was through; 0 if that cannot be said.

        One ahead that was held up by another channel let it run beside itself; one of which no end is known may have been
        given up at any time.
        """
        self.ended_at = self.began_at + load_s
        ahead, self.ahead = self.ahead, None
        if ahead is None:
            return 0.0
        since = self.began_at
        for other in ahead:
            if other.ended_at is None or other.slowest != self.slowest:
                return 0.0
            since = max(since, other.ended_at)
        return max(0.0, self.ended_at - since)

    def close(self) -> None:
        """It has left its queues. What was over before it is let go of, so that no chain of records grows."""
        self.over = True
        for other in self.ahead or ():
            if other.over:
                other.ahead = None


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

    def begin(self, load: str, parts: Path, now: float) -> None:
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

    def last(self, key: ChannelKey) -> str | None:
        """The load at the end of the queue: when it is through, so are all before it."""
        queue = self._queues.get(key)
        return None if queue is None else next(reversed(queue.loads))

    def wait_s(self, key: ChannelKey, now: float) -> float:
        queue = self._queues.get(key)
        return 0.0 if queue is None else queue.wait_s(now)

    @property
    def none(self) -> bool:
        return not self._queues
