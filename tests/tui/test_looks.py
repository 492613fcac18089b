"""How the dashboard looks: nothing is cut without a mark, and all of it can be read on dark and on light terminals."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from msgspec.structs import replace
from rich.color import Color
from rich.text import Text
from textual.events import Key
from textual.widgets import Button, Input

from schema.errors import Unreachable
from schema.states import NodeState
from tests.examples import sampled
from tests.sllmctl.fake_manager import INSTANCES, NODES, NOW, REQUESTS
from tests.tui.stage import FRAME, Manager, running, screen, settled, until
from tui.background import is_light
from tui.dialogs import Choice, Form
from tui.format import MUTED
from tui.logs import LogPage
from tui.palette import DARK, LIGHT
from tui.views import VIEWS

_LONG = "a-model-whose-name-is-far-longer-than-any-column-of-a-table"
_FAINT = set("│┃╭╮╰╯─▁▂▃▄▅▆▇█▏▎▍▌▋▊▉·")
"""Lines, bars and dots, which are not read."""


# --- nothing is cut


@pytest.mark.parametrize("width", sampled([60, 80, 119, 120, 131, 160], 80, 131))
async def test_a_column_is_shown_whole_or_not_at_all(width: int) -> None:
    async with running(Manager(), (width, 24)) as (app, pilot):
        for view in VIEWS:
            app.jump(view.name)
            await settled(app, pilot)
            head = "".join(segment.text for segment in app.grid.render_line(0))
            titles = head.replace("▲", "").replace("▼", "").split()
            known = [word for column in app.view.columns(app.cluster) for word in column.title.split()]
            assert titles == known[: len(titles)] or set(titles) <= set(known), (view.name, titles)


async def test_beside_the_details_a_table_has_the_columns_of_80() -> None:
    async with running(Manager(), (120, 24)) as (app, pilot):
        for view, last in (("cluster", "DISK"), ("instances", "RST"), ("models", "SOURCE"), ("requests", "AGE")):
            app.jump(view)
            await settled(app, pilot)
            assert app._pane.display
            assert last in screen(app).splitlines()[3]


async def test_a_long_value_stays_beside_its_label() -> None:
    manager = Manager()
    manager.tell(replace(FRAME, instances=(replace(INSTANCES[0], model=_LONG),)))
    async with running(manager, (120, 24)) as (app, pilot):
        app.jump("instances")
        await settled(app, pilot)
        shown = screen(app).splitlines()
        at = next(index for index, line in enumerate(shown) if "│ model " in line)
        first, second = (line.split("│", 1)[1] for line in shown[at : at + 2])
        assert first.strip().startswith("model       a-model")
        assert second[:13].strip() == ""
        assert second.strip() != ""


async def test_what_a_line_has_no_room_for_ends_with_an_ellipsis() -> None:
    manager = Manager()
    async with running(manager, (80, 24)) as (app, pilot):
        manager.tell(Unreachable("no manager answers at /a/very/long/path/of/a/socket; start it with `sllmctl serve`"))
        await until(pilot, lambda: app.cluster.lost is not None)
        await settled(app, pilot)
        assert screen(app).splitlines()[0].endswith("…")


async def test_all_views_have_a_tab_at_80_columns_and_tabs_stay_where_they_are() -> None:
    async with running(Manager(), (80, 24)) as (app, pilot):
        lines = set()
        for view in VIEWS:
            app.jump(view.name)
            await settled(app, pilot)
            lines.add(screen(app).splitlines()[1])
        assert lines == {"  1 cluster  2 models  3 inst  4 reqs  5 ckpts  6 ops  7 events  8 logs  9 why"}


async def test_numbers_in_a_form_say_what_they_are() -> None:
    async with running(Manager(), (80, 24)) as (app, pilot):
        await pilot.press("2", "G", "c")
        await until(pilot, lambda: "sequences on one instance" in screen(app))


async def test_every_answer_of_a_question_is_within_its_dialog() -> None:
    async with running(Manager(), (80, 24), owned=True) as (app, pilot):
        await pilot.press("q")
        await until(pilot, lambda: isinstance(app.screen, Choice) and app.screen.query(Button))
        await pilot.pause()
        assert isinstance(app.screen, Choice)
        inside = app.screen.query_one(".buttons").region
        assert [button.label.plain for button in app.screen.query(Button)][-1] == "Stop now"
        assert all(inside.contains_region(button.region) for button in app.screen.query(Button))


async def test_what_is_as_it_was_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager()
    async with running(manager, (150, 30)) as (app, pilot):
        drawn: list[Any] = []
        for view in ("cluster", "instances", "requests", "checkpoints", "events"):
            app.jump(view)
            await settled(app, pilot)
            with monkeypatch.context() as watch:
                for widget in app.query("*"):
                    watch.setattr(widget, "refresh", lambda *regions, widget=widget, **_: drawn.append((widget, *regions)))
                app._tick()
                app._tick()
            assert drawn == [], view
        app.jump("instances")
        await settled(app, pilot)
        regions: list[Any] = []
        monkeypatch.setattr(app.grid, "refresh", lambda *changed, **_: regions.extend(changed))
        manager.change(instances=(replace(INSTANCES[1], running=7),))
        await settled(app, pilot)
        assert {region.y for region in regions} == {2}


# --- colours


def _contrast(one: Color, other: Color) -> float:
    """WCAG 2's, 1 to 21."""

    def light(colour: Color) -> float:
        parts = [part / 255 for part in colour.get_truecolor()]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((light(one), light(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _unreadable(app: Any) -> list[tuple[str, float]]:
    found = []
    for strip in app.screen._compositor.render_strips():
        for text, style, _ in strip:
            words = set(text.strip()) - _FAINT
            if words and style is not None and style.color is not None and style.bgcolor is not None:
                fore, back = (style.bgcolor, style.color) if style.reverse else (style.color, style.bgcolor)
                if (contrast := _contrast(fore, back)) < 3.5:
                    found.append((text, contrast))
    return found


@pytest.mark.parametrize("light", [False, True])
async def test_all_that_is_drawn_can_be_read(light: bool) -> None:
    manager = Manager()
    async with running(manager, (160, 40), light=light) as (app, pilot):
        page = Color.parse((LIGHT if light else DARK).page)
        for view in VIEWS:
            app.jump(view.name)
            await settled(app, pilot)
            assert _unreadable(app) == [], view.name
            corner = app.screen._compositor.render_strips()[2]._segments[0].style
            assert corner is not None
            assert corner.bgcolor is not None
            assert corner.bgcolor.get_truecolor() == page.get_truecolor()


async def test_a_key_turns_light_into_dark() -> None:
    async with running(Manager(), light=True) as (app, pilot):
        await pilot.press("2", "L")
        await settled(app, pilot)
        assert app.current_theme.dark
        row = app.grid.render_line(2)
        assert any(segment.style and segment.style.color == Color.parse(DARK.good) for segment in row)


def test_styles_name_uses() -> None:
    assert DARK.style("bold good on track").color == Color.parse(DARK.good)
    assert LIGHT.style("bold good on track").bgcolor == Color.parse(LIGHT.track)
    assert LIGHT.text(Text("x", style=MUTED)).style == LIGHT.style(MUTED)


@pytest.mark.parametrize(("colours", "light"), [("0;15", True), ("0;7", True), ("15;0", False), ("0;8", False)])
def test_the_environment_says_whether_it_is_light(monkeypatch: pytest.MonkeyPatch, colours: str, light: bool) -> None:
    monkeypatch.setenv("COLORFGBG", colours)
    assert is_light() is light


@pytest.mark.parametrize(
    ("answer", "light"),
    [
        (b"\x1b]11;rgb:ffff/ffff/dddd\x1b\\\x1b[?62;4c", True),
        (b"\x1b]11;rgb:1e/1e/2e\x07\x1b[?1;2c", False),
        (b"\x1b[?1;2c", False),
    ],
)
def test_the_terminal_is_asked_whether_it_is_light(monkeypatch: pytest.MonkeyPatch, answer: bytes, light: bool) -> None:
    far, near = os.openpty()

    def terminal() -> None:
        heard = b""
        while not heard.endswith(b"\x1b[c"):
            heard += os.read(far, 100)
        os.write(far, answer)

    class _End:
        def fileno(self) -> int:
            return near

    monkeypatch.delenv("COLORFGBG", raising=False)
    monkeypatch.setattr("tui.background._PATIENCE_S", 60.0)
    monkeypatch.setattr("sys.stdin", _End())
    monkeypatch.setattr("sys.stdout", _End())
    thread = threading.Thread(target=terminal)
    thread.start()
    try:
        assert is_light() is light
    finally:
        thread.join(60)
        os.close(near)
        os.close(far)


# --- keys that come faster than they are drawn


def _type(app: Any, keys: str) -> None:
    """All at once, as a terminal far away hands keys over."""
    names = {"/": "slash", ":": "colon", "\r": "enter", "\t": "tab"}
    for key in keys:
        event = Key(names.get(key, key), key)
        event.set_sender(app)
        app.post_message(event)


async def test_what_is_typed_right_behind_a_slash_is_filtered_by() -> None:
    async with running(Manager()) as (app, pilot):
        await pilot.press("2")
        _type(app, "/qtjw")
        await settled(app, pilot)
        assert app._place.filter == "qtjw"
        assert app.view.name == "models"
        assert len(app.screen_stack) == 1


async def test_what_is_typed_right_behind_a_colon_is_jumped_to() -> None:
    async with running(Manager()) as (app, pilot):
        _type(app, ":requests\r")
        await settled(app, pilot)
        assert app.view.name == "requests"
        assert app.focused is app.grid


async def test_what_is_typed_into_a_form_goes_to_the_fields_that_it_is_for() -> None:
    async with running(Manager()) as (app, pilot):
        await pilot.press("2", "a")
        await until(pilot, lambda: isinstance(app.screen, Form) and app.screen.is_mounted)
        await pilot.pause()
        _type(app, "ab\rc\td\te")
        await settled(app, pilot)
        typed = {field.id: field.value for field in app.screen.query(Input)}
        assert typed == {"name": "ab", "source": "c", "min": "d", "max": "e"}


async def test_a_filter_takes_slashes_and_colons() -> None:
    async with running(Manager()) as (app, pilot):
        _type(app, "/a/b:c")
        await settled(app, pilot)
        assert app._place.filter == "a/b:c"


async def test_what_is_typed_right_behind_a_slash_filters_a_log() -> None:
    async with running(Manager()) as (app, pilot):
        await pilot.press("2", "G", "l")
        await until(pilot, lambda: isinstance(app.screen, LogPage))
        page = app.screen
        assert isinstance(page, LogPage)
        _type(app, "/req/q")
        await until(pilot, lambda: page._words == "req/q")
        assert app.screen is page


async def test_views_are_suggested_before_what_changes_something() -> None:
    async with running(Manager()) as (app, pilot):
        await pilot.press("2", "colon", "r", "e")
        prompt = app.query_one("#prompt", Input)
        assert prompt.suggester is not None
        assert await prompt.suggester.get_suggestion("re") == "requests"


# --- forms and orders


async def test_the_beginning_of_a_choice_is_enough() -> None:
    manager = Manager()
    async with running(manager) as (app, pilot):
        await pilot.press("5", "p")
        await until(pilot, lambda: isinstance(app.screen, Form))
        await pilot.press("enter", "d", "r", "enter")
        await until(pilot, lambda: manager.asked)
        assert len(manager.asked) == 1
        assert b"dram" in (manager.asked[0][2] or manager.asked[0][1].encode())


async def test_nodes_are_sorted_by_when_they_were_heard_and_not_linked() -> None:
    manager = Manager()
    nodes = (
        replace(NODES[0], id="n1", name="linked-long", seen_at=NOW - 9000),
        replace(NODES[0], id="n2", name="lost-long", state=NodeState.UNREACHABLE, seen_at=NOW - 5000),
        replace(NODES[0], id="n3", name="lost-lately", state=NodeState.UNREACHABLE, seen_at=NOW - 5),
    )
    manager.tell(replace(FRAME, nodes=nodes, requests=REQUESTS))
    async with running(manager, (240, 24)) as (app, pilot):
        await settled(app, pilot)
        app._sort("seen", False)
        assert [row.name for row in app.grid._rows] == ["linked-long", "lost-lately", "lost-long"]
