"""One instance's engine: continuous batching within its KV memory, computed from one change of the batch to the next.

The engine does one thing at a time. At the end of each step it looks at its line: the first in it that has room is prefilled
whole, while those that decode stand still; if none has, all that run compute one token more. The first token of a sequence
comes of its prefill. Room, as in agent.engine.scheduler: its tokens, and a block for each that runs already. When the memory
is full all the same, the newest gives its own back and waits again, first in line.

Between two changes nothing is computed: steps of one batch get longer by an equal amount each, so their times have a closed
form. Busy engines share their devices: an engine runs at 1/n of its speed once those that are busy on the fullest of its
devices would keep n of them busy.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

from schema.ids import Epoch
from schema.states import EndReason
from sllmctl.simulate.kernel import Kernel, Timer
from sllmctl.simulate.scenario import Speed

__all__ = ["BLOCK_TOKENS", "Compute", "Engine", "Job", "Listener"]

BLOCK_TOKENS = 16
"""Tokens whose keys and values one block holds, as in agent.engine.blocks."""


class Job:
    """One attempt of a sequence, or KV memory that is prefilled ahead for one that comes (``warmed`` hears when that is done).

    ``key`` names the sequence over all its attempts. ``made`` tokens are generated when ``joined`` steps are done, those
    of earlier attempts included, ``said`` of them delivered; it ends with ``output``. ``held``: tokens whose KV was there.
    """

    __slots__ = (
        "attempt", "cancelled", "first_at", "held", "joined", "key", "made", "output", "prefill_at", "prompt", "said",
        "started", "submitted_at", "warmed",
    )  # fmt: skip

    def __init__(
        self,
        attempt: Epoch,
        key: str,
        prompt: int,
        made: int,
        output: int,
        now: float,
        warmed: Callable[[], None] | None = None,
    ) -> None:
        self.attempt = attempt
        self.key = key
        self.prompt = prompt
        self.made = self.said = self.started = made
        self.output = output
        self.submitted_at = now
        self.prefill_at = self.first_at = -1.0
        self.joined = 0
        self.held = 0
        self.cancelled = False
        self.warmed = warmed


class Listener(Protocol):
    """Whose engine it is."""

    def first_token(self, job: Job) -> None:
        """An attempt has made its first token."""

    def ended(self, engine: Engine, ends: list[tuple[Job, EndReason]]) -> None:
        """These have ended, all at once; it may submit to the engine before it returns."""


class Compute:
    """The processor of one device, shared by the engines that are busy on it; they could use ``wanted`` such processors."""

    __slots__ = ("_since", "busy", "busy_s", "kernel", "wanted")

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.busy: dict[Engine, None] = {}
        self.wanted = 0.0
        self.busy_s = 0.0
        self._since = 0.0

    def enter(self, engine: Engine) -> None:
        if not self.busy:
            self._since = self.kernel.now
        self.busy[engine] = None
        self._retime(engine)

    def leave(self, engine: Engine) -> None:
        del self.busy[engine]
        if not self.busy:
            self.busy_s += self.kernel.now - self._since
        self._retime()

    def _retime(self, but: Engine | None = None) -> None:
        self.wanted = sum(engine.occupancy for engine in self.busy)
        for engine in self.busy:
            if engine is not but:
                engine.retime()

    def settle(self) -> None:
        """Count the time of those that are busy still."""
        if self.busy:
            self.busy_s += self.kernel.now - self._since
            self._since = self.kernel.now


class Engine:
    """``tokens`` of KV memory are taken by those that run or are being prefilled, ``kept`` by what was prefilled ahead, which
    is in ``held`` by key; ``step`` steps were done when the present stretch began.

    Time within it is ``work``, in seconds as if it had its devices alone.
    """

    def __init__(
        self,
        kernel: Kernel,
        devices: tuple[Compute, ...],
        speed: Speed,
        capacity_tokens: int,
        max_concurrency: int,
        listener: Listener,
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.waiting: deque[Job] = deque()
        self.running: dict[Job, None] = {}
        self.prefilling: Job | None = None
        self.held: dict[str, int] = {}
        self.tokens = self.kept = 0
        self.step = 0
        self._kernel = kernel
        self._devices = devices
        self._speed = speed
        self._concurrency = max_concurrency
        self._listener = listener
        self._ends: list[tuple[int, int, Job]] = []
        self._order = 0
        self._work = self._began = self._goal = 0.0
        self._steps = 0
        self._at = 0.0
        self._rate = 1.0
        self._timer: Timer | None = None
        self._busy = self._settling = self._cancels = False

    # --- what is asked of it ---

    def submit(self, job: Job) -> None:
        self.waiting.append(job)
        self._look()

    def warm(self, key: str, tokens: int, warmed: Callable[[], None]) -> None:
        """Prefill so many tokens of a sequence that is to come, those that are here already left out."""
        self.submit(Job(Epoch(0), key, tokens, 0, 0, self._kernel.now, warmed))

    def forget(self, key: str) -> None:
        """A sequence that was prefilled ahead does not come."""
        self.kept -= self.held.pop(key, 0)
        for job in [job for job in self.waiting if job.warmed is not None and job.key == key]:
            self.waiting.remove(job)
        self._look()

    def cancel(self, attempt: Epoch) -> None:
        """End an attempt: at once if it waits, else with the present step. An unknown one is passed over."""
        for job in self.waiting:
            if job.attempt == attempt:
                self.waiting.remove(job)
                self._listener.ended(self, [(job, EndReason.CANCELLED)])
                self._look()
                return
        for job in (*self.running, *((self.prefilling,) if self.prefilling is not None else ())):
            if job.attempt == attempt:
                job.cancelled = self._cancels = True
                self._cut()
                return

    def advance(self) -> list[Job]:
        """All attempts it has, with what they have made by now."""
        if self._busy and self.prefilling is None:
            self._sync()
            self._count(self._done())
        for job in self.running:
            job.made += self.step - job.joined
            job.joined = self.step
        jobs = [*self.running, *((self.prefilling,) if self.prefilling is not None else ()), *self.waiting]
        return [job for job in jobs if job.warmed is None]

    def close(self) -> list[Job]:
        """Stop for good; returns all attempts, with what they have made."""
        jobs = self.advance()
        self.waiting.clear()
        self.running.clear()
        self._ends.clear()
        self.held.clear()
        self.prefilling = None
        self.tokens = self.kept = 0
        self._rest()
        return jobs

    @property
    def occupancy(self) -> float:
        """The part of its devices that it keeps busy when alone."""
        return self._speed.occupancy

    @property
    def empty(self) -> bool:
        """It has no attempt."""
        return (
            not self.running
            and (self.prefilling is None or self.prefilling.warmed is not None)
            and all(job.warmed is not None for job in self.waiting)
        )

    def retime(self) -> None:
        """Another engine on its devices became busy or idle."""
        if not self._busy:
            return
        self._sync()
        self._rate = self._share()
        self._set_timer()

    # --- the batch ---

    def _look(self) -> None:
        """Something may have changed for those who wait."""
        if self._settling:
            return
        if not self._busy:
            self._next()
        elif self.prefilling is None and self._fits():
            self._cut()

    def _fits(self) -> bool:
        """The first in line could be prefilled now."""
        if not self.waiting or len(self.running) >= self._concurrency:
            return False
        job = self.waiting[0]
        need = job.prompt + job.made - self.held.get(job.key, 0)
        if not self.running:
            # Whoever is alone may have all of it; what is only prefilled ahead makes way.
            self._make_way(need, job.key)
            return True
        return self.tokens + self.kept + need + BLOCK_TOKENS * len(self.running) <= self.capacity_tokens

    def _make_way(self, tokens: int, own: str) -> None:
        """Give up what was prefilled ahead, but for one sequence's, until there is room for so many more."""
        for key in [key for key in self.held if key != own]:
            if self.tokens + self.kept + tokens <= self.capacity_tokens:
                return
            self.kept -= self.held.pop(key)

    def _next(self) -> None:
        """At the end of a step: what comes now."""
        if self._fits():
            self._prefill(self.waiting.popleft())
        elif self.running:
            self._decode()
        else:
            self._rest()

    def _prefill(self, job: Job) -> None:
        job.held = self.held.pop(job.key, 0)
        self.kept -= job.held
        self.tokens += job.prompt + job.made
        fresh = max(job.prompt + job.made - job.held, 1)
        if job.prefill_at < 0:
            job.prefill_at = self._kernel.now
        self.prefilling = job
        self._begin(self._speed.prefill_base_s + fresh * self._speed.prefill_token_s)

    def _decode(self) -> None:
        """As many steps as nothing changes in."""
        count = len(self.running)
        ends = self._ends
        while not self._ends_at(*ends[0]):
            heapq.heappop(ends)
        room = self.capacity_tokens - self.tokens - self.kept
        self._steps = min(ends[0][0] - self.step, max(room // count + 1, 0))
        self._begin(self._span(self._steps))

    def _ends_at(self, step: int, _order: int, job: Job) -> bool:
        """False for an entry of a sequence that has ended or was put off since."""
        return job in self.running and job.joined + job.output - job.made == step

    def _span(self, steps: int) -> float:
        """The work of so many steps from the beginning of this stretch: each holds a token more of every sequence."""
        speed, count = self._speed, len(self.running)
        each = speed.decode_step_s + count * speed.decode_sequence_s
        return steps * each + speed.decode_token_s * (steps * self.tokens + count * (steps * (steps - 1) // 2))

    def _done(self) -> int:
        """How many steps of this stretch are done by now."""
        x = self._work - self._began
        speed, count = self._speed, len(self.running)
        a = speed.decode_token_s * count / 2
        b = speed.decode_step_s + count * speed.decode_sequence_s + speed.decode_token_s * self.tokens - a
        steps = int(x / b) if a == 0 else int((math.sqrt(b * b + 4 * a * x) - b) / (2 * a))
        steps = min(max(steps, 0), self._steps)
        slack = 1e-12 * (1.0 + x)
        while steps < self._steps and self._span(steps + 1) <= x + slack:
            steps += 1
        while steps and self._span(steps) > x + slack:
            steps -= 1
        return steps

    def _count(self, steps: int) -> None:
        """So many steps of this stretch are done: it begins anew after them."""
        if not steps:
            return
        self._began += self._span(steps)
        self._steps -= steps
        self.step += steps
        self.tokens += steps * len(self.running)

    def _cut(self) -> None:
        """Look again at the end of the present step."""
        if self.prefilling is not None or not self._busy:
            return
        self._sync()
        steps = min(self._done() + 1, self._steps)
        if steps < self._steps:
            self._steps = steps
            self._goal = self._began + self._span(steps)
            self._set_timer()

    def _reached(self) -> None:
        """The present stretch is over."""
        self._timer = None
        self._work, self._at = self._goal, self._kernel.now
        self._settling = True
        ends = self._prefilled() if self.prefilling is not None else self._decoded()
        if ends:
            self._listener.ended(self, ends)
        self._settling = False
        if self._busy:
            self._next()

    def _prefilled(self) -> list[tuple[Job, EndReason]]:
        job = self.prefilling
        assert job is not None
        self.prefilling = None
        if job.warmed is not None:
            self.tokens -= job.prompt
            self.kept += job.prompt
            self.held[job.key] = job.prompt
            job.warmed()
            return []
        job.made += 1
        self.tokens += 1
        if job.first_at < 0:
            job.first_at = self._kernel.now
            self._listener.first_token(job)
        if job.cancelled or job.made >= job.output:
            self.tokens -= job.prompt + job.made
            return [(job, EndReason.STOP if job.made >= job.output else EndReason.CANCELLED)]
        job.joined = self.step
        self.running[job] = None
        self._order += 1
        heapq.heappush(self._ends, (self.step + job.output - job.made, self._order, job))
        return []

    def _decoded(self) -> list[tuple[Job, EndReason]]:
        self.step += self._steps
        self.tokens += self._steps * len(self.running)
        ends: list[tuple[Job, EndReason]] = []
        heap = self._ends
        while heap and heap[0][0] <= self.step:
            entry = heapq.heappop(heap)
            if self._ends_at(*entry):
                self._remove(entry[2])
                ends.append((entry[2], EndReason.STOP))
        if self._cancels:
            self._cancels = False
            for job in [job for job in self.running if job.cancelled]:
                self._remove(job)
                ends.append((job, EndReason.CANCELLED))
        if self.held:
            self._make_way(0, "")
        while self.tokens > self.capacity_tokens and self.running:
            newest = next(reversed(self.running))
            self._remove(newest)
            if self.running:
                self.waiting.appendleft(newest)
            else:
                ends.append((newest, EndReason.LENGTH))
        return ends

    def _remove(self, job: Job) -> None:
        job.made += self.step - job.joined
        job.joined = self.step
        del self.running[job]
        self.tokens -= job.prompt + job.made

    # --- its clock ---

    def _share(self) -> float:
        """Its speed beside the others, of what it has alone."""
        return 1.0 / max(1.0, *(device.wanted for device in self._devices))

    def _begin(self, work: float) -> None:
        """A stretch of so much work."""
        if not self._busy:
            self._busy = True
            self._work = 0.0
            self._at = self._kernel.now
            for device in self._devices:
                device.enter(self)
            self._rate = self._share()
        self._began = self._work
        self._goal = self._work + work
        self._set_timer()

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._busy:
            self._busy = False
            for device in self._devices:
                device.leave(self)

    def _sync(self) -> None:
        now = self._kernel.now
        self._work = min(self._work + (now - self._at) * self._rate, self._goal)
        self._at = now

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._kernel.at(self._at + (self._goal - self._work) / self._rate, self._reached)
