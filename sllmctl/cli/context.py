"""What one invocation shares: the flags given before the command, the settings made of them, and the manager's client."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sllmctl.cli.output import FORMATS, REPORT_FORMATS

if TYPE_CHECKING:
    from sllmctl.cli.waiting import Patience
    from sllmctl.client import AdminClient
    from sllmctl.config import Settings

__all__ = ["Invocation", "Real", "output_option", "pass_invocation", "report_option", "timeout_option", "yes_option"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Invocation:
    """``flags`` are by dotted key of the settings; ``file`` is --config."""

    flags: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None

    def settings(self, **more: Any) -> Settings:
        """The settings, ``more`` flags (with ``__`` for the dots) above those given before the command."""
        import os

        from sllmctl.config import Settings

        own = {key.replace("__", "."): value for key, value in more.items() if value is not None}
        return Settings.load({**self.flags, **own}, os.environ, self.file)

    def admin(self, patience: Patience | None = None) -> AdminClient:
        """A client of the manager that the settings name, which asks no longer than ``patience`` lasts; use it as a context
        manager."""
        from sllmctl.client import AdminClient

        settings = self.settings()
        return AdminClient(settings.admin_socket, settings.client, patience)

    def patience(self, timeout_s: float | None) -> Patience:
        """How long a command waits: as long as it was told to, else as the settings say."""
        from sllmctl.cli.waiting import Patience

        return Patience(self.settings().client.wait_s if timeout_s is None else timeout_s)


class Real(click.FloatRange):
    """A number of a range. Its own ranges let through what is no number, NaN, since that is neither above nor below."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is not a number", param, ctx) if math.isnan(number) else number


pass_invocation = click.make_pass_decorator(Invocation)


def output_option(command: F) -> F:
    """``-o table|wide|json|yaml|name``, given to the command as ``form``."""
    return click.option(
        "-o", "--output", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print."
    )(command)


def report_option(command: F) -> F:
    """``-o table|wide|json|yaml``, given to the command as ``form``: for what is no list of things with names."""
    return click.option(
        "-o", "--output", "form", type=click.Choice(REPORT_FORMATS), default="table", show_default=True, help="How to print."
    )(command)


def timeout_option(command: F) -> F:
    """``--timeout SECONDS``, for `Invocation.patience`; whatever the command asks the manager is to keep to it."""
    return click.option("--timeout", type=Real(0, min_open=True), metavar="SECONDS", help="Wait no longer.")(command)


def yes_option(command: F) -> F:
    """``-y``: the answer to the question that a destructive command asks."""
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(command)
