"""Virtual time: events in order of time, then of asking; and the control loop driven by them, one step after another."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence

from sllmctl.cluster.changes import RowChange
from sllmctl.control.effects import Effect, Step, WakeAt
from sllmctl.control.events import Event, Tick
from sllmctl.control.loop import ControlLoop

__all__ = ["Kernel", "LoopRunner", "Timer"]

_COMPACT_AT = 4096
"""So many cancelled events may lie in the heap before it is looked at whether they are most of it."""


class Timer:
    """A call that is due at a time, until it was made or cancelled. The router takes it for an event loop's handle."""

    __slots__ = ("_kernel", "call")

    def __init__(self, kernel: Kernel, call: Callable[[], None]) -> None:
        self._kernel = kernel
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        if self.call is not None:
            self.call = None
            self._kernel.dropped()


class Kernel:
    """``now`` is in seconds since the beginning. `soon` is for what follows at the same time, in the order of asking."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._order = 0
        self._heap: list[tuple[float, int, Timer]] = []
        self._soon: deque[Callable[[], None]] = deque()
        self._dropped = 0

    def clock(self) -> float:
        return self.now

    def soon(self, call: Callable[[], None]) -> None:
        self._soon.append(call)

    def at(self, time: float, call: Callable[[], None]) -> Timer:
        """Call at a time; at once if it has passed."""
        timer = Timer(self, call)
        self._order += 1
        heapq.heappush(self._heap, (time, self._order, timer))
        return timer

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        return self.at(self.now + delay_s, call)

    def dropped(self) -> None:
        """A timer was cancelled. When most of the heap is cancelled, it is made anew."""
        self._dropped += 1
        if self._dropped > _COMPACT_AT and self._dropped * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].call is not None]
            heapq.heapify(self._heap)
            self._dropped = 0

    def run(self, until: Callable[[], bool]) -> None:
        """Make the calls in their order until ``until``, asked whenever time would go on, or nothing is left."""
        soon = self._soon
        while True:
            while soon:
                self.events += 1
                soon.popleft()()
            if until() or not self._heap:
                return
            time, _, timer = heapq.heappop(self._heap)
            call = timer.call
            if call is None:
                self._dropped -= 1
                continue
            if time > self.now:
                self.now = time
            timer.call = None
            self.events += 1
            call()


class LoopRunner:
    """Drives the control loop as sllmctl.control.runner does, in virtual time: what was posted is taken in at the same
    instant, all of it before any effect; a commit takes no time, and its rows go to ``rows``."""

    def __init__(
        self, loop: ControlLoop, kernel: Kernel, perform: Callable[[Effect], None], rows: Callable[[Sequence[RowChange]], None]
    ) -> None:
        self._loop = loop
        self._kernel = kernel
        self._perform = perform
        self._rows = rows
        self._queue: list[Event] = []
        self._asked = False
        self._wake: Timer | None = None

    def begin(self) -> None:
        self._carry_out([self._loop.begin(self._kernel.now)])

    def post(self, event: Event) -> None:
        """Hand an event to the loop, which hears it after the present call."""
        self._queue.append(event)
        if not self._asked:
            self._asked = True
            self._kernel.soon(self._take)

    def _take(self) -> None:
        self._asked = False
        events, self._queue = self._queue, []
        step, now = self._loop.step, self._kernel.now
        self._carry_out([step(event, now) for event in events])

    def _tick(self) -> None:
        self._wake = None
        self._carry_out([self._loop.step(Tick(), self._kernel.now)])

    def _carry_out(self, steps: list[Step]) -> None:
        for step in steps:
            if step.changes:
                self._rows(step.changes)
        for step in steps:
            for effect in step.effects:
                if type(effect) is WakeAt:
                    if self._wake is not None:
                        self._wake.cancel()
                    self._wake = self._kernel.at(effect.at, self._tick)
                else:
                    self._perform(effect)
