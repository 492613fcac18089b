"""Decisions as they are shown: names for ids, words for actions, and which decisions belong to a request."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec
import pytest

from schema.admin import FailingView, RequestTimeline, RequestView
from schema.errors import Fault
from schema.ids import Epoch
from schema.spec import ModelSpec, PathSource, ScaleSpec
from schema.states import InstanceState, ModelState, NodeState, RequestState, Tier
from sllmctl.cluster.plans import Candidate, Decision, Move, Plan, Refusal, Rejection, Wait
from sllmctl.cluster.records import Instance, Model, Node
from sllmctl.cluster.view import ClusterView
from sllmctl.control.explain import decision_view, explain, explain_request

_SMALL, _LOST = "5" * 64, "9" * 64


@dataclass(frozen=True)
class _Made:
    at: float
    model: str
    instance: str | None
    waiting: int
    decision: Decision


def _view() -> ClusterView:
    view = ClusterView()
    for node, name in (("node_1", "local"), ("node_2", "gpu2")):
        view.add_node(Node(node, name, "unix:/a", NodeState.READY, False, 1.0, 2.0))
    for name, digest in (("qwen", "d"), ("tiny", _SMALL), ("small", _SMALL)):
        spec = ModelSpec(name=name, source=PathSource("/m"))
        view.add_model(Model(spec, ModelState.DEPLOYED, digest, None, None, None, 1.0, 1.0))
    view.models["qwen"].waiting = 3
    for instance in ("inst_1", "inst_2", "inst_3", "inst_4"):
        view.add_instance(
            Instance(
                instance, "tiny", "node_1", _SMALL, Epoch(5), InstanceState.READY, (0,), 1, 0, None, None, None, "", 1.0, 1.0
            )
        )
    return view


def _candidate(node: str = "node_1", name: str = "local", **more: object) -> Candidate:
    return Candidate(node=node, name=name, devices=(0,), working_bytes=1, source=Tier.DISK, startup_s=2.0, **more)  # type: ignore[arg-type]


_BEST, _OTHER = _candidate(), _candidate("node_2", "gpu2", delay_s=0.5)
_PLAN = Plan(_BEST, (_OTHER,), {Rejection.NO_COPY: 2, Rejection.CORDONED: 0}, "soonest")


def test_a_plan_shows_its_candidates_and_what_was_rejected() -> None:
    shown = decision_view(_view(), _Made(7.0, "qwen", "inst_9", 4, _PLAN))
    assert (shown.at, shown.model, shown.kind, shown.instance, shown.waiting) == (7.0, "qwen", "start", "inst_9", 4)
    assert shown.rejected == {"without the checkpoint": 2}
    assert [(c.node, c.source, c.startup_s, c.delay_s, c.cost_s) for c in shown.candidates] == [
        ("local", "disk", 2.0, 0.0, 2.0),
        ("gpu2", "disk", 2.0, 0.5, 2.5),
    ]


def test_waits_and_refusals() -> None:
    waited = decision_view(_view(), _Made(7.0, "qwen", None, 1, Wait(0.4, _BEST, {}, "sooner")))
    assert (waited.kind, waited.reason, len(waited.candidates)) == ("wait", "sooner", 1)
    refused = decision_view(_view(), _Made(7.0, "qwen", None, 1, Refusal({Rejection.UNKNOWN: 1}, True, "nowhere")))
    assert (refused.kind, refused.candidates, refused.rejected) == ("refused", (), {"without a known checkpoint": 1})


def test_actions_are_words_with_names() -> None:
    move = Move(
        instance="inst_3",
        node="node_2",
        devices=(0,),
        working_bytes=1,
        drops=(_SMALL,),
        ready_s=1.0,
        migrate_s=1.0,
        pause_s=0.1,
    )
    there = Move(
        instance="gone", node="node_2", devices=(0,), working_bytes=1, target="inst_4", ready_s=0, migrate_s=1, pause_s=0
    )
    best = _candidate(
        peer="node_2",
        drops=(_SMALL, _LOST),
        stops=("inst_1",),
        drains=("inst_2",),
        moves=(move, there),
        preempts=("inst_4",),
        risk_s=30.0,
    )
    (shown,) = decision_view(_view(), _Made(7.0, "qwen", "i", 1, Plan(best, (), {}, ""))).candidates
    assert shown.source == "gpu2 (peer)"
    assert shown.actions == (
        "drop idle weights of small/tiny, 999999999999",
        "stop idle inst_1 (tiny)",
        "drain inst_2 (tiny)",
        "move inst_3 (tiny) to gpu2, dropping idle weights of small/tiny there",
        "move gone to inst_4 on gpu2",
        "preempt inst_4 (tiny)",
        "risk that it fails again, as it just did there (counts 30 s)",
    )


class _Planner:
    def explain(self, model: Model, now: float) -> tuple[Decision, list[tuple[str, Candidate | Rejection]]]:
        return _PLAN, [("node_1", _BEST), ("node_2", Rejection.CORDONED), ("node_9", Rejection.UNREACHABLE)]


def test_a_model_is_explained_with_every_node_and_its_last_decision() -> None:
    view = _view()
    made = deque(
        [_Made(1.0, "qwen", "a", 1, _PLAN), _Made(2.0, "qwen", "b", 1, _PLAN), _Made(3.0, "tiny", "c", 1, _PLAN)], maxlen=9
    )
    shown = explain(view, _Planner(), made, view.models["qwen"], 50.0)
    assert (shown.at, shown.decision.at, shown.decision.waiting, shown.decision.instance) == (50.0, 50.0, 3, None)
    assert [(v.node, v.candidate and v.candidate.cost_s, v.rejection) for v in shown.nodes] == [
        ("local", 2.0, None),
        ("gpu2", None, "cordoned"),
        ("node_9", None, "unreachable"),
    ]
    assert shown.last is not None
    assert shown.last.instance == "b"
    assert explain(view, _Planner(), deque(maxlen=9), view.models["qwen"], 50.0).last is None


@pytest.mark.parametrize("most", [1, 2])
def test_what_is_tried_again_first_is_told_of_a_model_of_which_no_other_can_be_started(most: int) -> None:
    view = _view()
    model = view.models["qwen"]
    model.spec = msgspec.structs.replace(model.spec, scale=ScaleSpec(min=0, max=most))
    fault = Fault("internal", "broken")

    def fail(name: str, state: InstanceState, retry_at: float | None) -> None:
        view.add_instance(
            Instance(name, "qwen", "node_2", "d", Epoch(5), state, (0,), 1, 6, retry_at, fault, None, "", 1.0, 1.0)
        )

    def held() -> FailingView | None:
        return explain(view, _Planner(), deque(maxlen=9), model, 50.0).held

    fail("inst_8", InstanceState.FAILED, None)
    assert (held() is None) == (most == 2), "another may be started beside it"
    fail("inst_9", InstanceState.BACKOFF, 60.0)
    assert held() == FailingView(instance="inst_9", node="gpu2", state=InstanceState.BACKOFF, fault=fault, retry_at=60.0)


def _request(received_at: float, instance: str | None, **timeline: float) -> RequestView:
    return RequestView(
        id="req_1",
        model="qwen",
        state=RequestState.RUNNING,
        instance=instance,
        attempts=1,
        prompt_tokens=1,
        generated_tokens=1,
        orphaned=False,
        received_at=received_at,
        timeline=RequestTimeline(cold=True, **timeline),
    )


@pytest.mark.parametrize(
    ("request_", "shown"),
    [
        (_request(15.0, "b", routed_s=10.0), [20.0, 25.0]),
        (_request(15.0, "a", routed_s=7.0), [10.0, 20.0]),
        (_request(31.0, "b", routed_s=0.0), [20.0]),
        (_request(31.0, "of an older manager", routed_s=0.0), []),
        (_request(15.0, None), [20.0, 25.0, 40.0]),
        (_request(15.0, None, ended_s=8.0), [20.0]),
    ],
)
def test_a_request_is_explained_by_what_was_decided_while_it_waited(request_: RequestView, shown: list[float]) -> None:
    made = [_Made(10.0, "qwen", "a", 1, _PLAN), _Made(20.0, "qwen", "b", 1, _PLAN), _Made(22.0, "tiny", "c", 1, _PLAN)]
    made += [_Made(at, "qwen", None, 1, Wait(0.4, _BEST, {}, "sooner")) for at in (25.0, 40.0)]
    explained = explain_request(_view(), deque(made, maxlen=9), request_)
    assert [decision.at for decision in explained.decisions] == shown
    assert explained.kept
    assert explained.request == request_


def test_what_may_have_been_forgotten_is_said() -> None:
    full = deque([_Made(10.0, "qwen", "a", 1, _PLAN)], maxlen=1)
    assert not explain_request(_view(), full, _request(9.0, "a", routed_s=2.0)).kept
    assert explain_request(_view(), full, _request(10.0, "a", routed_s=2.0)).kept
    assert explain_request(_view(), deque(maxlen=1), _request(9.0, "a")).kept
