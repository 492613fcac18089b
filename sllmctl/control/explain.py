"""Why a model's instances run where they run, and where the next one would go: decisions as the admin API shows them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from schema.admin import CandidateView, DecisionView, ExplainView, NodeVerdictView, RequestExplainView, RequestView
from sllmctl.cluster.plans import Candidate, Decision, Move, Plan, Rejection, Wait, kind_of
from sllmctl.cluster.records import Model
from sllmctl.cluster.view import ClusterView
from sllmctl.control import views

__all__ = ["DecisionsPort", "ExplainerPort", "MadePort", "decision_view", "explain", "explain_request"]


class MadePort(Protocol):
    """A decision that was carried out: when, for whom, and the instance that it made, if it made one."""

    @property
    def at(self) -> float: ...
    @property
    def model(self) -> str: ...
    @property
    def instance(self) -> str | None: ...
    @property
    def waiting(self) -> int: ...
    @property
    def decision(self) -> Decision: ...


class DecisionsPort(Protocol):
    """The latest decisions, oldest first; with ``maxlen`` of them, older ones may have been forgotten."""

    @property
    def maxlen(self) -> int | None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[MadePort]: ...


class ExplainerPort(Protocol):
    """A planner that says more than what it decides."""

    def explain(self, model: Model, now: float) -> tuple[Decision, Sequence[tuple[str, Candidate | Rejection]]]:
        """What it would decide now, and for every node the best place on it, or why there is none; best first."""


def explain(view: ClusterView, planner: ExplainerPort, decisions: DecisionsPort, model: Model, now: float) -> ExplainView:
    """Where one more instance of a model would go now, every node looked at, and what was decided for it last."""
    decision, verdicts = planner.explain(model, now)
    last = None
    for made in decisions:
        if made.model == model.name:
            last = made
    return ExplainView(
        model=model.name,
        at=now,
        decision=_decision_view(view, now, model.name, None, model.waiting, decision),
        nodes=tuple(_verdict_view(view, node, verdict) for node, verdict in verdicts),
        last=None if last is None else decision_view(view, last),
        held=views.held(view, model),
    )


def explain_request(view: ClusterView, decisions: DecisionsPort, request: RequestView) -> RequestExplainView:
    """What was decided for a request's model while it waited, and the decision that made its instance, earlier or not."""
    timeline = request.timeline
    until_s = timeline.routed_s if timeline.routed_s is not None else timeline.ended_s
    until = float("inf") if until_s is None else request.received_at + until_s
    shown = [
        decision_view(view, made)
        for made in decisions
        if made.model == request.model
        and (request.received_at <= made.at <= until or (made.instance is not None and made.instance == request.instance))
    ]
    forgotten = len(decisions) == decisions.maxlen and next(iter(decisions)).at > request.received_at
    return RequestExplainView(request=request, decisions=tuple(shown), kept=not forgotten)


def decision_view(view: ClusterView, made: MadePort) -> DecisionView:
    return _decision_view(view, made.at, made.model, made.instance, made.waiting, made.decision)


def _decision_view(
    view: ClusterView, at: float, model: str, instance: str | None, waiting: int, decision: Decision
) -> DecisionView:
    candidates: tuple[Candidate, ...]
    if isinstance(decision, Plan):
        candidates = (decision.best, *decision.others)
    elif isinstance(decision, Wait):
        candidates = (decision.best,)
    else:
        candidates = ()
    return DecisionView(
        at=at,
        model=model,
        kind=kind_of(decision),
        instance=instance,
        waiting=waiting,
        reason=decision.reason,
        candidates=tuple(_candidate_view(view, candidate) for candidate in candidates),
        rejected={reason.value: count for reason, count in decision.rejected.items() if count},
    )


def _verdict_view(view: ClusterView, node: str, verdict: Candidate | Rejection) -> NodeVerdictView:
    if isinstance(verdict, Rejection):
        return NodeVerdictView(node=_node(view, node), rejection=verdict.value)
    return NodeVerdictView(node=_node(view, node), candidate=_candidate_view(view, verdict))


def _candidate_view(view: ClusterView, candidate: Candidate) -> CandidateView:
    return CandidateView(
        node=candidate.name,
        devices=candidate.devices,
        source=f"{_node(view, candidate.peer)} (peer)" if candidate.peer else candidate.source.value,
        queue_s=candidate.queue_s,
        load_s=candidate.load_s,
        room_s=candidate.room_s,
        startup_s=candidate.startup_s,
        delay_s=candidate.delay_s,
        cost_s=candidate.cost_s,
        actions=tuple(_actions(view, candidate)),
    )


def _actions(view: ClusterView, candidate: Candidate) -> Iterator[str]:
    if candidate.drops:
        yield f"drop idle weights of {_weights(view, candidate.drops)}"
    for instance in candidate.stops:
        yield f"stop idle {_instance(view, instance)}"
    for instance in candidate.drains:
        yield f"drain {_instance(view, instance)}"
    for move in candidate.moves:
        yield _moving(view, move)
    for instance in candidate.preempts:
        yield f"preempt {_instance(view, instance)}"
    if candidate.risk_s:
        yield f"risk that it fails again, as it just did there (counts {candidate.risk_s:g} s)"


def _moving(view: ClusterView, move: Move) -> str:
    """Where a busy instance goes, and what that takes there."""
    target = f"{move.target} on {_node(view, move.node)}" if move.target else _node(view, move.node)
    text = f"move {_instance(view, move.instance)} to {target}"
    return text + (f", dropping idle weights of {_weights(view, move.drops)} there" if move.drops else "")


def _weights(view: ClusterView, digests: Sequence[str]) -> str:
    """Checkpoints by the models that use them; by their digest where none does any more."""
    return ", ".join("/".join(view.models_of(digest)) or digest[:12] for digest in digests)


def _instance(view: ClusterView, instance: str) -> str:
    known = view.instances.get(instance)
    return instance if known is None else f"{instance} ({known.model})"


def _node(view: ClusterView, node: str) -> str:
    known = view.nodes.get(node)
    return node if known is None else known.name
