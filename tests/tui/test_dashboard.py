"""The dashboard by its keys: every view, every action, what it refuses, and how it bears a manager that goes away."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from textual.command import CommandList
from textual.widgets import Button, Input, Static

from schema.admin import EventView, FailingView, LogView
from schema.errors import Conflict, Fault, Unreachable
from schema.states import InstanceState, ModelState, RequestState
from sllmctl.client import Waited
from tests.sllmctl.fake_manager import EXPLAINS, INSTANCES, MODELS, NODES, NOW, REQUESTS
from tests.tui.stage import DIGEST, FRAME, Manager, running, screen, settled, until
from tui.commands import COMMANDS, called, for_key
from tui.dialogs import Choice, Form, Help
from tui.feed import Cluster
from tui.views import VIEWS, filtered

_GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _utc() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as here:
        here.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


async def _press(app: Any, pilot: Any, *keys: str) -> None:
    await pilot.press(*keys)
    await pilot.pause()


def _toasts(app: Any) -> list[str]:
    return [note.message for note in app._notifications]


def _best_of_palette(app: Any) -> str:
    commands = app.screen.query_one(CommandList)
    return commands.get_option_at_index(0).prompt.plain.splitlines()[0] if commands.option_count else ""


# --- what is shown


def _check_golden(name: str, shown: str) -> None:
    golden = _GOLDEN / f"{name}.txt"
    if not golden.exists():
        golden.write_text(shown)
        raise AssertionError(f"{golden.name} was missing; it is what was drawn now: look at it")
    assert shown == golden.read_text(), name


@pytest.mark.parametrize(("size", "views"), [((80, 24), VIEWS), ((150, 30), VIEWS[:1] + VIEWS[2:5] + VIEWS[8:])])
async def test_every_view_as_it_is_drawn(size: tuple[int, int], views: Any) -> None:
    async with running(Manager(), size) as (app, pilot):
        for view in views:
            if view.name == "explain":
                await _press(app, pilot, "2", "G", "x")
                await until(pilot, lambda: app.view.name == "explain")
            else:
                await _press(app, pilot, str(VIEWS.index(view) + 1))
            await settled(app, pilot)
            _check_golden(f"{view.name}_{size[0]}x{size[1]}", screen(app) + "\n")
        await _press(app, pilot, "3", "d")
        await settled(app, pilot)
        _check_golden(f"instances_other_{size[0]}x{size[1]}", screen(app) + "\n")


async def test_the_smallest_and_the_largest_terminal_show_every_view() -> None:
    for size in ((80, 24), (240, 70)):
        async with running(Manager(), size) as (app, pilot):
            for number, kind in enumerate(VIEWS, 1):
                await _press(app, pilot, str(number))
                assert kind.name in screen(app).splitlines()[2]
                assert len(screen(app).splitlines()) == size[1]


async def test_changes_are_drawn_and_the_cursor_stays_on_its_row() -> None:
    manager = Manager()
    async with running(manager) as (app, pilot):
        await _press(app, pilot, "3", "down")
        assert app.grid.cursor == "inst_2"
        first = [replace(INSTANCES[0], id=f"inst_0{number}", model="alpha") for number in range(40)]
        manager.change(instances=(*first, replace(INSTANCES[1], state=InstanceState.FAILED)))
        await until(pilot, lambda: len(app.cluster.instances) == 42)
        await settled(app, pilot)
        assert (app.grid.cursor, app.grid.place) == ("inst_2", (42, 42))
        assert "failed" in screen(app)
        manager.change(gone={"instances": ("inst_2",)})
        await until(pilot, lambda: len(app.cluster.instances) == 41)
        await settled(app, pilot)
        assert app.grid.cursor == "inst_1"


async def test_events_follow_until_one_looks_back() -> None:
    manager = Manager()

    def event(number: int) -> EventView:
        return EventView(id=f"ev_x{number}", at=NOW, level="info", kind="model", object="m", reason="r", message=f"no {number}")

    async with running(manager) as (app, pilot):
        await _press(app, pilot, "7")
        for number in range(50):
            manager.change(events=(event(number),))
        await until(pilot, lambda: len(app.cluster.events) == 52)
        await settled(app, pilot)
        assert "no 49" in screen(app)
        await _press(app, pilot, "up")
        manager.change(events=(event(50),), logs=(LogView(id="l", at=NOW, level="info", logger="a", message="b"),))
        await until(pilot, lambda: len(app.cluster.events) == 53)
        await settled(app, pilot)
        assert app.grid.cursor == "ev_x48"


async def test_a_burst_is_drawn_once() -> None:
    manager = Manager()
    async with running(manager) as (app, pilot):
        await _press(app, pilot, "4")
        before = app.redraws
        for tokens in range(200):
            manager.change(requests=(replace(REQUESTS[1], generated_tokens=tokens),))
        await until(pilot, lambda: app.cluster.requests["req_2"].generated_tokens == 199)
        await settled(app, pilot)
        assert app.redraws - before < 20


# --- moving about


async def test_enter_goes_to_what_belongs_to_a_row_and_escape_comes_back() -> None:
    async with running(Manager()) as (app, pilot):
        await _press(app, pilot, "2", "G", "enter")
        assert (app.view.name, app.grid.place) == ("instances", (1, 2))
        assert "of model qwen" in screen(app)
        await _press(app, pilot, "enter")
        assert (app.view.name, app.grid.place) == ("requests", (1, 2))
        await _press(app, pilot, "escape", "escape")
        assert (app.view.name, app.grid.cursor) == ("models", "qwen")
        await _press(app, pilot, "1", "down", "enter")
        assert "of node local" in screen(app)


async def test_a_model_without_instances_says_why() -> None:
    manager = Manager()
    async with running(manager) as (app, pilot):
        await _press(app, pilot, "2", "g", "enter")
        assert "of model broken" in screen(app)
        assert "no instance: broken could not be ingested: model.safetensors is cut short" in screen(app)
        assert "adds it again" in screen(app)
        why = "no node can hold model 'broken': 1 node with a DRAM budget below the weights; raise node.arena_bytes"
        broken = replace(MODELS[1], fault=None, state=ModelState.DEPLOYED, no_place=why)
        manager.change(models=(broken,))
        await until(pilot, lambda: "node.arena_bytes" in screen(app))
        await _press(app, pilot, "escape", "d")
        assert "no node can hold mo" in screen(app), "in its row, too"
        assert "DRAM budget" in screen(app)
        await _press(app, pilot, "enter")
        for state, said in ((ModelState.STOPPED, "is stopped; o"), (ModelState.INGESTING, "is being ingested")):
            manager.change(models=(replace(broken, state=state),))
            await until(pilot, lambda said=said: said in screen(app))
        manager.change(models=(replace(broken, no_place=""),))
        await until(pilot, lambda: "starts one when a request comes" in screen(app))


async def test_a_model_that_fails_says_when_it_is_tried_again_and_so_does_its_explanation() -> None:
    manager = Manager()
    fault = Fault("out_of_space", "the device is full")
    failing = FailingView(instance="inst_9", node="gpu1", state=InstanceState.FAILED, fault=fault, retry_at=NOW + 1e6)
    manager.answers["models/qwen/explain"] = replace(EXPLAINS["qwen"], held=failing)
    async with running(manager, (120, 40)) as (app, pilot):
        manager.change(models=(replace(MODELS[0], failing=failing),))
        await _press(app, pilot, "2", "G")
        for how in ("next try", "the device is full"):
            await until(pilot, lambda how=how: how in screen(app))
        await _press(app, pilot, "x")
        await until(pilot, lambda: app.view.name == "explain")
        for how in ("next try", "the device is full", "none now; without it"):
            await until(pilot, lambda how=how: how in screen(app))


async def test_a_failed_request_says_why() -> None:
    async with running(Manager(), (120, 40)) as (app, pilot):
        await _press(app, pilot, "4", "G")
        await settled(app, pilot)
        assert app.grid.cursor == "req_3"
        assert "timed_out: waited 600 s" in screen(app)


async def test_a_filter_is_live_kept_and_cleared() -> None:
    async with running(Manager()) as (app, pilot):
        await _press(app, pilot, "2", "slash", *"!qwen", "space", *"ing")
        assert "1 of 1, 3 in all" in screen(app)
        await _press(app, pilot, "enter")
        assert (app.grid.cursor, app.focused) == ("coming", app.grid)
        await _press(app, pilot, "escape")
        assert app.grid.place == (2, 3)
        await _press(app, pilot, "slash", "z", "z", "escape")
        assert app.grid.place[1] == 3


async def test_jumping_by_name_alias_and_beginning() -> None:
    async with running(Manager()) as (app, pilot):
        for typed, view in (("models", "models"), ("in", "instances"), ("matri", "checkpoints"), ("ev", "events")):
            await _press(app, pilot, "colon", *typed, "enter")
            assert app.view.name == view
        await _press(app, pilot, "colon", *"attic", "enter")
        assert "no view or command is called 'attic'" in _toasts(app)[-1]
        await _press(app, pilot, "colon", *"scale", "enter")
        assert "scale is a command of models" in _toasts(app)[-1]


async def test_sorting_by_keys_and_by_the_heads() -> None:
    async with running(Manager()) as (app, pilot):
        await _press(app, pilot, "2", "r")
        assert app.grid._rows[0].name == "qwen"
        await _press(app, pilot, "s")
        assert "by state" in screen(app)
        await pilot.click("#grid", offset=(2, 0))
        assert "by name" in screen(app)
        assert [row.name for row in app.grid._rows] == ["broken", "coming", "qwen"]
        await pilot.click("#grid", offset=(2, 2))
        assert app.grid.cursor == "coming"
        await pilot.click("#tabs", offset=(25, 0))
        assert app.view.name == "instances"


async def test_help_and_palette_are_made_of_the_table() -> None:
    async with running(Manager(), (150, 70)) as (app, pilot):
        await _press(app, pilot, "question_mark")
        assert isinstance(app.screen, Help)
        shown = screen(app)
        assert all(f":{command.name}" in shown for command in COMMANDS)
        assert all(re.search(rf"│ +{command.section} +│", shown) for command in COMMANDS), "no heading is cut"
        await _press(app, pilot, "escape")
        assert [one.title for one in app.get_system_commands(app.screen)][:2] == ["cluster", "models"]
        await _press(app, pilot, "ctrl+p")
        await _press(app, pilot, *"events")
        await until(pilot, lambda: _best_of_palette(app) == "events")
        await _press(app, pilot, "enter")
        await until(pilot, lambda: app.view.name == "events")


def test_the_table_of_commands_is_sound() -> None:
    names = [name for command in COMMANDS for name in (command.name, *command.aliases)]
    assert len(names) == len(set(names))
    for view in VIEWS:
        keys = [command.key for command in COMMANDS if command.is_for(view.name)]
        assert len(keys) == len(set(keys)), view.name
    for command in COMMANDS:
        assert (command.act is None) != (not command.does), command.name
        assert for_key(command.key, command.views[0] if command.views else "cluster") is command
        assert called(command.name, COMMANDS) is command


# --- actions


async def _dialog(app: Any, pilot: Any, kind: type[Any]) -> Any:
    await until(pilot, lambda: isinstance(app.screen, kind) and app.screen.is_mounted)
    await pilot.pause()
    return app.screen


@pytest.mark.parametrize(
    ("keys", "asked"),
    [
        (("2", "G", "t"), ("POST", "models/qwen/stop")),
        (("2", "G", "ctrl+d"), ("DELETE", "models/qwen")),
        (("3", "t"), ("POST", "instances/inst_1/stop")),
        (("4", "t"), ("POST", "requests/req_2/cancel")),
    ],
)
async def test_what_destroys_asks_first_and_cancel_has_the_focus(keys: tuple[str, ...], asked: tuple[str, str]) -> None:
    manager = Manager()
    async with running(manager) as (app, pilot):
        await _press(app, pilot, *keys)
        dialog = await _dialog(app, pilot, Choice)
        assert dialog.focused is dialog.query_one("#cancel", Button)
        await _press(app, pilot, "enter")
        await until(pilot, lambda: not isinstance(app.screen, Choice))
        assert manager.asked == []
        await _press(app, pilot, keys[-1])
        await _dialog(app, pilot, Choice)
        await _press(app, pilot, "right", "enter")
        await until(pilot, lambda: manager.asked)
        assert [call[:2] for call in manager.asked] == [asked]
        await _press(app, pilot, keys[-1])
        await _dialog(app, pilot, Choice)
        await _press(app, pilot, "escape")
        assert len(manager.asked) == 1


async def test_dropping_a_checkpoint_asks_where_and_then_whether() -> None:
    manager = Manager()
    async with running(manager) as (app, pilot):
        await _press(app, pilot, "5", "ctrl+d")
        await _dialog(app, pilot, Form)
        await _press(app, pilot, *"attic", "enter", *"disk", "enter")
        assert "there is no node 'attic'" in str(app.screen.query_one("#problem", Static).render())
        app.screen.query_one("#node", Input).value = "local"
        await _press(app, pilot, "enter", "enter")
        dialog = await _dialog(app, pilot, Choice)
        assert dialog.focused.id == "cancel"
        await _press(app, pilot, "right", "enter")
        await until(pilot, lambda: manager.asked)
        ((method, path, body),) = manager.asked
        assert (method, path, json.loads(body)) == ("POST", f"checkpoints/{DIGEST}/drop", {"node": "local", "tier": "disk"})


@pytest.mark.parametrize(
    ("key", "verb"),
    [("f", "prefetch"), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("p", "pin"), ("u", "unpin")))],
)
async def test_checkpoints_are_prefetched_and_pinned(key: str, verb: str) -> None:
    manager = Manager()
    async with running(manager) as (app, pilot):
        await _press(app, pilot, "5", key)
        await _dialog(app, pilot, Form)
        await _press(app, pilot, *"local", "enter", *"dram", "enter")
        await until(pilot, lambda: manager.asked)
        ((_, path, body),) = manager.asked
        assert (path, json.loads(body)) == (f"checkpoints/{DIGEST}/{verb}", {"node": "local", "tier": "dram"})


async def test_only_the_tiers_that_an_action_knows_are_taken() -> None:
    manager = Manager()
    async with running(manager) as (app, pilot):
        for key, tier, known in (("p", "device", "disk or dram"), ("f", "disk", "dram or device")):
            await _press(app, pilot, "5", key)
            await _dialog(app, pilot, Form)
            assert f"{known};" in app.screen.query_one("#tier", Input).placeholder
            await _press(app, pilot, "enter", *tier, "enter")
            assert f"'{tier}' is no tier for this: {known}" in str(app.screen.query_one("#problem", Static).render())
            await _press(app, pilot, "escape")
        assert manager.asked == []


async def test_a_model_is_added_scaled_and_deployed() -> None:
    manager = Manager()
    manager.answers["models/new"] = Waited(MODELS[0], done=True)
    async with running(manager) as (app, pilot):
        await _press(app, pilot, "2", "a")
        await _dialog(app, pilot, Form)
        await _press(app, pilot, *"new", "enter", *"nonsense", "enter", "enter", "enter")
        assert "no source" in str(app.screen.query_one("#problem", Static).render())
        app.screen.query_one("#source", Input).value = "org/name"
        await _press(app, pilot, "enter", "enter", "enter")
        await until(pilot, lambda: manager.asked)
        assert json.loads(manager.asked[0][2] or b"")["source"] == {"kind": "hub", "repo": "org/name", "revision": "main"}
        await until(pilot, lambda: not isinstance(app.screen, Form))
        manager.asked.clear()
        await _press(app, pilot, "G", "o")
        await until(pilot, lambda: manager.asked)
        assert manager.asked.pop()[:2] == ("POST", "models/qwen/deploy")
        await _press(app, pilot, "c")
        await _dialog(app, pilot, Form)
        app.screen.query_one("#min", Input).value = "3"
        await _press(app, pilot, "enter", "enter", "enter", "enter")
        assert "scale.min: 3 is above scale.max, 2" in str(app.screen.query_one("#problem", Static).render())
        assert app.focused.id == "min"
        app.screen.query_one("#max", Input).value = "0"
        await _press(app, pilot, "enter", "enter", "enter", "enter")
        assert "scale.max: expected int >= 1" in str(app.screen.query_one("#problem", Static).render())
        assert app.focused.id == "max"
        app.screen.query_one("#max", Input).value = "4"
        await _press(app, pilot, "enter", "enter", "enter")
        await until(pilot, lambda: manager.asked)
        assert (
            json.loads(manager.asked[0][2] or b"")["scale"] | {"min": 3, "max": 4}
            == json.loads(manager.asked[0][2] or b"")["scale"]
        )


async def test_a_refusal_is_shown_as_the_manager_says_it() -> None:
    manager = Manager()
    manager.answers["models/qwen/deploy"] = Conflict("model qwen is being [red]removed")
    async with running(manager) as (app, pilot):
        await _press(app, pilot, "2", "G", "o")
        await until(pilot, lambda: _toasts(app))
        assert _toasts(app) == ["model qwen is being [red]removed"]


async def test_read_only_refuses_what_changes_the_cluster() -> None:
    manager = Manager()
    async with running(manager, read_only=True) as (app, pilot):
        for view, keys in (("2", "aoct"), ("3", "t"), ("4", "t"), ("5", "pufv")):
            await _press(app, pilot, view)
            for key in keys:
                await _press(app, pilot, key)
                assert "read-only" in _toasts(app)[-1]
                app.clear_notifications()
        await _press(app, pilot, "2", "G", "x")
        await until(pilot, lambda: app.view.name == "explain")
        assert [path for _, path, _ in manager.asked] == ["models/qwen/explain"]
        assert "read-only" in screen(app)


# --- the manager comes and goes


async def test_a_lost_manager_leaves_a_stale_picture_until_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.feed._FIRST_WAIT_S", 0.01)
    manager = Manager()
    async with running(manager) as (app, pilot):
        await _press(app, pilot, "2")
        manager.up = False
        manager.tell(Unreachable("the manager at /run/admin.sock ended the event stream; it is stopping"))
        await until(pilot, lambda: app.cluster.lost is not None)
        await settled(app, pilot)
        shown = screen(app)
        assert "trying again" in shown.splitlines()[0][:40]
        assert "qwen" in shown
        assert app._body.has_class("stale")
        manager.up = True
        manager.change(gone={"models": ("broken",)})
        await until(pilot, lambda: app.cluster.lost is None)
        await settled(app, pilot)
        shown = screen(app)
        assert "live" in shown
        assert "broken" not in shown
        assert manager.cursors[-1] == "p-1"


async def test_leaving_a_manager_of_ones_own_asks_while_requests_are_alive() -> None:
    for keys, ending in ((("right", "enter"), "leave"), (("right", "right", "enter"), "drain")):
        async with running(Manager(), owned=True) as (app, pilot):
            await _press(app, pilot, "q")
            await _dialog(app, pilot, Choice)
            await _press(app, pilot, "enter")
            await until(pilot, lambda: not isinstance(app.screen, Choice))
            await _press(app, pilot, "ctrl+c")
            await _dialog(app, pilot, Choice)
            await _press(app, pilot, *keys)
            await until(pilot, lambda: not app.is_running)
        assert app.return_value == ending
    manager = Manager()
    async with running(manager, owned=True) as (app, pilot):
        manager.change(requests=(replace(REQUESTS[1], state=RequestState.FINISHED),))
        await until(pilot, lambda: app.cluster.requests["req_2"].state is RequestState.FINISHED)
        await _press(app, pilot, "q")
        await until(pilot, lambda: not app.is_running)
    assert app.return_value == "drain"


# --- the live model


def test_a_fresh_picture_replaces_the_last_one_when_all_of_it_is_here() -> None:
    cluster = Cluster(lambda: NOW)
    cluster.apply(FRAME)
    cluster.apply(replace(FRAME, cursor="", more=True, nodes=(), models=(), instances=()))
    assert (len(cluster.nodes), cluster.cursor) == (2, "p-1")
    cluster.apply(replace(FRAME, cursor="q-9", fresh=False, models=MODELS[:1], nodes=NODES[:1], instances=()))
    assert (list(cluster.models), len(cluster.nodes), cluster.instances, cluster.cursor) == (["qwen"], 1, {}, "q-9")


def test_tokens_per_second_are_counted_by_node() -> None:
    now = [NOW]
    cluster = Cluster(lambda: now[0])
    cluster.apply(FRAME)
    cluster.sample()
    for tokens in (10, 23):
        cluster.apply(replace(FRAME, fresh=False, requests=(replace(REQUESTS[1], generated_tokens=tokens),)))
    now[0] += 2.0
    cluster.sample()
    assert (list(cluster.tokens["local"]), cluster.tokens_per_s()) == ([10.0], 10.0)


def test_a_filter_takes_words_and_their_contrary() -> None:
    names = ["alpha ready", "beta ready", "beta failed"]
    assert filtered(names, "BETA !failed", str) == ["beta ready"]
    assert filtered(names, " ! ", str) == names


async def test_nothing_is_left_running() -> None:
    async with running(Manager()) as (app, _):
        pass
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()], app
