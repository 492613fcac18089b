"""`sllmctl explain`: where a model's next instance would go and why, or what was decided for a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sllmctl.cli.completion import names
from sllmctl.cli.context import Invocation, pass_invocation, report_option
from sllmctl.cli.format import age, duration
from sllmctl.cli.model_views import failing_fields
from sllmctl.cli.output import Column, ReportFormat, now, show_item, show_items, write
from sllmctl.cli.phases import timeline_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schema.admin import CandidateView, DecisionView, ExplainView, NodeVerdictView, RequestExplainView

__all__ = ["command"]

_AT_ONCE_S = 0.01
_Fields = list[tuple[str, str]]


@click.command("explain")
@click.argument("model", required=False, shell_complete=names("model"))
@click.option(
    "--request", "request_id", metavar="ID", help="What was decided for this request.", shell_complete=names("request")
)
@report_option
@pass_invocation
def command(invocation: Invocation, model: str | None, request_id: str | None, form: ReportFormat) -> None:
    """Explain where the next instance of MODEL would go now, and why; nothing is started.

    With --request: what was decided for its model from when it came in until it was routed, and what made its instance.

    Seconds count from the decision. STARTUP is until the instance is ready: QUEUE until its channels are free, LOAD for its
    weights over the slowest of them, ROOM until those who leave for it have left, and what a worker takes by itself. DELAY is
    what others pay for it. The place of least COST, STARTUP and DELAY together, is taken; where an instance of the model was
    just given up, COST is more.

    \b
    Examples:
      sllmctl explain qwen
      sllmctl explain qwen -o wide                  every node, with the best place on it or why there is none
      sllmctl explain --request req_01k9zj8x -o json
    """
    from sllmctl import client

    if (model is None) == (request_id is None):
        raise click.UsageError("name a MODEL, or give --request ID, one of the two")
    with invocation.admin() as admin:
        if model is not None:
            _show_model(form, admin.ask(client.explain_model(model)))
        elif request_id is not None:
            _show_request(form, admin.ask(client.explain_request(request_id)))


def _show_model(form: ReportFormat, view: ExplainView) -> None:
    show_item(form, view, _model_fields, lambda view: view.model)
    if form in ("table", "wide"):
        _show_candidates(view.decision.candidates)
    if form == "wide" and view.nodes:
        write("")
        show_items(form, view.nodes, _node_columns(), lambda verdict: verdict.node)


def _show_request(form: ReportFormat, view: RequestExplainView) -> None:
    show_item(form, view, _request_fields, lambda view: view.request.id)
    if form in ("table", "wide"):
        for decision in view.decisions:
            write("")
            show_item("table", decision, lambda made: _made_fields(made, view.request.received_at), lambda made: made.model)
            _show_candidates(decision.candidates)


def _model_fields(view: ExplainView) -> _Fields:
    decision, last = view.decision, view.last
    verdict = {"start": "start an instance", "wait": "start none, and wait"}.get(decision.kind, "no place")
    fields = [("Model", view.model)]
    if view.held is not None:
        verdict = f"start none, since {view.held.instance} is tried again first; without it: {verdict}"
    fields.append(("Decision", f"{verdict}: {decision.reason}"))
    if view.held is not None:
        fields += failing_fields(view.model, view.held)
    fields.append(("Waiting", _requests(decision.waiting)))
    if decision.rejected:
        fields.append(("Rejected", _rejected(decision)))
    if last is not None:
        fields.append(("Last", f"{age(now() - last.at)} ago, {_done(last)}: {last.reason}"))
    return fields


def _request_fields(view: RequestExplainView) -> _Fields:
    request, timeline = view.request, view.request.timeline
    meanwhile = any(decision.at >= request.received_at for decision in view.decisions)
    if meanwhile or not view.kept:
        text = "" if view.kept else "decisions of that time are not all remembered any more"
    elif timeline.routed_s is None:
        text = "none was made for its model" + ("" if timeline.ended_s is not None else " since it came in")
    elif timeline.cold:
        text = f"none was needed: instance {request.instance} was on its way"
    else:
        after = f" after {duration(timeline.routed_s)}" if timeline.routed_s >= _AT_ONCE_S else ""
        text = f"none was needed: instance {request.instance} had room{after}"
    fields = [("Request", request.id), ("Model", request.model), ("State", str(request.state))]
    fields += [("Instance", request.instance or "none"), ("Timeline", timeline_text(timeline))]
    return [*fields, ("Decision", text)] if text else fields


def _made_fields(decision: DecisionView, received_at: float) -> _Fields:
    after_s = decision.at - received_at
    when = f"{duration(after_s)} after it came in" if after_s >= 0 else f"{age(-after_s)} before it came in"
    fields = [("Decision", f"{when}, {_done(decision)}: {decision.reason}"), ("Waiting", _requests(decision.waiting))]
    return [*fields, ("Rejected", _rejected(decision))] if decision.rejected else fields


def _done(decision: DecisionView) -> str:
    """What a decision did."""
    if decision.kind == "start":
        return f"started {decision.instance}" if decision.instance is not None else "started an instance"
    return "waited" if decision.kind == "wait" else "found no place"


def _requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'}"


def _rejected(decision: DecisionView) -> str:
    return ", ".join(f"{count} node{'' if count == 1 else 's'} {reason}" for reason, count in decision.rejected.items())


def _show_candidates(candidates: Sequence[CandidateView]) -> None:
    if candidates:
        write("")
        show_items("table", candidates, _columns(), lambda candidate: candidate.node)


def _columns() -> list[Column[CandidateView]]:
    return [
        Column("NODE", lambda c: c.node),
        Column("DEVICES", _devices),
        Column("SOURCE", lambda c: c.source),
        Column("QUEUE", lambda c: duration(c.queue_s), right=True),
        Column("LOAD", lambda c: duration(c.load_s), right=True),
        Column("ROOM", lambda c: duration(c.room_s), right=True),
        Column("STARTUP", lambda c: duration(c.startup_s), right=True),
        Column("DELAY", lambda c: duration(c.delay_s), right=True),
        Column("COST", lambda c: duration(c.cost_s), right=True),
        Column("ACTIONS", _actions),
    ]


def _node_columns() -> list[Column[NodeVerdictView]]:
    """Of every node, the best place on it, or why there is none."""
    return [
        Column("NODE", lambda v: v.node),
        Column("DEVICES", lambda v: _devices(v.candidate) if v.candidate is not None else "-"),
        Column("SOURCE", lambda v: v.candidate.source if v.candidate is not None else "-"),
        Column("COST", lambda v: duration(v.candidate.cost_s) if v.candidate is not None else "-", right=True),
        Column("VERDICT", lambda v: _actions(v.candidate) if v.candidate is not None else f"node {v.rejection}"),
    ]


def _devices(candidate: CandidateView) -> str:
    return ",".join(str(device) for device in candidate.devices)


def _actions(candidate: CandidateView) -> str:
    return "; ".join(candidate.actions) or "-"
