"""Which tokens a sequence has and how often, as penalties need it: kept up to date token by token."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenCounts"]


class TokenCounts:
    """The distinct tokens of ``prompt`` and ``generated``, and how often each was generated: 0 for the prompt's own."""

    def __init__(self, prompt: Items[int], generated: Items[int]) -> None:
        distinct = np.unique(np.asarray(prompt, dtype=np.int64))
        self._size = len(distinct)
        self._places = dict(zip(distinct.tolist(), range(self._size), strict=True))
        self._ids = np.concatenate((distinct, np.zeros(64, dtype=np.int64)))
        self._times = np.zeros(len(self._ids), dtype=np.float32)
        for token in generated:
            self.add(token)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The distinct tokens, each once."""
        return self._ids[: self._size]

    @property
    def times(self) -> NDArray[np.float32]:
        """How often each of ``ids`` was generated."""
        return self._times[: self._size]

    def add(self, token: int) -> None:
        """One more generated token."""
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = self._size
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._times = np.concatenate((self._times, np.zeros_like(self._times)))
            self._ids[place] = token
            self._size += 1
        self._times[place] += 1
