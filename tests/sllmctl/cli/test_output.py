"""What every noun prints, letter for letter: lists, one thing, and what programs read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import yaml

from schema.admin import EstimatesView, FailingView, RequestExplainView, RequestTimeline
from schema.errors import Fault
from schema.spec import ModelSpec, PathSource
from schema.states import InstanceState
from sllmctl.cli.main import root
from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import (
    CHECKPOINTS,
    ESTIMATES,
    EVENTS,
    EXPLAINS,
    INSTANCES,
    MODELS,
    NODES,
    NOW,
    OPERATIONS,
    REQUEST_EXPLAINS,
    REQUESTS,
    FakeManager,
)

_GOLDEN = Path(__file__).parent / "golden"
_DIGEST = CHECKPOINTS[0].digest
_SAID = {
    "node_ls": ("node", "ls"),
    "node_ls_wide": ("node", "ls", "-o", "wide"),
    "node_show": ("node", "show", "local"),
    "node_show_unknown_means": ("node", "show", "gpu1"),
    "model_ls": ("model", "ls"),
    "model_ls_wide": ("model", "ls", "-o", "wide"),
    "model_show": ("model", "show", "qwen"),
    "model_show_failed": ("model", "show", "broken"),
    "model_show_ingesting": ("model", "show", "coming"),
    "instance_ls": ("instance", "ls"),
    "instance_ls_wide": ("instance", "ls", "-o", "wide"),
    "instance_show": ("instance", "show", "inst_1"),
    "instance_show_backoff": ("instance", "show", "inst_2"),
    "checkpoint_ls": ("checkpoint", "ls"),
    "checkpoint_ls_wide": ("checkpoint", "ls", "-o", "wide"),
    "checkpoint_show": ("checkpoint", "show", _DIGEST),
    "checkpoint_show_json": ("checkpoint", "show", _DIGEST, "-o", "json"),
    "checkpoint_show_yaml": ("checkpoint", "show", _DIGEST, "-o", "yaml"),
    "request_ls": ("request", "ls"),
    "request_ls_wide": ("request", "ls", "-o", "wide"),
    "request_show": ("request", "show", "req_1"),
    "request_show_running": ("request", "show", "req_2"),
    "request_show_failed": ("request", "show", "req_3"),
    "operation_ls": ("operation", "ls"),
    "operation_ls_wide": ("operation", "ls", "-o", "wide"),
    "operation_show": ("operation", "show", "op_1"),
    "operation_show_failed": ("operation", "show", "op_2"),
    "event_ls": ("event", "ls"),
    "event_ls_wide": ("event", "ls", "-o", "wide"),
    **{f"{noun}_ls_json": (noun, "ls", "-o", "json") for noun in ("node", "model", "instance", "checkpoint", "request")},
    "operation_ls_json": ("operation", "ls", "-o", "json"),
    "node_show_json": ("node", "show", "local", "-o", "json"),
    "model_show_json": ("model", "show", "qwen", "-o", "json"),
    "instance_show_json": ("instance", "show", "inst_1", "-o", "json"),
    "request_show_json": ("request", "show", "req_1", "-o", "json"),
    "request_show_failed_json": ("request", "show", "req_3", "-o", "json"),
    "operation_show_json": ("operation", "show", "op_2", "-o", "json"),
    "event_ls_json": ("event", "ls", "-o", "json"),
    "explain_json": ("explain", "qwen", "-o", "json"),
    "explain": ("explain", "qwen"),
    "explain_wide": ("explain", "qwen", "-o", "wide"),
    "explain_refused": ("explain", "broken"),
    "explain_request": ("explain", "--request", "req_1"),
    "explain_request_warm": ("explain", "--request", "req_2"),
    "bench_estimates": ("bench", "estimates"),
    "bench_estimates_wide": ("bench", "estimates", "-o", "wide"),
}
_VIEWS: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "node": (NODES, ["local", "gpu1"]),
    "model": (MODELS, ["qwen", "broken", "coming"]),
    "instance": (INSTANCES, ["inst_1", "inst_2"]),
    "checkpoint": (CHECKPOINTS, [_DIGEST]),
    "request": (REQUESTS, ["req_1", "req_2", "req_3"]),
    "operation": (OPERATIONS, ["op_1", "op_2"]),
    "event": (EVENTS, ["ev_1", "ev_2"]),
}


def test_every_noun_that_is_listed_is_golden_as_a_table_and_as_json() -> None:
    context = click.Context(root)
    groups = {name: root.get_command(context, name) for name in root.list_commands(context)}
    listed = {name for name, group in groups.items() if isinstance(group, click.Group) and "ls" in group.commands}
    assert listed == set(_VIEWS)
    said = set(_SAID.values())
    assert not [words for noun in listed for words in ((noun, "ls"), (noun, "ls", "-o", "json")) if words not in said]
    assert {path.stem for path in _GOLDEN.iterdir()} == set(_SAID), "a file that is compared with nothing"


def _plain(value: object) -> Any:
    return json.loads(msgspec.json.encode(value))


@pytest.mark.parametrize("name", _SAID)
def test_it_says(sllmctl: Sllmctl, name: str) -> None:
    said = sllmctl(*_SAID[name])
    assert (said.code, said.err) == (0, "")
    assert said.out == (_GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("noun", _VIEWS)
def test_programs_get_the_admin_apis_structs(sllmctl: Sllmctl, noun: str) -> None:
    views, names = _VIEWS[noun]
    assert json.loads(sllmctl(noun, "ls", "-o", "json").out) == _plain(list(views))
    assert yaml.safe_load(sllmctl(noun, "ls", "-o", "yaml").out) == _plain(list(views))
    assert sllmctl(noun, "ls", "-o", "name").out.splitlines() == names
    if noun != "event":
        assert json.loads(sllmctl(noun, "show", names[0], "-o", "json").out) == _plain(views[0])


def test_programs_get_the_whole_of_a_report(sllmctl: Sllmctl) -> None:
    reports = {
        ("explain", "qwen"): EXPLAINS["qwen"],
        ("explain", "--request", "req_1"): REQUEST_EXPLAINS["req_1"],
        ("bench", "estimates"): ESTIMATES,
    }
    for words, view in reports.items():
        assert json.loads(sllmctl(*words, "-o", "json").out) == _plain(view)
        assert yaml.safe_load(sllmctl(*words, "-o", "yaml").out) == _plain(view)


def test_a_request_that_needed_no_decision_is_told_why(sllmctl: Sllmctl, manager: FakeManager) -> None:
    def told(kept: bool = True, **timeline: Any) -> str:
        request = msgspec.structs.replace(REQUESTS[1], timeline=RequestTimeline(**timeline))
        manager.answers.clear()
        manager.answer("GET requests/req_2/explain", 200, RequestExplainView(request=request, decisions=(), kept=kept))
        out = sllmctl("explain", "--request", "req_2").out
        return next(line.partition(":")[2].strip() for line in out.splitlines() if line.startswith("Decision:"))

    assert told(cold=False, routed_s=0.001) == "none was needed: instance inst_1 had room"
    assert told(cold=False, routed_s=2.5) == "none was needed: instance inst_1 had room after 2.50 s"
    assert told(cold=True, routed_s=0.2) == "none was needed: instance inst_1 was on its way"
    assert told(cold=True) == "none was made for its model since it came in"
    assert told(cold=True, ended_s=3.0) == "none was made for its model"
    assert told(kept=False, cold=True, routed_s=0.2) == "decisions of that time are not all remembered any more"


def test_an_events_checkpoint_is_named_as_short_as_elsewhere(sllmctl: Sllmctl, manager: FakeManager) -> None:
    event = msgspec.structs.replace(EVENTS[0], kind="checkpoint", object=_DIGEST)
    manager.answer("GET events", 200, {"items": [event]})
    assert f" checkpoint/{_DIGEST[:12]}  deployed " in sllmctl("event", "ls").out
    manager.answer("GET events", 200, {"items": [event]})
    assert json.loads(sllmctl("event", "ls", "-o", "json").out)[0]["object"] == _DIGEST


def test_a_model_that_found_no_place_is_shown_with_the_reason(sllmctl: Sllmctl, manager: FakeManager) -> None:
    why = "no node can hold model 'qwen': 1 node without the checkpoint"
    manager.answer("GET models/qwen", 200, msgspec.structs.replace(MODELS[0], no_place=why))
    assert f"No place:   {why}\n" in sllmctl("model", "show", "qwen").out


def test_a_model_whose_instance_failed_is_shown_with_the_reason_and_when_it_is_tried_again(
    sllmctl: Sllmctl, manager: FakeManager
) -> None:
    def shown(**values: Any) -> str:
        failing = FailingView(instance="inst_2", node="gpu1", fault=Fault("out_of_space", "no room"), **values)
        manager.answer("GET models/qwen", 200, msgspec.structs.replace(MODELS[0], failing=failing))
        out = sllmctl("model", "show", "qwen").out
        manager.forget()
        assert "Failing:     inst_2 on gpu1: no room (out_of_space)\n" in out
        return out

    assert "Tried again: in 4.00 s\n" in shown(state=InstanceState.BACKOFF, retry_at=NOW + 4)
    at_once = "; `sllmctl model deploy qwen` tries it at once\n"
    assert f"Tried again: in 60 s{at_once}" in shown(state=InstanceState.FAILED, retry_at=NOW + 60)
    assert f"or a sound copy of its checkpoint appears{at_once}" in shown(state=InstanceState.FAILED, retry_at=None)


def test_explain_says_that_a_failed_instance_holds_the_place_and_when_it_is_tried_again(
    sllmctl: Sllmctl, manager: FakeManager
) -> None:
    held = FailingView(
        instance="inst_2", node="gpu1", state=InstanceState.FAILED, fault=Fault("out_of_space", "no room"), retry_at=NOW + 60
    )
    manager.answer("GET models/qwen/explain", 200, msgspec.structs.replace(EXPLAINS["qwen"], held=held))
    out = sllmctl("explain", "qwen").out
    assert "start none, since inst_2 is tried again first; without it: start an instance: weights are in DRAM on local" in out
    assert "inst_2 on gpu1: no room (out_of_space)\n" in out
    assert "Tried again: in 60 s; `sllmctl model deploy qwen` tries it at once\n" in out


def test_estimates_without_outcomes_say_so_beside_the_output(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("GET estimates", 200, EstimatesView(errors=(), outcomes=(), coefficients={}))
    said = sllmctl("bench", "estimates", "-o", "wide")
    assert (said.code, said.out, said.err) == (0, "", "nothing has been both estimated and measured yet\n")


def test_nothing_to_list_is_said_to_people_and_an_empty_list_to_programs(sllmctl: Sllmctl, manager: FakeManager) -> None:
    for words in (("model", "ls"), ("event", "ls", "--object", "attic")):
        manager.answer(f"GET {words[0]}s", 200, {"items": []})
        manager.answer(f"GET {words[0]}s?object=attic&limit=100", 200, {"items": []})
        said = sllmctl(*words)
        assert (said.out, said.err) == ("", f"no {words[0]}s\n")
        for form, out in (("json", "[]\n"), ("name", "")):
            said = sllmctl(*words, "-o", form)
            assert (said.out, said.err) == (out, "")


def test_the_events_filters_are_passed_on(sllmctl: Sllmctl, manager: FakeManager) -> None:
    sllmctl("event", "ls", "--kind", "model", "--object", "qwen", "--limit", "7")
    assert manager.asked == [("GET", "events?kind=model&object=qwen&limit=7", None)]


def test_what_is_printed_depends_neither_on_the_terminals_width_nor_on_its_colours(
    sllmctl: Sllmctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sllmctl("model", "ls", "-o", "wide").out
    for name, value in (("COLUMNS", "20"), ("NO_COLOR", "1"), ("FORCE_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        assert sllmctl("model", "ls", "-o", "wide").out == plain
    assert "\x1b" not in plain


def test_letters_that_take_two_columns_keep_the_table_straight(sllmctl: Sllmctl, manager: FakeManager) -> None:
    spec = ModelSpec(name="a", source=PathSource("/模型/通义"))
    wide, narrow = (msgspec.structs.replace(MODELS[0], name=name, spec=spec) for name in ("通义千问", "qwen"))
    manager.answer("GET models", 200, {"items": [wide, narrow]})
    header, first, second = sllmctl("model", "ls").out.splitlines()
    assert header.startswith("NAME      STATE")
    assert first.startswith("通义千问  deployed")
    assert second.startswith("qwen      deployed")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_lacks_letters_gets_them_escaped(
    sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    spec = ModelSpec(name="a", source=PathSource("/模型/𝔪é"))
    model = msgspec.structs.replace(MODELS[0], name="a", spec=spec)
    manager.answer("GET models/a", 200, model)

    def said(form: str) -> str:
        taken = io.BytesIO()
        with io.TextIOWrapper(taken, encoding) as screen, monkeypatch.context() as patched:
            patched.setattr("sys.stdout", screen)
            assert sllmctl("model", "show", "a", "-o", form).code == 0
            return taken.getvalue().decode(encoding)

    assert json.loads(said("json")) == yaml.safe_load(said("yaml")) == _plain(model)
    letter = "é" if encoding == "latin-1" else r"\u00e9"
    assert rf"/\u6a21\u578b/\ud835\udd2a{letter}" in said("table")
