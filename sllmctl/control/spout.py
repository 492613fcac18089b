"""A bound on events of one kind: a burst of them, and then one now and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["Spout"]

_BURST: Final = 20
_EVERY_S: Final = 10.0


@dataclass(slots=True)
class Spout:
    """``left``: how many may be written at once, as counted ``at`` some time. ``withheld``: how many were not since one was."""

    at: float
    left: float = _BURST
    withheld: int = 0

    def opens(self, now: float) -> bool:
        self.left, self.at = min(_BURST, self.left + max(0.0, now - self.at) / _EVERY_S), now
        if self.left < 1:
            self.withheld += 1
            return False
        self.left -= 1
        return True
