"""``ls --watch``: the list, then what changes, in every format, until the manager goes away."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from schema.admin import LogFrame, LogLineView, StreamFrame
from schema.states import InstanceState
from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import CHECKPOINTS, EVENTS, INSTANCES, MODELS, NODES, NOW, OPERATIONS, REQUESTS, FakeManager


@pytest.fixture(autouse=True)
def _frames(manager: FakeManager) -> None:
    first = StreamFrame(
        cursor="",
        at=NOW,
        fresh=True,
        more=True,
        nodes=NODES,
        models=MODELS,
        instances=INSTANCES[:1],
        requests=REQUESTS,
        checkpoints=CHECKPOINTS,
        operations=OPERATIONS,
        events=EVENTS,
    )
    rest = StreamFrame(cursor="p-1", at=NOW, instances=INSTANCES[1:])
    change = StreamFrame(
        cursor="p-2",
        at=NOW,
        instances=(replace(INSTANCES[0], state=InstanceState.DRAINING),),
        gone={"instances": ("inst_2",), "nodes": ("node_2",)},
    )
    manager.frames = [first, rest, change]


def test_a_table_is_followed_by_what_changed_in_its_columns(sllmctl: Sllmctl, manager: FakeManager) -> None:
    said = sllmctl("instance", "ls", "--watch")
    lines = said.out.splitlines()
    assert (said.code, manager.asked[-1][1]) == (3, "stream?kinds=instances")
    assert [line.split()[0] for line in lines] == ["ID", "inst_1", "inst_2", "inst_1", "inst_2"]
    assert lines[3].index("draining") == lines[0].index("STATE")
    assert lines[4] == "inst_2 is gone"
    assert "ended the event stream" in said.err
    assert lines[:3] == sllmctl("instance", "ls").out.splitlines()


def test_json_is_an_object_a_line(sllmctl: Sllmctl) -> None:
    objects = [json.loads(line) for line in sllmctl("instance", "ls", "-w", "-o", "json").out.splitlines()]
    assert [one.get("state") for one in objects] == ["ready", "backoff", "draining", None]
    assert objects[-1] == {"gone": "inst_2"}
    assert sllmctl("node", "ls", "-w", "-o", "json").out.splitlines()[-1] == '{"gone":"gpu1"}'
    assert sllmctl("instance", "ls", "-w", "-o", "yaml").out.count("---\n") == 4


@pytest.mark.parametrize("noun", ["node", "model", "request", "checkpoint", "operation", "event"])
def test_every_noun_can_be_watched(sllmctl: Sllmctl, noun: str) -> None:
    watched = sllmctl(noun, "ls", "--watch", "-o", "name").out
    assert watched == sllmctl(noun, "ls", "-o", "name").out


def test_events_are_watched_of_one_thing_and_from_so_many_on(sllmctl: Sllmctl) -> None:
    assert sllmctl("event", "ls", "-w", "-o", "name", "--kind", "model").out == "ev_1\n"
    assert sllmctl("event", "ls", "-w", "-o", "name", "--object", "inst_2").out == "ev_2\n"
    assert sllmctl("event", "ls", "-w", "-o", "name", "--limit", "1").out == "ev_2\n"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (3, ("instance", "ls", "--watch")),
        (1, ("instance", "ls", "--watch")),
        (1, ("model", "logs", "docs", "--follow")),
    ],
)
def test_it_ends_when_nobody_reads_it_any_more(
    manager: FakeManager, ended: Callable[[subprocess.Popen[str]], None], lines: int, words: tuple[str, ...]
) -> None:
    """At once, and not first when there is something to say again, which may be never."""
    told = [LogFrame(items=(LogLineView(node="local", source="inst_1", at=1.0, text="begun"),))]
    manager.frames = told if "logs" in words else manager.frames[:2]
    manager.hold = True
    command = [sys.executable, "-m", "sllmctl", "--socket", str(manager.socket), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended(process)
    assert process.stdout is not None
    assert process.stderr is not None
    assert all(process.stdout.readline() for _ in range(lines))
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (1, "")
    assert manager.gone.wait(60)
