"""What workers or a process of a node wrote, over the views: it follows, is filtered, wrapped, and held while one reads."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.screen import ModalScreen
from textual.widgets import Input, RichLog, Static

from schema.admin import LogLineView
from schema.errors import SllmError
from sllmctl.client import AsyncAdminClient, LogQuery
from tui.format import ACCENT, BAD, MUTED, PLAIN, WARN, printable
from tui.palette import palette_of
from tui.views.base import filtered

__all__ = ["LogPage"]

_KEEP = 5000
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 5.0
_KEYS = " /  filter   w  wrap   Space  pause   g G  begin, end   Esc  back"


class LogPage(ModalScreen[None]):
    """Follows ``wanted``. Lines beyond the last ``_KEEP`` are forgotten; while it is paused they are kept, and shown after."""

    BINDINGS = [  # noqa: RUF012 - as Textual declares it
        Binding("escape", "back", show=False),
        Binding("q", "back", show=False),
        # At once, since what was typed right behind it belongs to the prompt that it opens.
        Binding("slash", "filter", show=False, priority=True),
        Binding("w", "wrap", show=False),
        Binding("space", "pause", show=False),
        Binding("g,home", "edge(0)", show=False),
        Binding("G,end", "edge(1)", show=False),
        Binding("j", "step(1)", show=False),
        Binding("k", "step(-1)", show=False),
    ]

    def __init__(self, connect: Callable[[], AsyncAdminClient], wanted: LogQuery) -> None:
        super().__init__()
        self._connect, self._wanted = connect, wanted
        self._lines: deque[LogLineView] = deque(maxlen=_KEEP)
        self._words = ""
        self._held = 0
        self._paused = False
        self._why = "asking"
        self._head, self._keys = Static(id="loghead"), Static(_KEYS, id="logkeys", markup=False)
        self._log = RichLog(max_lines=_KEEP, min_width=0, wrap=True, highlight=False, markup=False, auto_scroll=False)
        self._prompt = Input(id="logprompt", compact=True, placeholder="words that lines must have; !word hides")

    def compose(self) -> ComposeResult:
        yield self._head
        yield self._log
        yield self._prompt
        yield self._keys

    def on_mount(self) -> None:
        self._log.focus()
        self._draw_head()
        self.run_worker(self._follow(), name="follow logs", exit_on_error=True)

    # --- what comes

    async def _follow(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                async with self._connect() as admin, contextlib.aclosing(admin.follow_logs(self._wanted)) as frames:
                    fresh = True
                    async for frame in frames:
                        if fresh:  # it begins with the last lines, those that were told before among them
                            self._lines.clear()
                        self._why = "; ".join(f"{node}: {why}" for node, why in frame.lost.items())
                        self._take(frame.items, fresh)
                        fresh, wait_s = False, _FIRST_WAIT_S
            except SllmError as error:
                self._why = f"{error}; trying again"
                self._draw_head()
            await asyncio.sleep(wait_s)
            wait_s = min(_LONGEST_WAIT_S, wait_s * 2)

    def _take(self, lines: tuple[LogLineView, ...], fresh: bool) -> None:
        self._lines.extend(lines)
        if self._paused:
            self._held += len(lines)
        elif fresh:
            self._redraw()
        else:
            self._write(lines)
        self._draw_head()

    # --- drawing

    def _redraw(self) -> None:
        self._log.clear()
        self._write(tuple(self._lines), to_end=True)
        self._draw_head()

    def _write(self, lines: tuple[LogLineView, ...], *, to_end: bool = False) -> None:
        to_end = to_end or self._log.is_vertical_scroll_end
        several = self._wanted.noun == "model" and self._wanted.part is None
        for line in filtered(lines, self._words, lambda line: f"{line.source} {line.text}"):
            text = Text(style=_style(line.text))
            if several:
                text.append(f"{line.source[-6:]} ", style=ACCENT)
            text.append(printable(line.text.replace("\t", "    ")))
            self._log.write(palette_of(self.app).text(text), shrink=self._log.wrap, scroll_end=False)
        if to_end:
            self._log.scroll_end(animate=False)

    def _draw_head(self) -> None:
        text = Text(style=PLAIN)
        text.append(f" logs  {len(self._lines)} lines", style=MUTED)
        text.append(f"  {self._wanted.noun} {printable(self._wanted.name)}", style=f"bold {ACCENT}")
        if self._wanted.part is not None:
            text.append(f" {printable(self._wanted.part)}")
        if self._words:
            text.append(f"  /{printable(self._words)}", style=WARN)
        if self._paused:
            text.append(f"  paused, {self._held} new", style=WARN)
        if self._why:
            text.append(f"  {printable(self._why)}", style=WARN)
        self._head.update(palette_of(self.app).text(text))

    # --- keys

    def action_back(self) -> None:
        if self._prompt.has_focus:
            self._prompt.value = ""
            self._close_prompt()
        elif self._words:
            self._filter("")
        else:
            self.dismiss(None)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return action != "filter" or self.focused is not self._prompt

    def action_filter(self) -> None:
        self._prompt.value = self._words
        self._prompt.display = True
        self.set_focus(self._prompt)

    def action_wrap(self) -> None:
        self._log.wrap = not self._log.wrap
        self._redraw()

    def action_pause(self) -> None:
        self._paused, self._held = not self._paused, 0
        if self._paused:
            self._draw_head()
        else:
            self._redraw()

    def action_edge(self, end: int) -> None:
        if end:
            self._log.scroll_end(animate=False)
        else:
            self._log.scroll_home(animate=False)

    def action_step(self, lines: int) -> None:
        self._log.scroll_relative(y=lines, animate=False)

    @on(Input.Changed, "#logprompt")
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._filter(event.value)

    @on(Input.Submitted, "#logprompt")
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self._close_prompt()

    def _close_prompt(self) -> None:
        self._prompt.display = False
        self.set_focus(self._log)

    def _filter(self, words: str) -> None:
        if words != self._words:
            self._words = words
            self._redraw()


def _style(line: str) -> str:
    """The colour of a line, by the level that it says it has."""
    head = line[:80]
    if " ERROR " in head or " CRITICAL " in head or '"level":"error"' in head or '"level":"critical"' in head:
        return BAD
    return WARN if " WARNING " in head or '"level":"warning"' in head else PLAIN
