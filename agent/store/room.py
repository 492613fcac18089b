"""Which chunks of the arena are free, and which of them to give away."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FreeChunks"]


class FreeChunks:
    """The free chunks of an arena. Long runs are kept whole where they can be: fewer extents map faster."""

    def __init__(self, chunks: int, taken: Iterable[int] = ()) -> None:
        self._free = set(range(chunks)) - set(taken)

    def __len__(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` free chunks, ascending: from the shortest run that holds them all, else from the longest runs.

        The caller has made sure that so many are free.
        """
        runs = self._runs()
        fitting = [run for run in runs if len(run) >= count]
        if fitting:
            chosen = min(fitting, key=len)[:count]
        else:
            chosen = sorted([chunk for run in sorted(runs, key=len, reverse=True) for chunk in run][:count])
        self._free.difference_update(chosen)
        return chosen

    def give(self, chunks: Iterable[int]) -> None:
        """Take chunks back."""
        self._free.update(chunks)

    def _runs(self) -> list[list[int]]:
        runs: list[list[int]] = []
        for chunk in sorted(self._free):
            if runs and runs[-1][-1] == chunk - 1:
                runs[-1].append(chunk)
            else:
                runs.append([chunk])
        return runs
