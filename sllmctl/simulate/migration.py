"""Live migration of an instance's sequences by their tokens, in rounds (ServerlessLLM, OSDI 2024, section 5).

The target computes the KV cache of all tokens so far while the source goes on; the next round computes what came meanwhile,
and so each gap is smaller than the one before. When little is left, or no longer gets less, the source says what it has and
lets go: the sequences' journals are resumed by the router, at the target with all but the last gap computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from sllmctl.simulate.engine import Engine
from sllmctl.simulate.node import Life

__all__ = ["Migration"]

_SMALL_GAP_TOKENS: Final = 16
"""A sequence that lacks no more than this is ready to go."""
_MOST_ROUNDS: Final = 6
_KEEP_S: Final = 60.0
"""What was computed for a sequence that does not come to the target is kept there so long, while nobody needs the room."""


class Migration:
    """``done`` is called when the source has let its sequences go."""

    def __init__(self, source: Life, target: Life, done: Callable[[], None]) -> None:
        self._source = source
        self._target = target
        self._done = done
        self._computed: dict[str, int] = {}
        self._pending = 0
        self._rounds = 0
        self._gap = 0

    def begin(self) -> None:
        source, target = self._source.engine, self._target.engine
        if source is None or target is None:
            return
        self._round(source, target)

    def _round(self, source: Engine, target: Engine) -> None:
        """Look what is missing at the target, and have it computed or let go."""
        here = {job.key: job.prompt + job.made for job in source.advance()}
        for key in [key for key in self._computed if key not in here]:
            del self._computed[key]
            target.forget(key)
        gaps = {key: tokens - self._computed.get(key, 0) for key, tokens in here.items()}
        whole = sum(gaps.values())
        small = all(gap <= _SMALL_GAP_TOKENS for gap in gaps.values())
        if small or self._rounds == _MOST_ROUNDS or (self._rounds and whole > self._gap * 0.9):
            self._let_go(target)
            return
        self._rounds += 1
        self._gap = whole
        wanted = [key for key, gap in gaps.items() if gap > 0]
        self._pending = len(wanted)
        for key in wanted:
            self._computed[key] = here[key]
            target.warm(key, here[key], self._warmed)

    def _warmed(self) -> None:
        self._pending -= 1
        source, target = self._source, self._target
        if self._pending or target.engine is None:
            return
        if source.engine is None:
            self._forget_later(target.engine)
        else:
            # The target is in the middle of a step here.
            source.node.kernel.soon(partial(self._again, source.engine, target.engine))

    def _again(self, source: Engine, target: Engine) -> None:
        if self._source.engine is source and self._target.engine is target:
            self._round(source, target)

    def _let_go(self, target: Engine) -> None:
        source = self._source
        self._done()
        source.node.release(source)
        if source.draining:
            source.node.end(source)
        self._forget_later(target)

    def _forget_later(self, target: Engine) -> None:
        self._source.node.kernel.call_later(_KEEP_S, partial(self._forget, target))

    def _forget(self, target: Engine) -> None:
        for key in self._computed:
            target.forget(key)
