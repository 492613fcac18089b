"""``ls --watch``: a list that goes on, told by the manager's event stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sllmctl.cli.context import Invocation
from sllmctl.cli.output import Column, Format, Watch, show_items
from sllmctl.cli.reader import while_read

if TYPE_CHECKING:
    from schema.admin import StreamKind
    from sllmctl.client import Call

__all__ = ["list_items", "watch_option"]

F = TypeVar("F", bound=Callable[..., Any])


def watch_option(command: F) -> F:
    """``-w``, given to the command as ``watch``."""
    return click.option(
        "-w",
        "--watch",
        is_flag=True,
        help="Go on and print what changes; under -o json an object a line, {gone: NAME} at its end.",
    )(command)


def list_items(
    invocation: Invocation,
    call: Call[Any],
    kind: StreamKind,
    form: Format,
    columns: Callable[[], Sequence[Column[Any]]],
    name: Callable[[Any], str],
    *,
    watch: bool,
    key: Callable[[Any], str] | None = None,
    wanted: Callable[[Any], bool] = lambda _: True,
    limit: int | None = None,
) -> None:
    """The ``ls`` of a noun: print what ``call`` answers.

    With ``watch`` print instead the list that the stream tells, of it the last ``limit``, then each item that is new or has
    changed, if ``wanted``, until interrupted or read no more; ``key`` is what the stream knows an item by, else its name.
    Raises Unreachable when the manager goes away.
    """
    from sllmctl.cli.diagnostics import note

    if watch:
        _watch_items(invocation, kind, form, columns, name, key=key, wanted=wanted, limit=limit)
        return
    with invocation.admin() as admin:
        items = admin.ask(call)
    show_items(form, items, columns(), name)
    if not items and form in ("table", "wide"):
        note(f"no {kind}")


def _watch_items(
    invocation: Invocation,
    kind: StreamKind,
    form: Format,
    columns: Callable[[], Sequence[Column[Any]]],
    name: Callable[[Any], str],
    *,
    key: Callable[[Any], str] | None,
    wanted: Callable[[Any], bool],
    limit: int | None,
) -> None:
    shown = Watch(form, columns, name)
    names: dict[str, str] = {}
    first: list[Any] | None = []
    with invocation.admin() as admin, while_read(admin.break_off):
        for frame in admin.follow(kinds=(kind,)):
            items = [item for item in getattr(frame, kind) if wanted(item)]
            names.update({(key or name)(item): name(item) for item in items})
            if first is not None:
                first += items
                if frame.more:
                    continue
                items, first = first[-limit:] if limit else first, None
            shown.show(items)
            for gone in frame.gone.get(kind, ()):
                if gone in names:
                    shown.gone(names.pop(gone))
