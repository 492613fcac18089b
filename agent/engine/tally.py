"""What an engine has done so far, in numbers that only grow: counted once a step, read when somebody asks."""

from __future__ import annotations

from bisect import bisect_left

from agent.engine.scheduler import Plan, Scheduler
from schema.link import STEP_BOUNDS_S, EngineCounts, StepCounts

__all__ = ["Tally"]


class _Steps:
    def __init__(self) -> None:
        self._by_duration = [0] * (len(STEP_BOUNDS_S) + 1)
        self._total_s = 0.0

    def add(self, duration_s: float) -> None:
        self._by_duration[bisect_left(STEP_BOUNDS_S, duration_s)] += 1
        self._total_s += duration_s

    def counts(self) -> StepCounts:
        return StepCounts(by_duration=tuple(self._by_duration), total_s=self._total_s)


class Tally:
    """The counts of one engine; what admission and preemption did is the scheduler's to count."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._decode, self._prefill = _Steps(), _Steps()
        self._sequences = self._decode_tokens = self._prefill_tokens = 0

    def stepped(self, plan: Plan, duration_s: float) -> None:
        """A plan was computed, and that took so long."""
        (self._prefill if plan.prefills else self._decode).add(duration_s)
        self._sequences += len(plan.decodes) + len(plan.prefills)
        self._decode_tokens += len(plan.decodes)
        self._prefill_tokens += sum(size for _, size in plan.prefills)

    def counts(self) -> EngineCounts:
        return EngineCounts(
            decode=self._decode.counts(),
            prefill=self._prefill.counts(),
            sequences=self._sequences,
            decode_tokens=self._decode_tokens,
            prefill_tokens=self._prefill_tokens,
            prompt_tokens=self._scheduler.admitted_tokens,
            cached_tokens=self._scheduler.cached_tokens,
            preemptions=self._scheduler.preemptions,
        )
