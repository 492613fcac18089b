"""What lies over the views: a question (Cancel has the focus), a form, the help."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Generic, TypeVar

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text
from textual import on
from textual.actions import SkipAction
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.suggester import SuggestFromList
from textual.widgets import Button, Input, Label, Static

from schema.errors import InvalidInput
from tui.format import ACCENT, MUTED, PLAIN, printable
from tui.palette import palette_of

if TYPE_CHECKING:
    from tui.commands import Command

__all__ = ["Choice", "Field", "Form", "Help"]

T = TypeVar("T")
_ESCAPE = Binding("escape", "dismiss_with_nothing", show=False)


class Choice(ModalScreen[str | None]):
    """A question and the answers that it may have; Cancel (``no``) comes first, has the focus, and is what Esc gives (None)."""

    BINDINGS = [  # noqa: RUF012 - as Textual declares it
        _ESCAPE,
        Binding("left", "app.focus_previous", show=False),
        Binding("right", "app.focus_next", show=False),
    ]

    def __init__(self, question: str, answers: Sequence[tuple[str, str]], no: str = "Cancel") -> None:
        super().__init__()
        self._question, self._answers, self._no = question, answers, no

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Text(printable(self._question)), classes="question")
            with Horizontal(classes="buttons"):
                yield Button(self._no, id="cancel")
                for name, label in self._answers:
                    yield Button(label, id=name, variant="error")

    def on_mount(self) -> None:
        self.query_one("#cancel").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(None if event.button.id == "cancel" else event.button.id)

    def action_dismiss_with_nothing(self) -> None:
        self.dismiss(None)


@dataclass(frozen=True, slots=True)
class Field:
    """``choices`` are suggested as one types, and the beginning of one is enough. ``hint`` stands beside a value, or in its
    place."""

    name: str
    label: str
    value: str = ""
    hint: str = ""
    choices: tuple[str, ...] = ()

    def whole(self, value: str) -> str:
        """The one choice that begins so, else the value as it is."""
        meant = [choice for choice in self.choices if value and choice.lower().startswith(value.lower())]
        return meant[0] if len(meant) == 1 and value not in self.choices else value


class Form(ModalScreen[T | None], Generic[T]):
    """Fields to fill in. ``read`` makes the result of them, or raises InvalidInput, which is shown; Esc gives None."""

    BINDINGS = [  # noqa: RUF012 - as Textual declares it
        _ESCAPE,
        # At once, since what was typed right behind them belongs to the next field.
        Binding("enter", "next_field", show=False, priority=True),
        Binding("tab", "app.focus_next", show=False, priority=True),
        Binding("shift+tab", "app.focus_previous", show=False, priority=True),
    ]

    def __init__(self, title: str, fields: Sequence[Field], read: Callable[[Mapping[str, str]], T]) -> None:
        super().__init__()
        self._title, self._fields, self._read = title, fields, read

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Text(printable(self._title)), classes="question")
            for field in self._fields:
                with Horizontal(classes="field"):
                    yield Label(field.label)
                    suggest = SuggestFromList(field.choices, case_sensitive=False) if field.choices else None
                    filled = bool(field.value and field.hint)
                    yield Input(
                        field.value,
                        placeholder=field.hint,
                        id=field.name,
                        suggester=suggest,
                        compact=True,
                        classes="number" if filled else "",
                    )
                    if filled:
                        yield Label(field.hint, classes="hint")
            yield Static("", id="problem")
            with Horizontal(classes="buttons"):
                yield Button("Cancel", id="cancel")
                yield Button("OK", id="ok", variant="primary")

    def on_mount(self) -> None:
        self.query_one(Input).focus()

    def action_next_field(self) -> None:
        """Enter goes to the next field; in the last one, and on a button, it is theirs."""
        if not isinstance(self.focused, Input) or self.focused.id == self._fields[-1].name:
            raise SkipAction
        self.focus_next(Input)

    @on(Input.Submitted)
    def submit(self, event: Input.Submitted) -> None:
        event.stop()
        self._submit()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "ok":
            self._submit()
        else:
            self.dismiss(None)

    def _submit(self) -> None:
        values = {field.name: field.whole(self.query_one(f"#{field.name}", Input).value.strip()) for field in self._fields}
        try:
            result = self._read(values)
        except InvalidInput as error:
            self.query_one("#problem", Static).update(Text(printable(str(error))))
            if (name := (error.param or "").rpartition(".")[2]) in values:
                self.query_one(f"#{name}").focus()
            return
        self.dismiss(result)

    def action_dismiss_with_nothing(self) -> None:
        self.dismiss(None)


class Help(ModalScreen[None]):
    """Every command, from the table."""

    BINDINGS = [_ESCAPE, Binding("q,question_mark", "dismiss_with_nothing", show=False)]  # noqa: RUF012 - as above

    def __init__(self, commands: Iterable[Command], view: str) -> None:
        super().__init__()
        self._commands, self._view = list(commands), view

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog help"):
            yield Static(self._text())

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).focus()

    def _text(self) -> Group:
        paint = palette_of(self.app).text
        parts: list[Text | Table] = []

        def begin(section: str) -> Table:
            table = Table.grid(Column(width=7), Column(width=15), Column(ratio=1), padding=(0, 1), expand=True)
            parts.extend((paint(Text(section, style=f"bold {ACCENT}")), table))
            return table

        for section, commands in groupby(self._commands, key=lambda command: command.section):
            table = begin(section)
            for command in commands:
                usable = command.is_for(self._view)
                plain, name = (PLAIN, ACCENT) if usable else (MUTED, MUTED)
                table.add_row(
                    paint(Text(command.shown_key, style=plain)),
                    paint(Text(f":{command.name}", style=name)),
                    paint(Text(command.help, style=plain)),
                )
            table.add_row()
        begin("Tables").add_row(
            Text("arrows"), Text("j k PgUp PgDn"), Text("and g, G, the wheel; left and right go through many columns")
        )
        return Group(*parts)

    def action_dismiss_with_nothing(self) -> None:
        self.dismiss(None)
