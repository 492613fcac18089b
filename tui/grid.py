"""A table of any number of rows: only the lines on the screen are ever made, so its cost is the screen's and not the table's.

Columns have fixed widths, and flexible ones take what is left; nothing is measured. Rows are known by key, and the cursor stays
on its key wherever that goes. Textual's own DataTable keeps every cell, which at 5,000 rows costs more than a refresh may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Generic, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from tui.format import ACCENT, FAINT, MUTED, PLAIN, Cell, Span, printable
from tui.palette import palette_of

__all__ = ["Column", "Grid"]

T = TypeVar("T")
_GAP = 1
_HEAD, _NONE, _CURSOR, _CURSOR_BLURRED = "bold head on headrow", "none", "on cursor", "on resting"


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """``since``: shown from this width of the table on. ``flex``: takes what is left. ``moves``: one of many alike, which are
    moved through by left and right. Without ``order`` it cannot be sorted by."""

    key: str
    title: str
    width: int
    cell: Callable[[T], Cell]
    order: Callable[[T], Any] | None = None
    right: bool = False
    flex: bool = False
    since: int = 0
    moves: bool = False


class Grid(Widget, can_focus=True):
    """Shows ``rows`` (already filtered and in order), each with its key. Lines that are as they were are not sent again: over
    SSH a table at rest costs nothing."""

    DEFAULT_CSS = "Grid { height: 1fr; width: 1fr; }"
    BINDINGS = [  # noqa: RUF012 - as Textual declares it
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home,g", "edge(0)", show=False),
        Binding("end,G", "edge(1)", show=False),
        Binding("left", "shift(-1)", show=False),
        Binding("right", "shift(1)", show=False),
        Binding("enter", "choose", show=False),
    ]

    class Moved(Message):
        """The cursor is on another row, or has none."""

        def __init__(self, key: str | None) -> None:
            super().__init__()
            self.key = key

        def can_replace(self, message: Message) -> bool:
            return isinstance(message, Grid.Moved)

    class Chosen(Message):
        """Enter, or a double click, on a row."""

    class HeaderClicked(Message):
        def __init__(self, column: str) -> None:
            super().__init__()
            self.column = column

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._columns: Sequence[Column[Any]] = ()
        self._rows: Sequence[Any] = ()
        self._key: Callable[[Any], str] = str
        self._sorted: tuple[str, bool] = ("", False)
        self._laid: list[tuple[Column[Any], int]] = []
        self._laid_for: tuple[int, int] | None = None
        self._on_screen: dict[int, Strip] = {}
        self._top = self._index = self._shift = 0
        self.cursor: str | None = None
        self.follow_end = False
        self.empty = ""

    # --- what is shown

    def show(
        self,
        columns: Sequence[Column[Any]],
        rows: Sequence[Any],
        key: Callable[[Any], str],
        sorted_by: tuple[str, bool] = ("", False),
    ) -> None:
        """Replace what is shown. The cursor stays on its row, or where that row was when it is gone; with ``follow_end`` a
        cursor on the last row goes on to the new last one."""
        was_last = not self._rows or self._index >= len(self._rows) - 1
        if columns is not self._columns:
            self._columns, self._laid_for = columns, None
            self.action_shift(0)
        self._rows, self._key, self._sorted = rows, key, sorted_by
        self._place(len(rows) - 1 if self.follow_end and was_last else self._find(self.cursor))
        width, height = self.size
        changed = [y for y in range(height) if self._drawn(y) != self._on_screen.get(y)]
        if changed:
            self.refresh(*(Region(0, y, width, 1) for y in changed))

    def forget(self) -> None:
        """Begin at the top, of another table."""
        self._rows, self._top, self._index, self._shift, self.cursor = (), 0, 0, 0, None

    @property
    def row(self) -> Any:
        """The row under the cursor, or None."""
        return self._rows[self._index] if self.cursor is not None and self._index < len(self._rows) else None

    @property
    def place(self) -> tuple[int, int]:
        """The number of the cursor's row, from 1, and of rows."""
        return (self._index + 1 if self._rows else 0, len(self._rows))

    def _find(self, key: str | None) -> int:
        if key is None or not self._rows:
            return 0
        if self._index < len(self._rows) and self._key(self._rows[self._index]) == key:
            return self._index
        return next((index for index, row in enumerate(self._rows) if self._key(row) == key), self._index)

    def _place(self, index: int) -> None:
        before = self.cursor
        self._index = max(0, min(index, len(self._rows) - 1))
        self.cursor = self._key(self._rows[self._index]) if self._rows else None
        lines = max(1, self.size.height - 1)
        self._top = max(0, min(self._top, len(self._rows) - lines, self._index))
        if self._index >= self._top + lines:
            self._top = self._index - lines + 1
        if self.cursor != before:
            self.post_message(self.Moved(self.cursor))

    # --- keys and mouse

    def action_move(self, by: int) -> None:
        self._go(self._index + by)

    def action_page(self, by: int) -> None:
        self._go(self._index + by * max(1, self.size.height - 2))

    def action_edge(self, end: int) -> None:
        self._go(len(self._rows) - 1 if end else 0)

    def action_shift(self, by: int) -> None:
        many = sum(column.moves for column in self._columns)
        self._shift = max(0, min(self._shift + by, many - 1))
        self.refresh()

    def action_choose(self) -> None:
        if self.cursor is not None:
            self.post_message(self.Chosen())

    def _go(self, index: int) -> None:
        self._place(index)
        self.refresh()

    def on_resize(self, _: events.Resize) -> None:
        self._place(self._index)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self._go(self._index + 3)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self._go(self._index - 3)

    def on_click(self, event: events.Click) -> None:
        self.focus()
        if event.y == 0:
            x = 0
            for column, width in self._layout(self.size.width):
                if x <= event.x < x + width + _GAP and column.order is not None:
                    self.post_message(self.HeaderClicked(column.key))
                x += width + _GAP
        elif self._top + event.y - 1 < len(self._rows):
            self._go(self._top + event.y - 1)
            if event.chain == 2:
                self.action_choose()

    # --- lines

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self._rows) + 1

    def render_line(self, y: int) -> Strip:
        self._on_screen[y] = strip = self._drawn(y)
        return strip.apply_style(self.rich_style)

    def _drawn(self, y: int) -> Strip:
        width, style_of = self.size.width, palette_of(self.app).style
        if y == 0:
            return self._line(width - 1, [self._head(column) for column, _ in self._layout(width)], _HEAD).extend_cell_length(
                width, style_of(_HEAD)
            )
        index = self._top + y - 1
        if index >= len(self._rows):
            said = [] if self._rows else wrap(printable(self.empty), max(1, width - 4))
            if 2 <= y < len(said) + 2:
                return Strip([Segment(f"  {said[y - 2]}", style_of(MUTED))]).extend_cell_length(width, style_of(_NONE))
            return Strip.blank(width, style_of(_NONE))
        row = self._rows[index]
        background = _NONE
        if index == self._index:
            background = _CURSOR if self.has_focus else _CURSOR_BLURRED
        line = self._line(width - 1, [column.cell(row) for column, _ in self._layout(width)], background)
        return Strip([*line, self._thumb(y, style_of(background))], width)

    def _head(self, column: Column[Any]) -> Cell:
        by, down = self._sorted
        mark = ("▼" if down else "▲") if column.key == by and column.order is not None else ""
        return Span(column.title + mark, ACCENT if mark else "head")

    def _line(self, width: int, cells: Sequence[Cell], background: str) -> Strip:
        style_of = palette_of(self.app).style
        base = style_of(background)
        segments: list[Segment] = []
        left = width
        for (column, size), cell in zip(self._layout(width + 1), cells, strict=True):
            spans = [Span(cell)] if isinstance(cell, str) else [cell] if isinstance(cell, Span) else list(cell)
            used = 0
            made: list[Segment] = []
            for text, style in spans:
                text = printable(text)
                room = size - used
                if room <= 0:
                    break
                length = cell_len(text)
                if length > room:
                    text = set_cell_size(text, room - 1) + "…" if room > 1 else set_cell_size(text, room)
                    length = room
                used += length
                made.append(Segment(text, base + style_of(PLAIN if style == MUTED and background == _CURSOR else style)))
            pad = Segment(" " * (size - used), base)
            segments += [pad, *made] if column.right else [*made, pad]
            segments.append(Segment(" " * _GAP, base))
            left -= size + _GAP
        strip = Strip(segments)
        return strip.crop(0, width) if left < 0 else strip.extend_cell_length(width, base)

    def _thumb(self, y: int, base: Style) -> Segment:
        """The last column of a line: where in the table one is."""
        lines = max(1, self.size.height - 1)
        if len(self._rows) <= lines:
            return Segment(" ", base)
        length = max(1, lines * lines // len(self._rows))
        begin = (lines - length) * self._top // max(1, len(self._rows) - lines)
        shown, style = ("┃", MUTED) if begin <= y - 1 < begin + length else ("│", FAINT)
        return Segment(shown, base + palette_of(self.app).style(style))

    def _layout(self, width: int) -> list[tuple[Column[Any], int]]:
        """Every line asks for it, so it is kept while neither columns nor width change."""
        if self._laid_for != (width, self._shift):
            self._laid, self._laid_for = _laid_out(self._columns, width - 1, self._shift), (width, self._shift)
        return self._laid


def _laid_out(columns: Sequence[Column[Any]], width: int, shift: int) -> list[tuple[Column[Any], int]]:
    """Which columns are shown in a width, and how wide each is. One that there is no room for is left out, and so are those
    after it; the first is always there, whatever is left of it."""
    still = [column for column in columns if column.since <= width + 1 and not column.moves]
    shown: list[Column[Any]] = []
    left = width
    for column in (*still, *[column for column in columns if column.moves][shift:]):
        if shown and column.width > left:
            break
        shown.append(column)
        left -= column.width + _GAP
    flexible = sum(column.flex for column in shown)
    return [(column, column.width + max(0, left) // flexible if column.flex else column.width) for column in shown]
