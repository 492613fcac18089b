"""What the ends of attempts teach of a model's speed, and how long those who run and wait take by it. No clock of its own."""

from __future__ import annotations

from schema.link import EngineTiming

__all__ = ["Pace"]


class Pace:
    """Averages of a model's attempts in the engine, the newest weighing ``smoothing``: ``first_s`` until the first token, where
    the weights are there, ``token_s`` for each that follows. Nothing is known before an attempt of two tokens has ended."""

    __slots__ = ("_smoothing", "first_s", "known", "token_s")

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing
        self.first_s = self.token_s = 0.0
        self.known = False

    def ended(self, tokens: int, timing: EngineTiming) -> None:
        """An attempt made so many tokens in the engine's time."""
        rest_s = timing.total_s - timing.first_token_s
        if tokens < 2 or timing.first_token_s <= 0 or rest_s < 0:
            return
        token_s = rest_s / (tokens - 1)
        weight = self._smoothing if self.known else 1.0
        self.first_s += weight * (timing.first_token_s - timing.weights_s - self.first_s)
        self.token_s += weight * (token_s - self.token_s)
        self.known = True

    def service_s(self, tokens: float) -> float:
        """How long an attempt of so many tokens takes."""
        return self.first_s + self.token_s * max(0.0, tokens - 1)

    def remaining_s(self, expected_tokens: int, tokens: int, elapsed_s: float) -> float:
        """How long an attempt goes on that has made ``tokens`` of those expected; before the first came, by the time alone.

        A reply that has outgrown half of what was expected may outgrow it all, so half is always to come. While nothing is
        known, an attempt goes on for as long as it has.
        """
        if not self.known:
            return elapsed_s
        whole_s = self.service_s(expected_tokens)
        left_s = self.token_s * (expected_tokens - tokens) if tokens else whole_s - elapsed_s
        return max(left_s, whole_s / 2)

    def wait_s(self, waiting: int, running: int, expected_tokens: int, began_sum_s: float, now: float) -> float | None:
        """How long until the last of ``waiting`` has the place of one of the ``running``.

        They began ``began_sum_s / running`` on average, and their ends are taken to lie evenly between now and twice the mean
        of what is left to them; whoever gets a place keeps it for a whole service. So the cost does not grow with them.
        """
        if not waiting:
            return 0.0
        if not running or not self.known:
            return None
        whole_s = self.service_s(expected_tokens)
        left_s = min(max(whole_s - (now - began_sum_s / running), whole_s / 2), whole_s)
        rounds, place = divmod(waiting - 1, running)
        return rounds * whole_s + 2 * left_s * (place + 1) / (running + 1)
