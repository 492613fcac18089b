"""`sllmctl operation`: what was asked of checkpoints, while it runs and for a while after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sllmctl.cli.completion import names
from sllmctl.cli.context import Invocation, output_option, pass_invocation
from sllmctl.cli.format import age
from sllmctl.cli.operations import COLUMNS, fields
from sllmctl.cli.output import Column, Format, now, show_item, show_items
from sllmctl.cli.watch import watch_items, watch_option

if TYPE_CHECKING:
    from schema.admin import OperationView

__all__ = ["command"]


@click.group("operation")
def command() -> None:
    """Operations: prefetch, verify, publish, fetch and removal of checkpoints, and how they went."""


@command.command("ls")
@output_option
@watch_option
@pass_invocation
def ls(invocation: Invocation, form: Format, watch: bool) -> None:
    """List the operations that run, and those of late.

    \b
    Examples:
      sllmctl operation ls
      sllmctl operation ls --watch -o json
    """
    from sllmctl import client

    if watch:
        watch_items(invocation, "operations", form, _columns, lambda operation: operation.id)
        return
    with invocation.admin() as admin:
        items = admin.ask(client.operations())
    show_items(form, items, _columns(), lambda operation: operation.id)


@command.command("show")
@click.argument("operation_id", metavar="ID", shell_complete=names("operation"))
@output_option
@pass_invocation
def show(invocation: Invocation, operation_id: str, form: Format) -> None:
    """Show one operation.

    \b
    Examples:
      sllmctl operation show op_01k9zj8x -o yaml
    """
    from sllmctl import client

    with invocation.admin() as admin:
        item = admin.ask(client.operation(operation_id))
    show_item(form, item, fields, lambda operation: operation.id)


def _columns() -> list[Column[OperationView]]:
    moment = now()
    return [
        Column("ID", lambda o: o.id),
        *(column for column in COLUMNS if column.header != "ID"),
        Column("AGE", lambda o: age(moment - o.began_at), right=True),
    ]
