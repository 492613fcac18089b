"""What every noun prints, letter for letter: lists, one thing, and what programs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import CHECKPOINTS, EVENTS, INSTANCES, MODELS, NODES, REQUESTS, FakeManager

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
    "event_ls": ("event", "ls"),
    "event_ls_wide": ("event", "ls", "-o", "wide"),
}
_VIEWS: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "node": (NODES, ["local", "gpu1"]),
    "model": (MODELS, ["qwen", "broken", "coming"]),
    "instance": (INSTANCES, ["inst_1", "inst_2"]),
    "checkpoint": (CHECKPOINTS, [_DIGEST]),
    "request": (REQUESTS, ["req_1", "req_2"]),
    "event": (EVENTS, ["ev_1", "ev_2"]),
}


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


def test_nothing_to_list_prints_nothing_but_an_empty_list_for_programs(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("GET models", 200, {"items": []})
    assert sllmctl("model", "ls").out == ""
    assert json.loads(sllmctl("model", "ls", "-o", "json").out) == []
    assert sllmctl("model", "ls", "-o", "name").out == ""


def test_the_events_filters_are_passed_on(sllmctl: Sllmctl, manager: FakeManager) -> None:
    sllmctl("event", "ls", "--kind", "model", "--object", "qwen", "--limit", "7")
    assert manager.asked == [("GET", "events?kind=model&object=qwen&limit=7", None)]
