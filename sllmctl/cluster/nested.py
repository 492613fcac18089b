"""Indexes that hold nothing of what is gone: of two levels without empty inner ones, and counts without zeros."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["count", "discard"]

_O = TypeVar("_O")
_K = TypeVar("_K")
_V = TypeVar("_V")


def discard(index: dict[_O, dict[_K, _V]], outer: _O, key: _K) -> None:
    """Take a key out of an inner index, and that out with its last key. Raises KeyError if it is not there."""
    del index[outer][key]
    if not index[outer]:
        del index[outer]


def count(counts: dict[_K, int], key: _K, more: int) -> int:
    """Count so many more of a key, or fewer; one that comes to 0 is taken out. Returns its count."""
    after = counts.get(key, 0) + more
    if after:
        counts[key] = after
    else:
        counts.pop(key, None)
    return after
