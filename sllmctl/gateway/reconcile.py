"""One node's connection as the router sees it: what its truth is compared with, and what is to be acknowledged."""

from __future__ import annotations

from typing import Final

from schema.ids import Epoch, generation_of
from schema.link import TOKEN_WINDOW_FRAMES, Acked, AttemptTruth

__all__ = ["NodeLink"]

_ACK_EVERY_FRAMES: Final = TOKEN_WINDOW_FRAMES // 8
"""Credit is given back in parts of the window: often enough that it never runs out, seldom enough to cost nothing."""


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
        """Sort an attempt that the router does not know: its end is acknowledged; in the first truth the highest live one
        of an older generation is kept for adoption; any other is cancelled."""
        epoch = truth.submit.attempt
        if truth.end is not None:
            self.ends.append(epoch)
        elif self.first and generation_of(epoch) < generation:
            key = (truth.submit.request, truth.submit.choice)
            other = self._orphans.get(key)
            if other is not None and other.submit.attempt > epoch:
                self._cancels.append(epoch)
                return
            if other is not None:
                self._cancels.append(other.submit.attempt)
            self._orphans[key] = truth
        else:
            self._cancels.append(epoch)

    def complete(self) -> tuple[dict[str, list[AttemptTruth]], list[Epoch]]:
        """End the comparison: the attempts to adopt, by request and in order of choice, and those to cancel."""
        orphans: dict[str, list[AttemptTruth]] = {}
        for (request, _), truth in sorted(self._orphans.items()):
            orphans.setdefault(request, []).append(truth)
        cancels = list(self._cancels)
        self.first = False
        self.seen.clear()
        self._cancels.clear()
        self._orphans.clear()
        return orphans, cancels

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
