"""What a view is: rows made of the live model, columns, and the text of the detail pane. No widgets, nothing that lasts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from rich.console import Group
from rich.table import Column as TableColumn
from rich.table import Table
from rich.text import Text

from schema.admin import FailingView, ProgressView
from schema.errors import Fault
from schema.link import StartPhases
from tui.feed import Cluster
from tui.format import ACCENT, BAD, MUTED, PLAIN, WARN, Cell, Span, bar, printable, rate, seconds, size
from tui.grid import Column
from tui.palette import Palette

__all__ = ["Detail", "Scope", "View", "filtered", "progress_cell"]

T = TypeVar("T")
_LABEL = 12


class Scope(NamedTuple):
    """Only rows whose ``field`` is ``value``."""

    field: str
    value: str

    def __str__(self) -> str:
        return f"{self.field} {self.value}"


class View(ABC, Generic[T]):
    """``name`` and ``aliases`` are what ``:`` takes; ``sort`` is the column that it begins with. ``empty`` is said when there
    is nothing. With ``follows_end`` the newest row is at the end, and a cursor there goes on with it."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    help: ClassVar[str]
    empty: ClassVar[str] = "nothing here"
    sort: ClassVar[tuple[str, bool]] = ("", False)
    follows_end: ClassVar[bool] = False

    @abstractmethod
    def columns(self, cluster: Cluster) -> Sequence[Column[T]]: ...

    @abstractmethod
    def rows(self, cluster: Cluster) -> Iterable[T]: ...

    @abstractmethod
    def key(self, row: T) -> str: ...

    @abstractmethod
    def words(self, row: T) -> str:
        """What the filter looks in."""

    @abstractmethod
    def detail(self, row: T, cluster: Cluster) -> Detail: ...

    def nothing(self, cluster: Cluster, scope: Scope | None) -> str:
        """What is said when there is no row, of all or of a scope."""
        return self.empty

    def drill(self, row: T) -> tuple[str, Scope] | None:
        """Where Enter leads: another view, and what of it."""
        return None


class Detail:
    """What the detail pane shows, built a line at a time."""

    def __init__(self, title: str) -> None:
        self._parts: list[Text | list[tuple[str, Text]]] = [_text([Span(title, "bold")]), Text()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Detail) and self._parts == other._parts

    def field(self, label: str, value: str | Span | Sequence[Span]) -> Detail:
        """A labelled value, beside which its further lines stay; one that is "" is left out."""
        spans = [Span(value)] if isinstance(value, str) else [value] if isinstance(value, Span) else list(value)
        if any(span.text for span in spans):
            if not isinstance(self._parts[-1], list):
                self._parts.append([])
            fields = self._parts[-1]
            assert isinstance(fields, list)
            fields.append((label, _text(spans)))
        return self

    def head(self, title: str) -> Detail:
        self._parts += [Text(), _text([Span(title, f"bold {ACCENT}")])]
        return self

    def line(self, *spans: Span | str) -> Detail:
        self._parts.append(_text([Span(span) if isinstance(span, str) else span for span in spans]))
        return self

    def shown(self, palette: Palette) -> Group:
        """As a terminal of that palette shows it."""
        drawn: list[Text | Table] = []
        for part in self._parts:
            if isinstance(part, Text):
                drawn.append(palette.text(part))
                continue
            table = Table.grid(TableColumn(width=_LABEL), TableColumn(overflow="fold"))
            for label, value in part:
                table.add_row(palette.text(Text(label, style=MUTED)), palette.text(value))
            drawn.append(table)
        return Group(*drawn)

    def fault(self, fault: Fault | None) -> Detail:
        if fault is not None:
            self.head("fault").line(Span(f"{fault.code}: {fault.message}", BAD))
        return self

    def failing(self, failing: FailingView, now: float) -> Detail:
        """What is wrong with an instance, and when it is tried again."""
        again = "once another node is there, or a copy is sound"
        if failing.retry_at is not None:
            again = f"in {seconds(max(0.0, failing.retry_at - now))}"
        self.head("failing").line(Span(f"{failing.instance} on {failing.node}", MUTED)).field("next try", again)
        return self.fault(failing.fault)

    def start(self, title: str, phases: StartPhases) -> Detail:
        """Where the time of a start went."""
        source = phases.loaded_from
        moved = f"{size(phases.loaded_bytes)} from {source}" if phases.loaded_bytes else f"weights were in {source}"
        self.head(f"{title}: {seconds(phases.total_s)}")
        self.field("load", [Span(f"{seconds(phases.load_s):<8}"), Span(moved if source else "weights were there", MUTED)])
        for name in ("fork", "build", "attach", "warm"):
            self.field(name, seconds(getattr(phases, f"{name}_s")))
        return self

    def progress(self, progress: ProgressView | None) -> Detail:
        if progress is not None and progress.total_bytes:
            part = progress.done_bytes / progress.total_bytes
            self.head(progress.doing).line(*bar(part, 20), f" {part:.0%}")
            self.line(f"{size(progress.done_bytes)} of {size(progress.total_bytes)} ", Span(rate(progress.rate_bps), MUTED))
        return self


def _text(spans: Iterable[Span]) -> Text:
    text = Text(style=PLAIN)
    for part, style in spans:
        text.append(printable(part), style=style)
    return text


def progress_cell(progress: ProgressView | None) -> Cell:
    """How much of what is on its way is there, and at which rate it comes."""
    if progress is None or not progress.total_bytes:
        return ""
    part = progress.done_bytes / progress.total_bytes
    return [Span(f"{part:>4.0%} ", WARN), *bar(part, 8), Span(f" {rate(progress.now_bps or progress.rate_bps)}", MUTED)]


def filtered(rows: Iterable[T], text: str, words: Callable[[T], str]) -> list[T]:
    """The rows in which every word of the filter is, in any case of letters; a word after ``!`` must not be."""
    wanted = [word for word in text.lower().split() if word != "!"]
    if not wanted:
        return list(rows)

    def fits(row: Any) -> bool:
        found = words(row).lower()
        return all((word[1:] not in found) if word.startswith("!") else (word in found) for word in wanted)

    return [row for row in rows if fits(row)]
