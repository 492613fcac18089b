"""``logs``: lines as they were written, whose they are, and what is asked of the manager for each option."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from schema.admin import LogFrame, LogLineView
from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import FakeManager

LINES = (
    LogLineView(node="local", source="inst_1", at=1.0, text="begun"),
    LogLineView(node="gpu1", source="inst_2", at=None, text="\x1b[31mSegmentation fault"),
)


def test_the_lines_of_a_model_say_whose_they_are(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("GET models/docs/logs", 200, {"items": LINES})
    said = sllmctl("model", "logs", "docs")
    assert (said.code, said.out) == (0, "[inst_1] begun\n[inst_2] \x1b[31mSegmentation fault\n")
    assert manager.asked[-1][1] == "models/docs/logs?tail=100&since=0"
    assert [json.loads(line)["source"] for line in sllmctl("model", "logs", "docs", "-o", "json").out.splitlines()] == [
        "inst_1",
        "inst_2",
    ]


def test_one_source_needs_no_name(sllmctl: Sllmctl, manager: FakeManager) -> None:
    for path in ("models/docs/logs", "instances/inst_1/logs", "nodes/local/logs"):
        manager.answer(f"GET {path}", 200, {"items": LINES[:1]})
    assert sllmctl("model", "logs", "docs", "--instance", "inst_1", "--tail", "5").out == "begun\n"
    assert manager.asked[-1][1] == "models/docs/logs?tail=5&since=0&instance=inst_1"
    assert sllmctl("instance", "logs", "inst_1", "--since", "2m").out == "begun\n"
    assert manager.asked[-1][1] == "instances/inst_1/logs?tail=100000&since=120"
    assert sllmctl("node", "logs", "local", "--process", "store").out == "begun\n"
    assert manager.asked[-1][1] == "nodes/local/logs?tail=100&since=0&process=store"


@pytest.mark.parametrize("form", ["table", "json"])
def test_nodes_whose_lines_are_missing_are_named_beside_the_lines(sllmctl: Sllmctl, manager: FakeManager, form: str) -> None:
    manager.answer("GET models/docs/logs", 200, LogFrame(items=LINES, lost={"gpu1": "the link is down"}))
    said = sllmctl("model", "logs", "docs", "-o", form)
    assert (said.code, len(said.out.splitlines())) == (0, len(LINES))
    assert said.err.count("node gpu1: the link is down") == 1


def test_a_time_is_as_good_as_an_age(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("GET nodes/local/logs", 200, {"items": ()})
    then = datetime.now(UTC) - timedelta(hours=1)
    assert sllmctl("node", "logs", "local", "--since", then.isoformat(), "--tail", "1").code == 0
    since = manager.asked[-1][1].split("since=")[1].split("&")[0]
    assert 3599 <= float(since) < 3700


@pytest.mark.parametrize("since", ["yesterday", "5x", "-5s", ""])
def test_what_is_neither_is_refused(sllmctl: Sllmctl, since: str) -> None:
    said = sllmctl("node", "logs", "local", "--since", since)
    assert said.code == 2
    assert "neither an age" in said.err


def test_followed_lines_come_until_the_manager_goes(sllmctl: Sllmctl, manager: FakeManager) -> None:
    frames = (LogFrame(items=LINES[:1]), LogFrame(lost={"gpu1": "broke"}), LogFrame(lost={"gpu1": "broke"}, items=LINES[1:]))
    manager.frames = list(frames)
    said = sllmctl("model", "logs", "docs", "-f")
    assert manager.asked[-1][1] == "models/docs/logs?tail=100&since=0&follow=1"
    assert said.code == 3
    assert said.out.splitlines() == ["[inst_1] begun", "[inst_2] \x1b[31mSegmentation fault"]
    assert said.err.count("node gpu1: broke") == 1


def test_a_model_without_logs_is_said(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.refuse("GET models/none/logs", 404, "not_found", "there is no model 'none', and no node has a log of it")
    for more in ((), ("-f",)):
        said = sllmctl("model", "logs", "none", *more)
        assert (said.code, said.out) == (5, "")
        assert "no node has a log of it" in said.err
