"""Events, and the manager's log: the newest at the end, which the cursor follows while it is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from schema.admin import EventView, LogView
from tui.feed import Cluster
from tui.format import MUTED, PLAIN, Cell, Span, clock, short, state
from tui.grid import Column
from tui.views.base import Detail, View

__all__ = ["Events", "Logs"]


class Events(View[EventView]):
    name, aliases = "events", ("event", "ev")
    help = "Events: what happened, to what, and why. It follows while the cursor is at the end."
    empty = "nothing has happened yet"
    follows_end = True

    def columns(self, cluster: Cluster) -> Sequence[Column[EventView]]:
        return _EVENTS

    def rows(self, cluster: Cluster) -> Iterable[EventView]:
        return cluster.events.values()

    def key(self, row: EventView) -> str:
        return row.id

    def words(self, row: EventView) -> str:
        return f"{row.level} {row.kind} {row.object} {row.reason} {row.message}"

    def detail(self, row: EventView, cluster: Cluster) -> Detail:
        detail = Detail(f"{row.kind} {row.object}").field("at", clock(row.at)).field("level", state(row.level))
        return detail.field("reason", row.reason).line().line(row.message)


class Logs(View[LogView]):
    name, aliases = "logs", ("log", "lo")
    help = "The manager's log. It follows while the cursor is at the end."
    empty = "the manager has logged nothing since it was asked"
    follows_end = True

    def columns(self, cluster: Cluster) -> Sequence[Column[LogView]]:
        return _LOGS

    def rows(self, cluster: Cluster) -> Iterable[LogView]:
        return cluster.logs.values()

    def key(self, row: LogView) -> str:
        return row.id

    def words(self, row: LogView) -> str:
        return f"{row.level} {row.logger} {row.message}"

    def detail(self, row: LogView, cluster: Cluster) -> Detail:
        detail = Detail(row.logger).field("at", clock(row.at)).field("level", state(row.level)).line()
        for line in row.message.splitlines():
            detail.line(line)
        return detail


def _message(row: EventView | LogView) -> Cell:
    return Span(row.message.partition("\n")[0], PLAIN if row.level == "info" else state(row.level).style)


_EVENTS: Sequence[Column[EventView]] = (
    Column("at", "TIME", 8, lambda one: Span(clock(one.at), MUTED), lambda one: one.at),
    Column("level", "LEVEL", 7, lambda one: state(one.level), lambda one: one.level, since=92),
    Column("kind", "KIND", 10, lambda one: Span(one.kind, MUTED), lambda one: one.kind),
    Column("object", "OBJECT", 14, lambda one: short(one.object, 14), lambda one: one.object),
    Column("reason", "REASON", 16, lambda one: one.reason, lambda one: one.reason),
    Column("message", "MESSAGE", 10, _message, flex=True),
)
_LOGS: Sequence[Column[LogView]] = (
    Column("at", "TIME", 8, lambda one: Span(clock(one.at), MUTED), lambda one: one.at),
    Column("level", "LEVEL", 7, lambda one: state(one.level), lambda one: one.level),
    Column("logger", "LOGGER", 22, lambda one: Span(one.logger, MUTED), lambda one: one.logger, since=110),
    Column("message", "MESSAGE", 10, _message, flex=True),
)
