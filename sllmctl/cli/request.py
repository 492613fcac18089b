"""`sllmctl request`: those that run, and the latest that ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sllmctl.cli.completion import names
from sllmctl.cli.context import Invocation, output_option, pass_invocation, yes_option
from sllmctl.cli.format import age, duration
from sllmctl.cli.output import Column, Format, now, show_item
from sllmctl.cli.phases import engine_text, start_text, timeline_text
from sllmctl.cli.watch import list_items, watch_option

if TYPE_CHECKING:
    from schema.admin import RequestView

__all__ = ["command"]


@click.group("request")
def command() -> None:
    """Requests: those that run, and the latest that ended."""


@command.command("ls")
@output_option
@watch_option
@pass_invocation
def ls(invocation: Invocation, form: Format, watch: bool) -> None:
    """List the requests that run, and the latest that ended.

    \b
    Examples:
      sllmctl request ls
      sllmctl request ls --watch -o json
    """
    from sllmctl import client

    list_items(invocation, client.requests(), "requests", form, _columns, lambda request: request.id, watch=watch)


@command.command("show")
@click.argument("request_id", metavar="ID", shell_complete=names("request"))
@output_option
@pass_invocation
def show(invocation: Invocation, request_id: str, form: Format) -> None:
    """Show one request: where its time went, and why it failed. Ended ones are forgotten when the manager starts anew.

    \b
    Examples:
      sllmctl request show req_01k9zj8x
    """
    from sllmctl import client

    with invocation.admin() as admin:
        item = admin.ask(client.request(request_id))
    show_item(form, item, _fields, lambda request: request.id)


@command.command("cancel")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=names("request"))
@yes_option
@pass_invocation
def cancel(invocation: Invocation, ids: tuple[str, ...], yes: bool) -> None:
    """Cancel requests: their streams end, and their tokens are generated no further.

    \b
    Examples:
      sllmctl request cancel req_01k9zj8x -y
    """
    from sllmctl import client
    from sllmctl.cli.diagnostics import Refusals, confirm, note

    def ask(request_id: str) -> None:
        admin.ask(client.cancel_request(request_id))
        note(f"request {request_id} is cancelled")

    confirm(f"Cancel {', '.join(ids)}? Clients get no more of the replies.", yes)
    with invocation.admin() as admin, Refusals() as refusals:
        refusals.each(ids, ask)


def _columns() -> list[Column[RequestView]]:
    moment = now()
    return [
        Column("ID", lambda r: r.id),
        Column("MODEL", lambda r: r.model),
        Column("STATE", _state),
        Column("START", lambda r: "cold" if r.timeline.cold else "warm"),
        Column("PROMPT", lambda r: str(r.prompt_tokens), right=True),
        Column("GENERATED", lambda r: str(r.generated_tokens), right=True),
        Column("FIRST TOKEN", lambda r: _seconds(r.timeline.first_token_s), right=True),
        Column("TOTAL", lambda r: _seconds(r.timeline.ended_s), right=True),
        Column("AGE", lambda r: age(moment - r.received_at), right=True),
        Column("ATTEMPTS", lambda r: str(r.attempts), wide=True, right=True),
        Column("NODE", lambda r: r.node or "-", wide=True),
        Column("INSTANCE", lambda r: r.instance or "-", wide=True),
    ]


def _fields(request: RequestView) -> list[tuple[str, str]]:
    timeline = request.timeline
    fields = [
        ("Id", request.id),
        ("Model", request.model),
        ("State", str(request.state)),
        ("Node", request.node or "none"),
        ("Instance", request.instance or "none"),
        ("Attempts", str(request.attempts)),
        ("Tokens", f"{request.prompt_tokens} prompt, {request.generated_tokens} generated"),
        ("Orphaned", "yes: found on a node, without a client" if request.orphaned else "no"),
        ("Age", age(now() - request.received_at)),
        ("Timeline", timeline_text(timeline)),
    ]
    if request.fault is not None:
        fields.append(("Fault", f"{request.fault.message} ({request.fault.code})"))
    if timeline.start is not None:
        fields.append(("Cold start", start_text(timeline.start)))
    if timeline.engine is not None:
        fields.append(("Engine", engine_text(timeline.engine)))
    return fields


def _state(request: RequestView) -> str:
    state = f"{request.state},orphaned" if request.orphaned else str(request.state)
    return state if request.fault is None else f"{state} ({request.fault.code})"


def _seconds(value: float | None) -> str:
    return "-" if value is None else duration(value)
