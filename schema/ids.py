"""Time-ordered ids and epochs: the names that outlive a process, and the numbers that fence an older life from a newer.

All but `system_ids` is pure: clock and entropy are handed in, and whoever must be deterministic is handed an `IdSource`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NewType

__all__ = ["Epoch", "EpochCounter", "IdSource", "epoch_of", "generation_of", "made_at", "make_id", "system_ids"]

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_COUNTER_BITS = 40
_GENERATION_BITS = 23

Epoch = NewType("Epoch", int)
"""(manager generation, counter) in one signed 64-bit integer, ordered as the pair is ordered; 0 means "never"."""

IdSource = Callable[[str], str]
"""Called with a kind ("req", "inst", ...); returns a new id of that kind."""


def make_id(kind: str, now_s: float, entropy: bytes) -> str:
    """``kind_`` and 26 Crockford digits: 48 bits of milliseconds, then 80 bits of ``entropy`` (10 bytes), as ULID has them.

    Ids of one kind sort by time. Raises ValueError for other than 10 bytes of entropy.
    Source of the encoding: https://github.com/ulid/spec, in lower case.
    """
    if len(entropy) != 10:
        raise ValueError(f"an id takes 10 bytes of entropy, not {len(entropy)}")
    value = (int(now_s * 1000) & ((1 << 48) - 1)) << 80 | int.from_bytes(entropy, "big")
    digits = [_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5)]
    return f"{kind}_{''.join(digits)}"


def made_at(id: str) -> float | None:  # noqa: A002 - what it is
    """When an id was made (Unix seconds, to the millisecond); None for a name of another form."""
    digits = id.rpartition("_")[2]
    if len(digits) != 26 or not set(digits) <= set(_CROCKFORD) or digits[0] > "7":
        return None
    value = 0
    for digit in digits:
        value = value << 5 | _CROCKFORD.index(digit)
    return (value >> 80) / 1000


def system_ids(kind: str) -> str:
    """The IdSource of a real process: the wall clock and the system's entropy."""
    return make_id(kind, time.time(), os.urandom(10))


def epoch_of(generation: int, counter: int) -> Epoch:
    """The epoch of a pair. Raises OverflowError when either part is out of its range."""
    if not 0 <= generation < 1 << _GENERATION_BITS:
        raise OverflowError(f"manager generation {generation} is out of range")
    if not 0 <= counter < 1 << _COUNTER_BITS:
        raise OverflowError(f"epoch counter {counter} is out of range")
    return Epoch(generation << _COUNTER_BITS | counter)


def generation_of(epoch: Epoch) -> int:
    """The manager generation that made this epoch."""
    return epoch >> _COUNTER_BITS


class EpochCounter:
    """Epochs of one manager generation, each newer than the last.

    The generation is persisted, incremented, before the first use; so the counter itself need not be.
    """

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self._counter = 0

    def next(self) -> Epoch:
        self._counter += 1
        return epoch_of(self.generation, self._counter)
