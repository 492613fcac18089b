"""The wait before an agent speaks: until whoever the truth depends on has dialled or is proven dead, or ``adopt_s`` is over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable

from agent.daemon.process import Process

__all__ = ["Adoption"]

_log = logging.getLogger(__name__)


class Adoption:
    """Who is still expected, by any key."""

    def __init__(self) -> None:
        self._expected: set[Hashable] = set()
        self._complete = asyncio.Event()

    def expect(self, key: Hashable, process: Process | None = None) -> None:
        """Wait for this one; no longer once its process is proven dead."""
        self._expected.add(key)
        if process is not None:
            process.when_dead(lambda: self.arrived(key))

    def arrived(self, key: Hashable) -> None:
        """It has stated its truth, or is dead."""
        self._expected.discard(key)
        if not self._expected:
            self._complete.set()

    async def wait(self, timeout_s: float) -> None:
        """Return when nobody is expected any more, or after ``timeout_s`` seconds."""
        if not self._expected:
            return
        try:
            await asyncio.wait_for(self._complete.wait(), timeout_s)
        except TimeoutError:
            missing = ", ".join(sorted(str(key) for key in self._expected))
            _log.warning("%s did not dial within %g s; the truth is told without it", missing, timeout_s)
