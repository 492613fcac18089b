"""Requests: those that live and the latest that ended; where each runs, its first token, its pace, its attempts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from schema.admin import RequestView
from schema.states import RequestState
from tui.feed import Cluster
from tui.format import MUTED, WARN, Cell, Span, age, count, seconds, short, state
from tui.grid import Column
from tui.views.base import Detail, View

__all__ = ["Requests"]

_LIVE = (RequestState.WAITING, RequestState.RUNNING)


class Requests(View[RequestView]):
    name, aliases = "requests", ("request", "re")
    help = "Requests: where each runs, time to first token (TTFT), tokens per second, attempts."
    empty = "no request lately"
    sort = ("age", False)

    def __init__(self) -> None:
        self._cluster: Cluster | None = None
        self._columns: Sequence[Column[RequestView]] = (
            Column("id", "REQUEST", 13, lambda one: short(one.id, 13), lambda one: one.id),
            Column("model", "MODEL", 12, lambda one: one.model, lambda one: one.model, flex=True),
            Column("state", "STATE", 9, lambda one: state(one.state.value), lambda one: one.state),
            Column("node", "NODE", 10, lambda one: one.node or "", lambda one: one.node or "", since=92),
            Column(
                "instance", "INSTANCE", 13, lambda one: short(one.instance or "", 13), lambda one: one.instance or "", since=110
            ),
            Column("attempts", "ATT", 3, _attempts, lambda one: one.attempts, right=True),
            Column(
                "prompt", "PROMPT", 6, lambda one: count(one.prompt_tokens), lambda one: one.prompt_tokens, right=True, since=92
            ),
            Column(
                "generated", "TOKENS", 6, lambda one: count(one.generated_tokens), lambda one: one.generated_tokens, right=True
            ),
            Column("ttft", "TTFT", 6, _first, lambda one: one.timeline.first_token_s or 0.0, right=True),
            Column("pace", "TOK/S", 6, lambda one: f"{self._pace(one):.1f}" if self._pace(one) else "", self._pace, right=True),
            Column("age", "AGE", 4, self._age, self._order, right=True),
        )

    def columns(self, cluster: Cluster) -> Sequence[Column[RequestView]]:
        self._cluster = cluster
        return self._columns

    def rows(self, cluster: Cluster) -> Iterable[RequestView]:
        return cluster.requests.values()

    def key(self, row: RequestView) -> str:
        return row.id

    def words(self, row: RequestView) -> str:
        return f"{row.id} {row.model} {row.state} {row.instance or ''} {row.node or ''}"

    def detail(self, row: RequestView, cluster: Cluster) -> Detail:
        self._cluster = cluster
        line = row.timeline
        detail = Detail(row.id).field("model", row.model).field("state", state(row.state.value))
        detail.field("instance", row.instance or "").field("node", row.node or "").field("attempts", str(row.attempts))
        detail.field("came", f"{age(cluster.now() - row.received_at)} ago").field("client", "gone" if row.orphaned else "")
        detail.field("tokens", f"{row.prompt_tokens} in, {row.generated_tokens} out")
        detail.field("pace", f"{self._pace(row):.1f} tokens/s" if self._pace(row) else "")
        detail.head("timeline").field("start", "cold" if line.cold else "warm").field("routed", seconds(line.routed_s))
        detail.field("first token", seconds(line.first_token_s)).field("ended", seconds(line.ended_s))
        detail.fault(row.fault)
        if (start := line.start) is not None:
            detail.start("the start it waited for", start)
        if (engine := line.engine) is not None:
            detail.head("engine").field("queued", seconds(engine.queued_s))
            detail.field("weights", seconds(engine.weights_s) if engine.weights_s > 0 else "")
            detail.field("prefill", seconds(engine.prefill_s))
            detail.field("total", f"{seconds(engine.total_s)} in {engine.steps} steps")
        return detail

    def _pace(self, request: RequestView) -> float:
        """Tokens per second since the first."""
        line = request.timeline
        if line.first_token_s is None or self._cluster is None or request.generated_tokens < 2:
            return 0.0
        end_s = line.ended_s if line.ended_s is not None else self._cluster.now() - request.received_at
        span_s = end_s - line.first_token_s
        return (request.generated_tokens - 1) / span_s if span_s > 0 else 0.0

    def _age(self, request: RequestView) -> Cell:
        return Span(age(self._cluster.now() - request.received_at), MUTED) if self._cluster is not None else ""

    def _order(self, request: RequestView) -> tuple[bool, float]:
        """Those that live come first, the newest of each first."""
        return (request.state not in _LIVE, -request.received_at)


def _attempts(request: RequestView) -> Cell:
    return Span(str(request.attempts), WARN if request.attempts > 1 else MUTED)


def _first(request: RequestView) -> Cell:
    return Span(seconds(request.timeline.first_token_s), WARN if request.timeline.cold else state("ready").style)
