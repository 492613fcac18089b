"""Why a model's next instance would go where it would go, node by node, as the planner reckons now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from schema.admin import CandidateView, DecisionView, NodeVerdictView
from tui.feed import Cluster
from tui.format import GOOD, MUTED, PLAIN, WARN, Cell, Span, age, seconds, state
from tui.grid import Column
from tui.views.base import Detail, View

__all__ = ["Explain"]


class Explain(View[NodeVerdictView]):
    name, aliases = "explain", ("ex",)
    help = "Where a model's next instance would go, and why: every node weighed. x asks, on a model, an instance or a request."
    empty = "x on a model, an instance or a request asks"
    sort = ("cost", False)

    def __init__(self) -> None:
        self._best: CandidateView | None = None
        self._columns: Sequence[Column[NodeVerdictView]] = (
            Column("node", "NODE", 14, self._node, lambda one: one.node),
            Column("devices", "DEV", 5, _of(lambda one: ",".join(map(str, one.devices))), None),
            Column(
                "source", "SOURCE", 12, _of(lambda one: one.source), lambda one: one.candidate.source if one.candidate else "~"
            ),
            Column("queue", "QUEUE", 6, _of(lambda one: seconds(one.queue_s)), None, right=True, since=92),
            Column("load", "LOAD", 6, _of(lambda one: seconds(one.load_s)), None, right=True, since=92),
            Column("room", "ROOM", 6, _of(lambda one: seconds(one.room_s)), None, right=True, since=92),
            Column("startup", "STARTUP", 7, _of(lambda one: seconds(one.startup_s)), None, right=True),
            Column("delay", "DELAY", 6, _of(lambda one: seconds(one.delay_s)), None, right=True),
            Column("cost", "COST", 6, _of(lambda one: seconds(one.cost_s)), _cost, right=True),
            Column("verdict", "VERDICT", 12, _verdict, flex=True),
        )

    def columns(self, cluster: Cluster) -> Sequence[Column[NodeVerdictView]]:
        explained = cluster.explained
        candidates = explained.decision.candidates if explained is not None and explained.decision.kind == "start" else ()
        self._best = candidates[0] if candidates else None
        return self._columns

    def rows(self, cluster: Cluster) -> Iterable[NodeVerdictView]:
        return cluster.explained.nodes if cluster.explained is not None else ()

    def key(self, row: NodeVerdictView) -> str:
        return row.node

    def words(self, row: NodeVerdictView) -> str:
        return f"{row.node} {row.rejection or ''} {row.candidate.source if row.candidate is not None else ''}"

    def detail(self, row: NodeVerdictView, cluster: Cluster) -> Detail:
        explained = cluster.explained
        assert explained is not None
        detail = Detail(f"model {explained.model}")
        if explained.held is not None:
            detail.failing(explained.held, cluster.now())
        _decision(detail, explained.decision, "now" if explained.held is None else "none now; without it", cluster)
        if row.candidate is not None:
            detail.head(f"on {row.node}")
            for action in row.candidate.actions or ("nothing has to leave",):
                detail.line(action)
        elif row.rejection is not None:
            detail.head(f"on {row.node}").line(Span(f"no: {row.rejection}", MUTED))
        if explained.last is not None:
            _decision(detail, explained.last, "the last time", cluster)
        return detail

    def _node(self, row: NodeVerdictView) -> Cell:
        chosen = self._best is not None and row.node == self._best.node
        return Span(f"{row.node} ★" if chosen else row.node, GOOD if chosen else MUTED if row.candidate is None else PLAIN)


def _decision(detail: Detail, decision: DecisionView, when: str, cluster: Cluster) -> Detail:
    detail.head(when).field("decision", state(decision.kind)).field("instance", decision.instance or "")
    detail.field("waiting", str(decision.waiting)).field("at", f"{age(cluster.now() - decision.at)} ago").line(decision.reason)
    for reason, nodes in sorted(decision.rejected.items(), key=lambda each: -each[1]):
        detail.line(Span(f"{nodes} {'node' if nodes == 1 else 'nodes'} {reason}", MUTED))
    return detail


def _of(show: Callable[[CandidateView], str]) -> Callable[[NodeVerdictView], Cell]:
    return lambda row: show(row.candidate) if row.candidate is not None else ""


def _verdict(row: NodeVerdictView) -> Cell:
    if row.candidate is None:
        return Span(f"no: {row.rejection}", MUTED)
    return Span("; ".join(row.candidate.actions), WARN) if row.candidate.actions else Span("has room", GOOD)


def _cost(row: NodeVerdictView) -> float:
    return row.candidate.cost_s if row.candidate is not None else float("inf")
