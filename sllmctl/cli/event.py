"""`sllmctl event`: what happened, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sllmctl.cli.context import Invocation, output_option, pass_invocation
from sllmctl.cli.format import age, short_digest
from sllmctl.cli.output import Column, Format, now
from sllmctl.cli.watch import list_items, watch_option

if TYPE_CHECKING:
    from schema.admin import EventKind, EventView

__all__ = ["command"]


@click.group("event")
def command() -> None:
    """Events: what happened, and why."""


@command.command("ls")
@click.option("--kind", type=click.Choice(["model", "instance", "node", "checkpoint"]), help="Only of this kind of thing.")
@click.option("--object", "name", help="Only of the thing of this name or id, or beginning of a digest.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="So many, the newest.")
@output_option
@watch_option
@pass_invocation
def ls(invocation: Invocation, kind: EventKind | None, name: str | None, limit: int, form: Format, watch: bool) -> None:
    """List events, the newest last.

    \b
    Examples:
      sllmctl event ls --kind model --object qwen
      sllmctl event ls --watch
    """
    from sllmctl import client

    list_items(
        invocation,
        client.events(kind, name, limit),
        "events",
        form,
        _columns,
        lambda event: event.id,
        watch=watch,
        wanted=lambda event: kind in (None, event.kind) and (name is None or _is_of(event, name)),
        limit=limit,
    )


def _is_of(event: EventView, name: str) -> bool:
    """As the manager chooses events: a checkpoint is also meant by a beginning of its digest, as the table shows it."""
    return event.object == name or (event.kind == "checkpoint" and event.object.startswith(name))


def _columns() -> list[Column[EventView]]:
    moment = now()
    return [
        Column("AGE", lambda e: age(moment - e.at), right=True),
        Column("LEVEL", lambda e: e.level),
        Column("OBJECT", lambda e: f"{e.kind}/{short_digest(e.object) if e.kind == 'checkpoint' else e.object}"),
        Column("REASON", lambda e: e.reason),
        Column("ID", lambda e: e.id, wide=True),
        Column("MESSAGE", lambda e: e.message),
    ]
