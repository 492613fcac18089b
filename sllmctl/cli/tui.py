"""`sllmctl tui`, and `sllmctl` alone: the dashboard, with a manager of its own if none answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from schema.errors import Unreachable
from sllmctl import client
from sllmctl.cli.context import Invocation, pass_invocation
from sllmctl.cli.diagnostics import FAILED, OK, ProgressLine, note

if TYPE_CHECKING:
    from sllmctl.cli.embedded import EmbeddedManager
    from sllmctl.config import Settings

__all__ = ["alone", "command"]


@click.command("tui")
@click.option("--read-only", is_flag=True, help="Show everything, change nothing.")
@click.option("--theme", type=click.Choice(["auto", "dark", "light"]), help="Colours for which background  [default: auto].")
@pass_invocation
def command(invocation: Invocation, read_only: bool, theme: str | None) -> int:
    """Watch the cluster and work on it, in the terminal.

    \b
    :models  or 2     go to a view      /word   show the rows that have it
    Enter             what belongs to a row      x   why an instance would go where it would
    ?                 every command

    It needs a manager that answers; `sllmctl` alone starts one if there is none.

    \b
    Examples:
      sllmctl tui
      sllmctl tui --read-only
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("the dashboard needs a terminal; `sllmctl model ls`, `event ls` and the like need none")
    settings = invocation.settings(client__theme=theme)
    with invocation.admin() as admin:
        admin.ask(client.status())
    return _show(settings, read_only=read_only, owned=False)[0]


def alone(invocation: Invocation) -> int:
    """The dashboard, after a manager was started if none answers; on leaving, that one is left serving, drained or stopped."""
    settings = invocation.settings()
    with invocation.admin() as admin:
        try:
            admin.ask(client.status())
        except Unreachable:
            manager = _started(invocation, settings)
        else:
            return _show(settings, read_only=False, owned=False)[0]
    code, ending = _show(settings, read_only=False, owned=True)
    if ending in ("drain", "stop"):
        with ProgressLine() as line:
            manager.end("drain" if ending == "drain" else "stop", lambda: line.show("stopping the manager", None))
    else:
        # Also when the dashboard has failed: that is no reason to end what others may use.
        note(f"the manager goes on serving as process {manager.pid}, which SIGTERM stops; its log is {manager.log}")
    return code


def _started(invocation: Invocation, settings: Settings) -> EmbeddedManager:
    from sllmctl.cli.embedded import EmbeddedManager

    given = {"--config": invocation.file, "--state-dir": invocation.flags.get("state_dir")}
    given["--socket"] = invocation.flags.get("admin_socket")
    flags = [part for name, value in given.items() if value is not None for part in (name, str(Path(value).absolute()))]
    manager = EmbeddedManager(flags, settings.state_dir / "manager.log")
    with ProgressLine() as line, client.AdminClient(settings.admin_socket, settings.client) as admin:
        manager.start()
        manager.wait(lambda: admin.ask(client.status()), lambda: line.show("no manager answers; starting one", None))
    return manager


def _show(settings: Settings, *, read_only: bool, owned: bool) -> tuple[int, str | None]:
    """The exit code, and what is to become of the manager (None: the dashboard itself has failed)."""
    from tui.app import Dashboard
    from tui.background import is_light

    theme = settings.client.theme
    dashboard = Dashboard(
        lambda: client.AsyncAdminClient(settings.admin_socket, settings.client),
        read_only=read_only,
        owned=owned,
        light=theme == "light" or (theme == "auto" and is_light()),
    )
    ending = dashboard.run()
    return (FAILED if dashboard.return_code else OK), ending
