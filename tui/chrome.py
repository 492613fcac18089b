"""The lines around the table: how the manager is, the views, what is shown, the keys. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from tui.commands import Command
from tui.feed import Cluster
from tui.format import ACCENT, BAD, GOOD, MUTED, PLAIN, WARN, age, count, printable
from tui.views import VIEWS, Scope

__all__ = ["footer_line", "status_line", "tab_at", "tabs_line", "title_line"]

_WHOLE_TABS = 116
_SHORT = {"instances": "inst", "requests": "reqs", "checkpoints": "ckpts", "operations": "ops", "explain": "why"}
"""Names of views for a terminal too narrow for whole ones."""


def status_line(cluster: Cluster, width: int, read_only: bool) -> Text:
    """Whether the picture is live, and the cluster in a few numbers."""
    text = Text(no_wrap=True, overflow="ellipsis")
    status = cluster.status
    if cluster.lost is not None:
        if status is None:
            text.append(" ○ no manager yet, trying again ", style=f"bold {WARN}")
        else:
            text.append(f" ✖ stale {age(cluster.stale_s())}, trying again ", style=f"bold {BAD} reverse")
        text.append(f" {printable(cluster.lost)}", style=WARN)
        return text
    text.append(" ● live", style=f"bold {GOOD}" if status is not None and status.ready else f"bold {WARN}")
    if status is not None:
        text.append("  nodes ", style=MUTED)
        text.append(f"{status.nodes_ready}/{status.nodes}", style=GOOD if status.nodes_ready == status.nodes else WARN)
    text.append("  models ", style=MUTED)
    text.append(count(len(cluster.models)), style=PLAIN)
    text.append("  instances ", style=MUTED)
    text.append(count(len(cluster.instances)), style=PLAIN)
    text.append("  run ", style=MUTED)
    text.append(count(cluster.running), style=GOOD if cluster.running else PLAIN)
    text.append("  wait ", style=MUTED)
    text.append(count(cluster.waiting), style=WARN if cluster.waiting else PLAIN)
    text.append(f"  {cluster.tokens_per_s():.0f}", style=PLAIN)
    text.append(" tok/s", style=MUTED)
    right = "read-only  " if read_only else ""
    if status is not None:
        right += f"{status.api_url}  up {age(cluster.now() - status.started_at)}  {status.version} "
    if text.cell_len + len(right) + 2 <= width:
        text.append(" " * (width - text.cell_len - len(right)))
        text.append(right, style=MUTED)
    elif read_only:
        text.append("  read-only", style=WARN)
    return text


def tabs_line(current: str, width: int) -> Text:
    """The views with their numbers."""
    text = Text(" ", no_wrap=True)
    for number, (name, label) in enumerate(_labels(width), 1):
        here = name == current
        style = f"bold ink on {ACCENT}" if here else PLAIN
        text.append(f" {number} ", style=style if here else MUTED)
        text.append(f"{label} ", style=style)
    return text


def tab_at(x: int, width: int) -> str | None:
    """The view whose tab is at ``x``."""
    begin = 1
    for name, label in _labels(width):
        end = begin + len(label) + 4
        if begin <= x < end:
            return name
        begin = end
    return None


def _labels(width: int) -> list[tuple[str, str]]:
    return [(kind.name, kind.name if width >= _WHOLE_TABS else _SHORT.get(kind.name, kind.name)) for kind in VIEWS]


def title_line(view: str, scope: Scope | None, filter_: str, at: int, shown: int, total: int, sort: tuple[str, bool]) -> Text:
    """What the table shows of what there is."""
    text = Text(f" {view}", style=f"bold {PLAIN}", no_wrap=True, overflow="ellipsis")
    if scope is not None:
        text.append(f"  of {printable(str(scope))}", style=ACCENT)
    if filter_:
        text.append(f"  /{printable(filter_)}", style=WARN)
    if total:
        text.append(f"  {at} of {shown}" if shown == total else f"  {at} of {shown}, {total} in all", style=MUTED)
    if sort[0]:
        text.append(f"  by {sort[0]}{', turned round' if sort[1] else ''}", style=MUTED)
    return text


def footer_line(commands: Sequence[Command], width: int) -> Text:
    """Keys and their words, as many as fit: how to get help, then what this view can do."""
    text = Text(" ", no_wrap=True)
    for command in sorted(commands, key=lambda one: (one.name != "help", not one.writes)):
        if command.hint and text.cell_len + len(command.shown_key) + len(command.hint) + 3 <= width:
            text.append(command.shown_key, style=f"bold {ACCENT}")
            text.append(f" {command.hint}  ", style=MUTED)
    return text
