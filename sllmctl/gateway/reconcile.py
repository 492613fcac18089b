"""One node's connection as the router sees it: what its truth is compared with, and what is to be acknowledged."""

from __future__ import annotations

from typing import Final

from schema.ids import Epoch, generation_of
from schema.link import TOKEN_WINDOW_FRAMES, Acked, AttemptTruth
from schema.states import EndReason

__all__ = ["REPLIES", "NodeLink"]

_ACK_EVERY_FRAMES: Final = TOKEN_WINDOW_FRAMES // 8
"""Credit is given back in parts of the window: often enough that it never runs out, seldom enough to cost nothing."""


REPLIES: Final = (EndReason.STOP, EndReason.LENGTH)
"""Ends of sequences that have their whole reply."""


def _adoptable(truth: AttemptTruth) -> bool:
    return truth.end is None or (truth.submit.retry is not None and truth.end.reason in REPLIES)


class NodeLink:
    """``count`` numbers the connections; ``first`` is True until a truth of this node was taken in whole."""

    def __init__(self) -> None:
        self.count = 0
        self.first = True
        self.seen: set[Epoch] = set()
        self.ends: list[Epoch] = []
        self.frame = 0
        self._acked = 0
        self._cancels: list[Epoch] = []
        self._orphans: dict[tuple[str, int], AttemptTruth] = {}

    def begin(self) -> None:
        """A new connection states its truth; nothing of the old one counts."""
        self.count += 1
        self.lost()

    def lost(self) -> None:
        """What was not acknowledged is stated again by the next truth."""
        self.seen.clear()
        self.ends.clear()
        self._cancels.clear()
        self._orphans.clear()
        self.frame = self._acked = 0

    def unknown(self, truth: AttemptTruth, generation: int) -> None:
        """Sort an attempt that the router does not know: in the first truth the highest one of an older generation is kept for
        adoption, if it is live or a retry may come for its reply; any other is refused."""
        key = (truth.submit.request, truth.submit.choice)
        other = self._orphans.get(key)
        adoptable = self.first and generation_of(truth.submit.attempt) < generation and _adoptable(truth)
        if not adoptable or (other is not None and other.submit.attempt > truth.submit.attempt):
            self.refuse(truth)
        else:
            if other is not None:
                self.refuse(other)
            self._orphans[key] = truth

    def refuse(self, truth: AttemptTruth) -> None:
        """Nobody wants an attempt: its end is acknowledged, or it is to be cancelled."""
        (self._cancels if truth.end is None else self.ends).append(truth.submit.attempt)

    def complete(self) -> dict[str, list[AttemptTruth]]:
        """End the comparison: the attempts to adopt, by request and in order of choice."""
        orphans: dict[str, list[AttemptTruth]] = {}
        for (request, _), truth in sorted(self._orphans.items()):
            orphans.setdefault(request, []).append(truth)
        self.first = False
        self.seen.clear()
        self._orphans.clear()
        return orphans

    def take_cancels(self) -> list[Epoch]:
        """The attempts to cancel, once."""
        cancels, self._cancels = self._cancels, []
        return cancels

    @property
    def due(self) -> bool:
        """True when an `Acked` should go out now."""
        return bool(self.ends) or self.frame - self._acked >= _ACK_EVERY_FRAMES

    def take_acked(self) -> Acked | None:
        """What to acknowledge, once; None when there is nothing."""
        if not self.ends and self.frame == self._acked:
            return None
        acked = Acked(frame=self.frame, ends=tuple(self.ends))
        self._acked = self.frame
        self.ends.clear()
        return acked
