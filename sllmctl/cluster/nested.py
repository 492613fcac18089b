"""Indexes of two levels, without empty ones among the inner."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["discard"]

_O = TypeVar("_O")
_K = TypeVar("_K")
_V = TypeVar("_V")


def discard(index: dict[_O, dict[_K, _V]], outer: _O, key: _K) -> None:
    """Take a key out of an inner index, and that out with its last key. Raises KeyError if it is not there."""
    del index[outer][key]
    if not index[outer]:
        del index[outer]
