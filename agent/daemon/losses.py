"""What becomes of what lies in memory and on devices when the store is lost and comes back, told as events."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Final, Literal, NamedTuple

from schema.errors import Fault, Unreachable
from schema.link import NodeEvent

__all__ = ["Place", "StoreLosses", "given_up"]

_MAX_LOSSES: Final = 3
"""What the store was lost under so often is given up: it may be what kills it."""
_NAMED: Final = 5
"""Checkpoints named in one event; the others are counted."""


def given_up(losses: int, doing: str) -> Fault | None:
    """The end of what the store was ``doing`` to a checkpoint each time that it was lost; None while it is asked for again."""
    if losses < _MAX_LOSSES:
        return None
    return Fault.of(Unreachable(f"the store was lost {losses} times while it was {doing} this checkpoint"))


class Place(NamedTuple):
    """A checkpoint that lies whole in the node's memory, or on one of its devices."""

    digest: str
    where: str
    size_bytes: int


class StoreLosses:
    """Compares what lies there when a store was lost with what the next one has."""

    def __init__(self, happened: Callable[[NodeEvent], None]) -> None:
        self._happened = happened
        self._at: float | None = None
        self._lay: set[Place] = set()
        self._coming: set[str] = set()

    def lost(self, why: str, lying: set[Place], coming: set[str]) -> None:
        """The link to a store that had stated its truth broke, while this lay there whole and these were coming."""
        self._at, self._lay, self._coming = time.monotonic(), lying, coming
        loads = f"; {_checkpoints(coming)} {'was' if len(coming) == 1 else 'were'} being loaded" if coming else ""
        told = f"the store is lost ({why}); {_places(lying)} {'waits' if len(lying) <= 1 else 'wait'} for the next one{loads}"
        self._happened(NodeEvent(reason="StoreLost", message=told, level="warning"))

    def back(self, lies: set[Place]) -> None:
        """A store has stated its truth. Nothing is told of the first one."""
        if self._at is None:
            return
        away_s, self._at = time.monotonic() - self._at, None
        gone = self._lay - lies
        begun = self._coming - {place.digest for place in self._lay | lies}
        parts = [f"the store is back after {away_s:.1f} s", f"kept: {_places(self._lay & lies)}"]
        parts += [f"dropped: {_places(gone)}"] if gone else []
        parts += (
            [f"what had come of {_checkpoints(begun)} in memory is loaded anew, where somebody waits for it"] if begun else []
        )
        level: Literal["info", "warning"] = "warning" if gone else "info"
        self._happened(NodeEvent(reason="StoreBack", message="; ".join(parts), level=level))


def _places(places: Collection[Place]) -> str:
    if not places:
        return "nothing"
    named = [f"{place.digest[:12]} ({place.where})" for place in sorted(places)]
    total_bytes = sum(place.size_bytes for place in places)
    return f"{_listed(named)}, {total_bytes} bytes"


def _checkpoints(digests: Collection[str]) -> str:
    return _listed([digest[:12] for digest in sorted(digests)])


def _listed(names: list[str]) -> str:
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([*names[:_NAMED], *more])
