"""`sllmctl operation`: what was asked of checkpoints, while it runs and for a while after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sllmctl.cli.completion import names
from sllmctl.cli.context import Invocation, output_option, pass_invocation
from sllmctl.cli.format import age
from sllmctl.cli.operations import COLUMNS, fields
from sllmctl.cli.output import Column, Format, now, show_item
from sllmctl.cli.watch import list_items, watch_option

if TYPE_CHECKING:
    from schema.admin import OperationView

__all__ = ["command"]

_CANCEL_S = 15.0


@click.group("operation")
def command() -> None:
    """Operations: prefetch, verify, publish, fetch and removal of checkpoints, and how they went."""


@command.command("ls")
@output_option
@watch_option
@pass_invocation
def ls(invocation: Invocation, form: Format, watch: bool) -> None:
    """List the operations that run, and those of late. Ingests are shown with their models: `sllmctl model ls`.

    \b
    Examples:
      sllmctl operation ls
      sllmctl operation ls --watch -o json
    """
    from sllmctl import client

    list_items(invocation, client.operations(), "operations", form, _columns, lambda operation: operation.id, watch=watch)


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


@command.command("cancel")
@click.argument("operation_id", metavar="ID", shell_complete=names("operation"))
@pass_invocation
def cancel(invocation: Invocation, operation_id: str) -> None:
    """End an operation early, and wait until it has ended.

    A fetch that is cancelled leaves nothing on the node, a publish no manifest on the remote, so that nobody fetches it.

    \b
    Examples:
      sllmctl operation cancel op_01k9zj8x
    """
    from schema.errors import Conflict, TimedOut
    from sllmctl import client
    from sllmctl.cli.diagnostics import note

    with invocation.admin() as admin:
        admin.ask(client.cancel_operation(operation_id))
        item = admin.ask(client.wait_operation(operation_id, _CANCEL_S))
    if item.ended_at is None:
        raise TimedOut(f"{operation_id} has not ended after {_CANCEL_S:g} s; `sllmctl operation show {operation_id}` says when")
    if item.fault is None:
        raise Conflict(f"{operation_id} was over before it could be cancelled")
    note(f"{operation_id} ({item.kind}) has ended: {item.fault.message}")


def _columns() -> list[Column[OperationView]]:
    moment = now()
    return [
        Column("ID", lambda o: o.id),
        *(column for column in COLUMNS if column.header != "ID"),
        Column("AGE", lambda o: age(moment - o.began_at), right=True),
    ]
