"""Operations: what operators asked of checkpoints, and how far that has come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from schema.admin import OperationView
from schema.errors import Cancelled
from tui.feed import Cluster
from tui.format import BAD, GOOD, MUTED, WARN, Cell, Span, age, seconds, short, size
from tui.grid import Column
from tui.views.base import Detail, View, progress_cell

__all__ = ["Operations"]


class Operations(View[OperationView]):
    name, aliases = "operations", ("operation", "op")
    help = "Operations on checkpoints: prefetch, verify, drop, publish, fetch."
    empty = "nobody asked for anything lately"

    def columns(self, cluster: Cluster) -> Sequence[Column[OperationView]]:
        return _COLUMNS

    def rows(self, cluster: Cluster) -> Iterable[OperationView]:
        return reversed(cluster.operations.values())

    def key(self, row: OperationView) -> str:
        return row.id

    def words(self, row: OperationView) -> str:
        return f"{row.id} {row.kind} {row.digest} {row.node} {row.tier}"

    def detail(self, row: OperationView, cluster: Cluster) -> Detail:
        detail = Detail(row.id).field("what", row.kind).field("checkpoint", row.digest[:16]).field("node", row.node)
        detail.field("tier", row.tier.value).field("size", size(row.size_bytes)).field("remote", row.url)
        detail.field("began", f"{age(cluster.now() - row.began_at)} ago").field("state", _state(row))
        detail.field("took", seconds(row.ended_at - row.began_at) if row.ended_at is not None else "")
        detail.field("read", size(row.read_bytes) if row.read_bytes else "").field("note", row.note)
        return detail.progress(row.progress if row.ended_at is None else None).fault(row.fault)


def _state(operation: OperationView) -> Span:
    if operation.ended_at is None:
        return Span("running", WARN)
    if operation.fault is None:
        return Span("done", GOOD)
    return Span("cancelled", MUTED) if operation.fault.code == Cancelled.code else Span("failed", BAD)


def _what(operation: OperationView) -> Cell:
    if operation.fault is not None:
        return Span(operation.fault.message, BAD)
    if operation.ended_at is None:
        return progress_cell(operation.progress)
    return Span(operation.note or f"took {seconds(operation.ended_at - operation.began_at)}", MUTED)


_COLUMNS: Sequence[Column[OperationView]] = (
    Column("id", "OPERATION", 13, lambda one: short(one.id, 13), lambda one: one.id),
    Column("kind", "WHAT", 8, lambda one: one.kind, lambda one: one.kind),
    Column("digest", "CHECKPOINT", 12, lambda one: one.digest[:12], lambda one: one.digest),
    Column("node", "NODE", 12, lambda one: one.node, lambda one: one.node),
    Column("tier", "TIER", 6, lambda one: one.tier.value, lambda one: one.tier),
    Column("state", "STATE", 7, _state, lambda one: one.ended_at is not None),
    Column("progress", "PROGRESS", 14, _what, flex=True),
)
