"""A range of a file, read front to back over as many connections as that takes: a link may be slow, but not stand still.

What has come stays: after a break it goes on at the next byte. A connection that has brought `STEADY_BYTES` was of use, however
it ended, and may be followed by another; one that has brought less is a failed try, of which `Patience` allows a few in a row.
So every range ends, whole or not: the bytes that are missing become fewer, or the tries run out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Self

from agent.store.remote.api import STEADY_BYTES, Body, Interrupted, Patience

__all__ = ["Steady"]


class Steady(Body):
    """A `Body` that never raises Interrupted. A context manager.

    ``open_at`` opens what is left of the range, from a byte ``at`` of the file on.
    """

    def __init__(self, open_at: Callable[[int], AbstractContextManager[Body]], at: int, patience: Patience) -> None:
        self._open_at = open_at
        self._at = at
        self._patience = patience
        self._stack = ExitStack()
        self._body: Body | None = None
        self._came = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close(error)

    def again(self, at: int) -> None:
        """Go on at this byte, over another connection."""
        self._close(None)
        self._at = at

    def some(self, view: memoryview) -> int:
        while True:
            try:
                if self._body is None:
                    self._came = 0
                    self._body = self._stack.enter_context(self._open_at(self._at))
                count = self._body.some(view)
            except Interrupted as error:
                self._close(error)
                if self._came >= STEADY_BYTES:
                    self._patience.progress()
                self._patience.failed(error)
            else:
                self._at += count
                self._came += count
                return count

    def _close(self, error: BaseException | None) -> None:
        """With the error, so that a connection which broke is not used again."""
        self._body = None
        self._stack.__exit__(type(error) if error is not None else None, error, error.__traceback__ if error else None)
