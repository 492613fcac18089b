"""The dashboard under adversity: hostile names, tiny and changing terminals, impatient fingers, a manager that breaks off."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from schema.errors import Unreachable
from tests.examples import sampled
from tests.sllmctl.fake_manager import CHECKPOINTS, INSTANCES, MODELS, NODES, NOW, REQUESTS
from tests.tui.stage import FRAME, Manager, running, screen, settled, until
from tui.dialogs import Choice, Form, Help
from tui.feed import Cluster
from tui.views import VIEWS

HOSTILE = "[red]a[/x]\x1b[2J\u202e" + "汉字" * 80 + "\n\t" + "e\N{COMBINING ACUTE ACCENT}" * 20


def _hostile() -> Manager:
    """A manager all of whose names are bad."""
    manager = Manager()
    nodes = tuple(replace(node, name=f"{number}{HOSTILE}") for number, node in enumerate(NODES))
    manager.change(
        nodes=nodes,
        models=(replace(MODELS[0], name=HOSTILE),),
        instances=tuple(replace(one, model=HOSTILE, node=nodes[0].name, reason=HOSTILE) for one in INSTANCES),
        requests=tuple(replace(one, model=HOSTILE) for one in REQUESTS),
        checkpoints=(replace(CHECKPOINTS[0], digest=f"{HOSTILE}2", models=(HOSTILE,), architecture=HOSTILE),),
        operations=tuple(replace(one, node=HOSTILE, note=HOSTILE, url=HOSTILE) for one in FRAME.operations),
        events=tuple(replace(one, object=HOSTILE, message=HOSTILE, reason=HOSTILE) for one in FRAME.events),
        logs=tuple(replace(one, logger=HOSTILE, message=HOSTILE) for one in FRAME.logs),
    )
    return manager


async def test_names_that_mean_harm_are_drawn_as_text() -> None:
    async with running(_hostile(), (150, 30)) as (app, pilot):
        for number, view in enumerate(VIEWS[:-1], 1):
            await pilot.press(str(number), "G")
            await settled(app, pilot)
            shown = screen(app)
            assert "\x1b" not in shown, view.name
            assert "\u202e" not in shown, view.name
            assert len(shown.splitlines()) == 30, view.name
            assert "[red]a[/x]" in shown, view.name
        for view, key, kind in (("2", "t", Choice), ("2", "c", Form), ("3", "t", Choice), ("4", "t", Choice), ("5", "p", Form)):
            await pilot.press(view, "G", key)
            await until(pilot, lambda kind=kind: isinstance(app.screen, kind))
            await pilot.pause()
            assert "[red]a[/x]" in screen(app), key
            await pilot.press("escape")
        await pilot.press("colon", *"[red]x[", "slash", "y", "right_square_bracket", "enter")
        await until(pilot, lambda: "'[red]x[/y]'" in screen(app))


@pytest.mark.parametrize("size", sampled([(1, 1), (2, 40), (40, 2), (3, 5), (12, 8)], (1, 1)))
async def test_a_terminal_too_small_for_anything_is_borne(size: tuple[int, int]) -> None:
    async with running(_hostile(), size) as (app, pilot):
        for number in range(1, len(VIEWS) + 1):
            await pilot.press(str(number), "d", "G", "right", "pagedown", "d")
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, Help))
        await pilot.press("escape", "2", "c")
        await until(pilot, lambda: isinstance(app.screen, Form))
        await pilot.resize_terminal(100, 30)
        await pilot.press("escape")
        await settled(app, pilot)
        assert "models" in screen(app)


async def test_a_storm_of_sizes_ends_with_the_last_one_drawn() -> None:
    async with running(Manager()) as (app, pilot):
        for number in range(40):
            await pilot.resize_terminal(20 + 7 * number % 200, 1 + 3 * number % 60)
        await pilot.resize_terminal(90, 25)
        await settled(app, pilot)
        shown = screen(app)
        assert len(shown.splitlines()) == 25
        assert "local" in shown


async def test_a_key_struck_twice_asks_once() -> None:
    manager = Manager()
    async with running(manager) as (app, pilot):
        await pilot.press("3")
        for key in ("t", "t", "t"):
            app.simulate_key(key)
        await until(pilot, lambda: isinstance(app.screen, Choice))
        await pilot.press("right", "enter")
        await until(pilot, lambda: manager.asked)
        await settled(app, pilot)
        assert len(app.screen_stack) == 1
        assert len(manager.asked) == 1


async def test_leaving_is_possible_while_something_is_asked() -> None:
    async with running(Manager(), owned=True) as (app, pilot):
        await pilot.press("3", "t")
        await until(pilot, lambda: isinstance(app.screen, Choice))
        await pilot.press("ctrl+c", "ctrl+c", "ctrl+q")
        await until(pilot, lambda: len(app.screen_stack) == 3)
        assert "What is to become of it?" in screen(app)
        await pilot.press("right", "enter")
        await until(pilot, lambda: not app.is_running)
    assert app.return_value == "leave"


async def test_a_manager_that_goes_while_a_form_is_filled_in_is_told_of() -> None:
    manager = Manager()
    manager.answers["models/qwen/deploy"] = Unreachable("no manager answers at /run/admin.sock")
    async with running(manager) as (app, pilot):
        await pilot.press("2", "G", "c")
        await until(pilot, lambda: isinstance(app.screen, Form))
        manager.tell(Unreachable("the manager ended the event stream"))
        manager.up = False
        await until(pilot, lambda: app.cluster.lost is not None)
        await pilot.press("enter", "enter", "enter", "enter")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        await until(pilot, lambda: app._notifications)
        assert [note.message for note in app._notifications] == ["no manager answers at /run/admin.sock"]
        assert "qwen" in screen(app)


def test_the_speed_of_a_node_that_is_gone_is_counted_no_more() -> None:
    now = [NOW]
    cluster = Cluster(lambda: now[0])
    cluster.apply(FRAME)
    cluster.sample()
    cluster.apply(replace(FRAME, fresh=False, requests=(replace(REQUESTS[1], generated_tokens=23),)))
    now[0] += 1.0
    cluster.sample()
    assert cluster.tokens_per_s() > 0
    cluster.apply(replace(FRAME, fresh=False, nodes=(), gone={"nodes": tuple(node.id for node in NODES)}))
    now[0] += 1.0
    cluster.sample()
    assert (cluster.tokens_per_s(), cluster.tokens) == (0.0, {})


def test_a_picture_that_broke_off_in_the_middle_leaves_the_last_one() -> None:
    cluster = Cluster(lambda: NOW)
    cluster.apply(FRAME)
    cluster.apply(replace(FRAME, cursor="", more=True, nodes=(), models=(), instances=()))
    cluster.lose("it broke off")
    cluster.apply(replace(FRAME, cursor="p-2", fresh=False, nodes=(), models=MODELS[:1], instances=()))
    assert (len(cluster.nodes), len(cluster.models), cluster.cursor) == (len(NODES), len(MODELS), "p-2")


def test_a_picture_is_stale_from_when_the_manager_went_and_not_from_its_last_change() -> None:
    now = [NOW]
    cluster = Cluster(lambda: now[0])
    cluster.apply(FRAME)
    now[0] += 3600
    cluster.lose("it went away")
    now[0] += 5
    cluster.lose("and is still away")
    assert (cluster.stale_s(), cluster.now()) == (5, NOW + 3600)


def test_hours_of_news_take_no_more_room() -> None:
    now = [NOW]
    cluster = Cluster(lambda: now[0])
    cluster.apply(FRAME)
    for number in range(1500):
        events = tuple(replace(FRAME.events[0], id=f"ev_{number}_{part}") for part in range(3))
        request, gone = replace(REQUESTS[0], id=f"req_{number}"), {"requests": (f"req_{number - 1}",)}
        cluster.apply(replace(FRAME, fresh=False, events=events, requests=(request,), gone=gone))
        now[0] += 1.0
        cluster.sample()
    assert len(cluster.events) == 1000
    assert len(cluster.requests) <= len(REQUESTS) + 2
    assert max(len(samples) for samples in cluster.tokens.values()) <= 60


async def test_tasks_end_with_the_dashboard() -> None:
    async with running(Manager()) as (app, pilot):
        await pilot.press("2", "a")
        await until(pilot, lambda: isinstance(app.screen, Form))
        app.exit("drain")
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
