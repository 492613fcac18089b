"""Drives the control loop for real: a queue of events, group commits, effects in order, wake-ups, and answers to operators."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from schema.errors import SllmError, TimedOut, Unreachable
from sllmctl.cluster.changes import RowChange
from sllmctl.control.effects import Effect, Effects, Reply, Step, WakeAt
from sllmctl.control.events import Event, Tick
from sllmctl.control.loop import ControlLoop

__all__ = ["Runner"]

_LONGEST_SLEEP_S = 30.0
"""The wall clock may be set forward while we sleep on the monotonic one; so a long wait is cut and looked at again."""


class Runner:
    """Owner of the loop. Events that arrive while a commit is in flight share the next one. ``clock`` is Unix seconds.

    ``post`` and ``ask`` are called from the event loop's thread. When a commit fails, `run` raises: a manager must not act
    on intent that it may forget.
    """

    def __init__(self, loop: ControlLoop, effects: Effects, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._effects = effects
        self._clock = clock
        self._queue: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._wake_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._asks: dict[int, asyncio.Future[Any]] = {}
        self._tickets = 0
        self._running = False
        self._stopping = False
        self._ended = asyncio.Event()
        self._why: SllmError = Unreachable("the manager is stopping; try again when it serves")

    @property
    def why(self) -> SllmError:
        """What whoever asks is told, once it is ending."""
        return self._why

    def post(self, event: Event) -> None:
        """Hand an event to the loop; never waits. After the end of `run` nothing hears it any more."""
        self._queue.append(event)
        self._arrived.set()

    async def ask(self, make: Callable[[int], Event]) -> Any:
        """Post the event made for a new ticket and wait until it is answered, durably; returns what the answer tells.

        Raises its fault as SllmError, TimedOut after ``reply_timeout_s``, Unreachable when the manager is ending, or what made
        it end.
        """
        if self._stopping or self._ended.is_set():
            raise self._why
        self._tickets += 1
        ticket = self._tickets
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asks[ticket] = answer
        limit_s = self._loop.settings.reply_timeout_s
        try:
            self.post(make(ticket))
            return await asyncio.wait_for(answer, limit_s)
        except TimeoutError:
            raise TimedOut(f"the control loop did not answer within reply_timeout_s, {limit_s:g} s") from None
        finally:
            del self._asks[ticket]

    async def run(self) -> None:
        """Begin, then carry out steps until `stop`. Raises what a commit or a step raised; then nothing of it was acted on."""
        self._running = True
        try:
            await self._carry_out([self._loop.begin(self._clock())])
            while not (self._stopping and not self._queue):
                await self._arrived.wait()
                self._arrived.clear()
                await self._carry_out(self._take_steps())
        except Exception as error:
            # What the operator can mend, such as a full disk, is told as what it is.
            failure = f"the manager is ending after a failure: {error}"
            self._why = error if isinstance(error, SllmError) else SllmError(failure)
            raise
        finally:
            self._ended.set()
            if self._timer is not None:
                self._timer.cancel()
            for answer in self._asks.values():
                if not answer.done():
                    answer.set_exception(self._why)

    async def stop(self) -> None:
        """Let the loop take in what was posted, and return when `run` has ended; without a `run` it returns at once."""
        self._stopping = True
        self._arrived.set()
        if self._running:
            await self._ended.wait()

    def _take_steps(self) -> list[Step]:
        steps: list[Step] = []
        while self._queue:
            steps.append(self._loop.step(self._queue.popleft(), self._clock()))
        if self._wake_at is not None and self._clock() >= self._wake_at:
            self._wake_at = None
            steps.append(self._loop.step(Tick(), self._clock()))
        return steps

    async def _carry_out(self, steps: list[Step]) -> None:
        changes: list[RowChange] = [change for step in steps for change in step.changes]
        if changes:
            await self._effects.commit(changes)
        for step in steps:
            for effect in step.effects:
                self._perform(effect)
        self._set_timer()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Reply(ticket, fault, result):
                answer = self._asks.get(ticket)
                if answer is None or answer.done():
                    return
                if fault is None:
                    answer.set_result(result)
                else:
                    answer.set_exception(fault.to_error())
            case WakeAt(at):
                self._wake_at = at
            case _:
                self._effects.perform(effect)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._wake_at is not None:
            delay_s = min(max(0.0, self._wake_at - self._clock()), _LONGEST_SLEEP_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._arrived.set)
