"""The router's answers to the planner: what runs on an instance, how long it goes on, and how long others wait for it."""

from __future__ import annotations

from sllmctl.gateway.dispatcher import Dispatcher
from sllmctl.gateway.journal import Attempt

__all__ = ["LiveJournals"]


class LiveJournals:
    """`sllmctl.planner.interface.Journals` of a router as it is now. Sequences given up count for nothing: they end at once."""

    def __init__(self, core: Dispatcher) -> None:
        self._core = core

    def tokens(self, instance: str) -> list[int]:
        """Prompt and generated tokens of each sequence that runs on an instance."""
        running = self._running(instance)
        return [len(attempt.sequence.prompt) + len(attempt.sequence.tokens) for attempt in running]

    def remaining_s(self, instance: str) -> float:
        """How long an instance that takes nothing new would go on: until the last of its sequences ends."""
        now = self._core.clock()
        return max((self._remaining_s(attempt, now) for attempt in self._running(instance)), default=0.0)

    def resumed(self, instance: str) -> int:
        """How many of the sequences on an instance were lost by another before."""
        return sum(attempt.start > 0 or attempt.sequence.fruitless > 1 for attempt in self._running(instance))

    def wait_s(self, model: str) -> float | None:
        """How long until the last of those who wait for a model would run on its ready instances; None if nothing tells.

        Whoever waits does so because no instance has room, by sequences or by KV cache: so the places are those taken now.
        """
        queue = self._core.queues.get(model)
        if queue is None or not queue.waiting:
            return 0.0
        running, began_sum_s = self._core.routes.busy(model)
        expected = queue.expected_tokens(queue.waiting.first().request.params)
        return queue.pace.wait_s(len(queue.waiting), running, expected, began_sum_s, self._core.clock())

    def _running(self, instance: str) -> list[Attempt]:
        route = self._core.routes.get(instance)
        return [] if route is None else [attempt for attempt in route.attempts.values() if attempt.wanted]

    def _remaining_s(self, attempt: Attempt, now: float) -> float:
        sequence = attempt.sequence
        expected = min(attempt.kv_tokens - len(sequence.prompt), attempt.max_tokens) - attempt.start
        done = len(sequence.tokens) - attempt.start
        pace = self._core.queue(sequence.request.model).pace
        return pace.remaining_s(expected, done, now - attempt.began_at)
