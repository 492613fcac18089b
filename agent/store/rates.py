"""How fast each load under way is just now."""

from __future__ import annotations

__all__ = ["Rates"]


class Rates:
    """Bytes per second between the steps of each op."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[float, int, float]] = {}

    def step(self, op: str, done_bytes: int, now: float) -> float:
        """The rate since the op's step before; its last known one where no time or no byte has passed, 0 at its first."""
        at, before, bps = self._steps.get(op, (now, done_bytes, 0.0))
        if now > at and done_bytes > before:
            bps = (done_bytes - before) / (now - at)
        self._steps[op] = (now, done_bytes, bps)
        return bps

    def end(self, op: str) -> None:
        """The op is answered."""
        self._steps.pop(op, None)
