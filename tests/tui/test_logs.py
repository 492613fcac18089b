"""The dashboard's logs: whose they are, that they follow, are filtered, wrapped and paused, and outlive a manager that goes."""

from __future__ import annotations

from typing import Any

import pytest
from textual.widgets import Input

from schema.admin import LogFrame, LogLineView
from schema.errors import Unreachable
from sllmctl.client import LogQuery
from tests.tui.stage import Manager, running, screen, until
from tui.logs import LogPage


def lines(*texts: str, source: str = "inst_1") -> LogFrame:
    return LogFrame(items=tuple(LogLineView(node="local", source=source, at=1.0, text=text) for text in texts))


async def shows(app: Any, pilot: Any, text: str) -> None:
    await until(pilot, lambda: text in screen(app))


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ("1 down", LogQuery("node", "local")),
        ("2 G", LogQuery("model", "qwen")),
        ("3", LogQuery("instance", "inst_1")),
    ],
)
async def test_the_key_opens_the_logs_of_the_row(keys: str, wanted: LogQuery) -> None:
    manager = Manager()
    async with running(manager) as (app, pilot):
        await pilot.press(*keys.split(), "l")
        await until(pilot, lambda: manager.followed)
        assert manager.followed == [wanted]
        assert isinstance(app.screen, LogPage)
        await pilot.press("escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)


async def test_it_follows_filters_pauses_and_wraps() -> None:
    manager = Manager()
    async with running(manager, (60, 12), read_only=True) as (app, pilot):
        await pilot.press("3", "l")
        manager.logs.put_nowait(lines(*(f"line {number}" for number in range(40)), "a\x1b[31mred ERROR " + "x" * 70 + "END"))
        await shows(app, pilot, "END")
        assert "\x1b" not in screen(app)
        manager.logs.put_nowait(lines("the newest"))
        await shows(app, pilot, "the newest")

        await pilot.press("w")
        await until(pilot, lambda: "END" not in screen(app))
        await pilot.press("w")
        await shows(app, pilot, "END")

        await pilot.press("space")
        await shows(app, pilot, "paused, 0 new")
        manager.logs.put_nowait(lines("held back"))
        await shows(app, pilot, "paused, 1 new")
        assert "held back" not in screen(app)
        await pilot.press("space")
        await shows(app, pilot, "held back")

        await pilot.press("g")
        await shows(app, pilot, "line 0")
        manager.logs.put_nowait(lines("unseen"))
        await shows(app, pilot, "44 lines")
        assert "line 0" in screen(app)

        await pilot.press("slash", *"newest")
        await until(pilot, lambda: "line 0" not in screen(app))
        assert "the newest" in screen(app)
        await pilot.press("enter")
        assert not app.screen.query_one(Input).display
        await pilot.press("escape")
        await shows(app, pilot, "unseen")
        await pilot.press("escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)


async def test_a_manager_that_goes_is_asked_again_and_nothing_is_shown_twice() -> None:
    manager = Manager()
    async with running(manager, (80, 24)) as (app, pilot):
        await pilot.press("2", "l")
        manager.logs.put_nowait(lines("one", source="inst_abcdef"))
        await shows(app, pilot, "abcdef one")
        manager.logs.put_nowait(Unreachable("no manager answers"))
        await shows(app, pilot, "trying again")
        manager.logs.put_nowait(lines("one", "two"))
        await shows(app, pilot, "two")
        assert screen(app).count("one") == 1
        assert "trying again" not in screen(app)
        assert len(manager.followed) == 2
