"""The application: one table and its detail pane, the lines around them, and what happens when a key is pressed.

What changed is drawn at most every `_EVERY_S`, however many changes there were; what is drawn is the screen, not the cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rich.text import Text
from textual import on
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding
from textual.containers import Horizontal, VerticalScroll
from textual.events import Click, Key, Resize
from textual.screen import Screen
from textual.suggester import SuggestFromList
from textual.timer import Timer
from textual.widgets import Input, Static

from schema.errors import SllmError
from schema.states import RequestState
from sllmctl.client import AsyncAdminClient, Call, LogQuery
from tui.chrome import footer_line, status_line, tab_at, tabs_line, title_line
from tui.commands import COMMANDS, Command, called, for_key, of_view
from tui.dialogs import Choice, Field, Form, Help
from tui.feed import Cluster, Follower
from tui.format import printable
from tui.grid import Grid
from tui.logs import LogPage
from tui.palette import DARK, LIGHT, palette_of
from tui.views import VIEWS, Scope, View, filtered, made
from tui.views.base import Detail

__all__ = ["Dashboard", "Ending"]

T = TypeVar("T")
Ending = Literal["leave", "drain", "stop"]
"""What becomes of a manager that was started for the dashboard: left serving, ended once its requests are done, or ended."""
_EVERY_S = 0.1
_TICK_S = 1.0
_WIDE = 120
_DARK, _LIGHT = "sllmctl-dark", "sllmctl-light"


@dataclass(slots=True)
class _Place:
    """Where one is, or was."""

    view: str
    scope: Scope | None = None
    filter: str = ""
    cursor: str | None = None


class Dashboard(App[Ending]):
    """``connect`` makes a client of the manager. ``owned``: the manager was started for this dashboard, so leaving asks what is
    to become of it. ``light``: the terminal's background is. ``clock`` is Unix seconds."""

    CSS_PATH = "app.tcss"
    TITLE = "sllmctl"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS = [  # noqa: RUF012 - as Textual declares it
        Binding("ctrl+c", "leave", show=False, priority=True),
        Binding("ctrl+q", "leave", show=False, priority=True),
        # At once, since what was typed right behind them belongs to the prompt that they open.
        Binding("colon", "prompt('jump')", show=False, priority=True),
        Binding("slash", "prompt('filter')", show=False, priority=True),
    ]

    def __init__(
        self,
        connect: Callable[[], AsyncAdminClient],
        *,
        read_only: bool = False,
        owned: bool = False,
        light: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        self.register_theme(DARK.theme(_DARK, dark=True))
        self.register_theme(LIGHT.theme(_LIGHT, dark=False))
        self.theme = _LIGHT if light else _DARK
        self.cluster = Cluster(clock)
        self.read_only = read_only
        self.redraws = 0
        self._connect, self._owned = connect, owned
        self._views = made()
        self._place = _Place(VIEWS[0].name)
        self._before: list[_Place] = []
        self._sorts: dict[str, tuple[str, bool]] = {name: view.sort for name, view in self._views.items()}
        self._detail: bool | None = None
        self._detailed: Any = None
        self._said: dict[Static, tuple[str, Text | Detail]] = {}
        self._total = 0
        self._pending: Timer | None = None
        self._prompting: Literal["jump", "filter"] = "jump"
        # Kept, since a query would look in the dialog that lies over them.
        self.grid = Grid(id="grid")
        self._status, self._tabs, self._title, self._footer = (
            Static(id=name) for name in ("status", "tabs", "title", "footer")
        )
        self._body = Horizontal(id="body")
        self._pane = VerticalScroll(id="pane", can_focus=False)
        self._text = Static(id="detail")
        self._prompt = Input(id="prompt", compact=True, select_on_focus=False)

    def compose(self) -> ComposeResult:
        yield self._status
        yield self._tabs
        yield self._title
        with self._body:
            yield self.grid
            with self._pane:
                yield self._text
        yield self._prompt
        yield self._footer

    def on_mount(self) -> None:
        self.grid.focus()
        self.set_interval(_TICK_S, self._tick)
        self.run_worker(Follower(self._connect, self.cluster, self.changed).run(), name="follow", exit_on_error=True)
        self._redraw()

    # --- drawing

    @property
    def view(self) -> View[Any]:
        return self._views[self._place.view]

    def changed(self) -> None:
        """Something is new: draw it soon, with whatever else comes until then."""
        if self._pending is None:
            self._pending = self.set_timer(_EVERY_S, self._redraw)

    def _tick(self) -> None:
        self.cluster.sample()
        self._detailed = None
        self._redraw()

    def _redraw(self) -> None:
        if self._pending is not None:
            self._pending.stop()
            self._pending = None
        self.redraws += 1
        cluster, view, place, grid = self.cluster, self.view, self._place, self.grid
        columns = view.columns(cluster)
        rows = list(view.rows(cluster))
        if (scope := place.scope) is not None:
            rows = [row for row in rows if getattr(row, scope.field) == scope.value]
        self._total = len(rows)
        rows = filtered(rows, place.filter, view.words)
        key, down = self._sorts[view.name]
        order = next((column.order for column in columns if column.key == key), None)
        if order is not None:
            rows.sort(key=order, reverse=down)
        grid.follow_end = view.follows_end and not key
        grid.empty = "nothing has all of that" if place.filter else view.nothing(cluster, place.scope)
        grid.show(columns, rows, view.key, self._sorts[view.name])
        self._body.set_class(cluster.lost is not None, "stale")
        self._draw_detail()
        self._draw_lines()

    def _draw_detail(self) -> None:
        shown = self._detail if self._detail is not None else self.size.width >= _WIDE
        pane, row = self._pane, self.grid.row
        pane.display = shown and row is not None
        if pane.display and row is not self._detailed:
            self._detailed = row
            self._say(self._text, self.view.detail(row, self.cluster))

    def _draw_lines(self) -> None:
        width, place, commands = self.size.width, self._place, of_view(self._place.view, read_only=self.read_only)
        at, shown = self.grid.place
        title = title_line(place.view, place.scope, place.filter, at, shown, self._total, self._sorts[place.view])
        for static, text in (
            (self._status, status_line(self.cluster, width, self.read_only)),
            (self._tabs, tabs_line(place.view, width)),
            (self._title, title),
            (self._footer, footer_line(commands, width)),
        ):
            self._say(static, text)

    def _say(self, static: Static, what: Text | Detail) -> None:
        """Show it, unless that is what is shown."""
        if self._said.get(static) != (self.theme, what):
            self._said[static] = (self.theme, what)
            palette = palette_of(self)
            static.update(what.shown(palette) if isinstance(what, Detail) else palette.text(what))

    @on(Grid.Moved)
    def _moved(self) -> None:
        self._draw_detail()
        self._draw_lines()

    def on_resize(self, event: Resize) -> None:
        self._body.set_class(event.size.width < _WIDE, "narrow")
        self._detailed = None
        self.call_after_refresh(self._redraw)

    # --- moving about

    def jump(self, view: str) -> None:
        """Go to a view, whole."""
        self._go(_Place(view))

    def do_drill(self) -> None:
        row = self.grid.row
        if row is None:
            return
        into = self.view.drill(row)
        if into is None:
            self.do_toggle_detail()
        else:
            self._go(_Place(into[0], into[1]))

    def do_back(self) -> None:
        if self._place.filter:
            self._place.filter = ""
            self._redraw()
        elif self._before:
            self._show(self._before.pop())

    def _go(self, place: _Place) -> None:
        self._place.cursor = self.grid.cursor
        if (place.view, place.scope) != (self._place.view, self._place.scope):
            self._before = [*self._before[-20:], self._place]
            self._show(place)
        else:
            self._redraw()

    def _show(self, place: _Place) -> None:
        grid = self.grid
        self._place = place
        grid.forget()
        grid.cursor = place.cursor
        self._detailed = None
        self._redraw()

    def do_sort_next(self) -> None:
        keys = [column.key for column in self.view.columns(self.cluster) if column.order is not None]
        key, _ = self._sorts[self.view.name]
        self._sort(keys[(keys.index(key) + 1) % len(keys)] if key in keys else keys[0], False)

    def do_sort_turn(self) -> None:
        key, down = self._sorts[self.view.name]
        self._sort(key, not down)

    @on(Click, "#tabs")
    def _tab_clicked(self, event: Click) -> None:
        name = tab_at(event.x, self.size.width)
        if name is not None:
            self.jump(name)

    @on(Grid.HeaderClicked)
    def _head_clicked(self, event: Grid.HeaderClicked) -> None:
        key, down = self._sorts[self.view.name]
        self._sort(event.column, not down if key == event.column else False)

    def _sort(self, key: str, down: bool) -> None:
        self._sorts[self.view.name] = (key, down)
        self._redraw()

    def do_toggle_detail(self) -> None:
        self._detail = not self._pane.display
        self._detailed = None
        self._redraw()

    def do_turn_theme(self) -> None:
        self.theme = _DARK if self.theme == _LIGHT else _LIGHT
        self._detailed = None
        self.call_after_refresh(self._redraw)

    # --- commands

    def on_key(self, event: Key) -> None:
        if len(self.screen_stack) > 1:
            return
        if isinstance(self.focused, Input):
            if event.key == "escape":
                self._give_up_prompt()
            return
        command = for_key(event.key, self.view.name)
        if command is not None and command.name != "palette":
            event.stop()
            event.prevent_default()
            self.carry_out(command)

    @on(Grid.Chosen)
    def _chosen(self) -> None:
        self.do_drill()

    def carry_out(self, command: Command) -> None:
        """Run a command of the table, here and on the row under the cursor."""
        if command.writes and self.read_only:
            self.notify(f"{command.name} changes the cluster, and this dashboard is read-only", severity="warning")
        elif not command.is_for(self.view.name):
            self.notify(f"{command.name} is a command of {', '.join(command.views)}", severity="warning")
        elif command.act is not None:
            row = self.grid.row
            if row is None and not command.rowless:
                self.notify("there is no row under the cursor", severity="warning")
            else:
                self.run_worker(command.act(self, row), name=command.name, group="acts")
        elif command.does == "jump":
            self.jump(command.argument)
        elif command.does == "command_palette":
            self.action_command_palette()
        else:
            getattr(self, f"do_{command.does}")()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The palette: what can be done here."""
        for command in of_view(self.view.name, read_only=self.read_only):
            if command.name != "palette":
                yield SystemCommand(command.name, command.help, lambda command=command: self.carry_out(command))

    def do_show_help(self) -> None:
        commands = [command for command in COMMANDS if not (self.read_only and command.writes)]
        self.push_screen(Help(commands, self.view.name))

    def action_leave(self) -> None:
        self.do_leave()

    def do_leave(self) -> None:
        if all(worker.is_finished for worker in self.workers if worker.group == "leave"):
            self.run_worker(self._leave(), name="leave", group="leave")

    async def _leave(self) -> None:
        live = sum(one.state in (RequestState.WAITING, RequestState.RUNNING) for one in self.cluster.requests.values())
        if not self._owned or self.cluster.lost is not None or not live:
            self.exit("drain")
            return
        question = f"The manager was started for this dashboard, and {live} requests are alive. What is to become of it?"
        answers = [("leave", "Leave it serving"), ("drain", "Drain, then stop"), ("stop", "Stop now")]
        match await self.push_screen_wait(Choice(question, answers)):
            case "leave":
                self.exit("leave")
            case "drain":
                self.exit("drain")
            case "stop":
                self.exit("stop")

    # --- the prompt

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return action != "prompt" or (len(self.screen_stack) == 1 and not isinstance(self.focused, Input))

    def action_prompt(self, what: Literal["jump", "filter"]) -> None:
        if what == "jump":
            self.do_prompt_jump()
        else:
            self.do_prompt_filter()

    def do_prompt_jump(self) -> None:
        commands = of_view(self.view.name, read_only=self.read_only)
        words = [command.name for command in sorted(commands, key=lambda one: (one.does != "jump", one.name))]
        self._open_prompt("jump", "", SuggestFromList(words, case_sensitive=False))

    def do_prompt_filter(self) -> None:
        self._open_prompt("filter", self._place.filter, None)

    def _open_prompt(self, what: Literal["jump", "filter"], value: str, suggest: SuggestFromList | None) -> None:
        prompt, self._prompting = self._prompt, what
        prompt.suggester = suggest
        prompt.placeholder = "a view or a command" if what == "jump" else "words that rows must have; !word hides"
        prompt.value = value
        prompt.display = True
        self.screen.set_focus(prompt)
        prompt.cursor_position = len(value)

    def _close_prompt(self) -> None:
        self._prompt.display = False
        self.screen.set_focus(self.grid)
        self._redraw()

    @on(Input.Changed, "#prompt")
    def _typed(self, event: Input.Changed) -> None:
        if self._prompting == "filter" and event.input.display:
            self._place.filter = event.value
            self._redraw()

    @on(Input.Submitted, "#prompt")
    def _submitted(self, event: Input.Submitted) -> None:
        self._close_prompt()
        if self._prompting == "jump" and event.value.strip():
            command = called(event.value, COMMANDS)
            if command is None:
                unknown = printable(event.value.strip())
                self.notify(f"no view or command is called '{unknown}'; ? lists them", severity="warning", markup=False)
            else:
                self.carry_out(command)

    def _give_up_prompt(self) -> None:
        if self._prompting == "filter":
            self._place.filter = ""
        self._close_prompt()

    # --- what actions ask for

    def show_logs(self, wanted: LogQuery) -> None:
        self.push_screen(LogPage(self._connect, wanted))

    @property
    def _is_asking(self) -> bool:
        """Whether a question or a form lies there already: a key that was struck twice asks once."""
        return isinstance(self.screen, (Choice, Form))

    async def confirm(self, question: str, verb: str, no: str = "Cancel") -> bool:
        return not self._is_asking and await self.push_screen_wait(Choice(question, [("yes", verb)], no)) == "yes"

    async def fill_in(self, title: str, fields: list[Field], read: Callable[[Mapping[str, str]], T]) -> T | None:
        return None if self._is_asking else await self.push_screen_wait(Form(title, fields, read))

    async def ask(self, call: Call[T], done: str = "") -> T | None:
        """The manager's answer; a refusal is shown. An answer that is nothing comes back as True."""
        try:
            async with self._connect() as admin:
                answer: Any = await admin.ask(call)
        except SllmError as error:
            self.notify(str(error), severity="error", timeout=10, markup=False)
            return None
        if done:
            self.notify(done, markup=False)
        return True if answer is None else answer  # type: ignore[return-value]
