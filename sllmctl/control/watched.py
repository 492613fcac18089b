"""Rows on their way to the database: whoever keeps count of estimates, or follows what changes, sees them once durable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from schema.admin import OutcomeView
from sllmctl.control.effects import RowChange
from sllmctl.control.live import DatabasePort

__all__ = ["WatchedDatabase"]


class WatchedDatabase:
    """Commits to ``database``, then says each outcome to ``count`` and all of it to ``tell``. A `DatabasePort` itself."""

    def __init__(
        self,
        database: DatabasePort,
        count: Callable[[OutcomeView], None],
        tell: Callable[[Sequence[RowChange]], None] | None = None,
    ) -> None:
        self._database = database
        self._count = count
        self._tell = tell

    async def commit(self, changes: Sequence[RowChange]) -> None:
        await self._database.commit(changes)
        for change in changes:
            if isinstance(change, OutcomeView):
                self._count(change)
        if self._tell is not None:
            self._tell(changes)
