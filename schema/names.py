"""What a word that is not known was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

__all__ = ["did_you_mean"]

_MOST: Final = 500
"""So many words are compared; more would take too long where others wait."""


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """``; did you mean 'scale'?``, or "" when none of ``words`` is like it."""
    import difflib

    near = difflib.get_close_matches(word[:200], list(islice(words, _MOST)), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
