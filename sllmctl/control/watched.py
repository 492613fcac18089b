"""Rows on their way to the database: whoever keeps count of estimates and outcomes sees them once they are durable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from schema.admin import OutcomeView
from sllmctl.control.effects import RowChange
from sllmctl.control.live import DatabasePort

__all__ = ["WatchedDatabase"]


class WatchedDatabase:
    """Commits to ``database``, then says each outcome to ``count``. A `DatabasePort` itself."""

    def __init__(self, database: DatabasePort, count: Callable[[OutcomeView], None]) -> None:
        self._database = database
        self._count = count

    async def commit(self, changes: Sequence[RowChange]) -> None:
        await self._database.commit(changes)
        for change in changes:
            if isinstance(change, OutcomeView):
                self._count(change)
