"""Rows on their way to the database: whoever keeps count, or follows what changes, sees them once they are durable."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from schema.admin import OutcomeView
from sllmctl.cluster.changes import RowChange
from sllmctl.control.live import DatabasePort

__all__ = ["WatchedDatabase"]


class WatchedDatabase:
    """Commits to ``database``, then says each outcome to ``count`` and all of it to each of ``tell``; ``timed`` is told how
    many seconds a commit took, and of how many rows. A `DatabasePort` itself."""

    def __init__(
        self,
        database: DatabasePort,
        count: Callable[[OutcomeView], None],
        *tell: Callable[[Sequence[RowChange]], None],
        timed: Callable[[float, int], None] | None = None,
    ) -> None:
        self._database = database
        self._count = count
        self._tell = tell
        self._timed = timed

    async def commit(self, changes: Sequence[RowChange]) -> None:
        began_s = time.perf_counter()
        await self._database.commit(changes)
        if self._timed is not None:
            self._timed(time.perf_counter() - began_s, len(changes))
        for change in changes:
            if isinstance(change, OutcomeView):
                self._count(change)
        for tell in self._tell:
            tell(changes)
