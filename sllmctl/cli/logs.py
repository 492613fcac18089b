"""``logs`` of a model, an instance or a node: what was written there, printed and followed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from sllmctl.cli.context import Invocation
from sllmctl.cli.diagnostics import note
from sllmctl.cli.output import stream, write
from sllmctl.cli.reader import while_read

if TYPE_CHECKING:
    from schema.admin import LogFrame

__all__ = ["log_options", "show_logs"]

F = TypeVar("F", bound=Callable[..., Any])
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class _Since(click.ParamType):  # type: ignore[type-arg]
    """How long ago, in seconds."""

    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value)
        if (age := re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)) is not None:
            return float(age[1]) * _UNITS[age[2]]
        try:
            then = datetime.fromisoformat(text).astimezone()
        except ValueError:
            self.fail(f"{text!r} is neither an age (30s, 5m, 2h, 1d) nor a time (2026-11-28T20:37:01Z)", param, ctx)
        return max(0.001, time.time() - then.timestamp())


def log_options(command: F) -> F:
    """``-f``, ``--tail``, ``--since`` and ``-o``, given to the command as ``follow``, ``tail``, ``since_s`` and ``form``."""
    for option in (
        click.option("-o", "--output", "form", type=click.Choice(["table", "json"]), default="table", show_default=True,
                     help="Lines as they were written, or an object a line."),
        click.option("--since", "since_s", type=_Since(), default=0.0, metavar="AGE|TIME",
                     help="Only what is not older: 30s, 5m, 2h, or a time.", show_default=False),
        click.option("--tail", type=click.IntRange(0, 100_000), default=None,
                     help="So many of the last lines of each  [default: 100; all, with --since]"),
        click.option("-f", "--follow", is_flag=True, help="Go on and print what is written."),
    ):  # fmt: skip
        command = option(command)
    return command


def show_logs(
    invocation: Invocation,
    noun: Literal["model", "instance", "node"],
    name: str,
    part: str | None,
    *,
    follow: bool,
    tail: int | None,
    since_s: float,
    form: str,
) -> None:
    """Print the lines; followed, until interrupted or read no more. Raises Unreachable when the manager goes away."""
    from sllmctl import client

    lines = (100_000 if since_s else 100) if tail is None else tail
    wanted = client.LogQuery(noun, name, part, lines, since_s)
    printer = _Printer(form, several=noun == "model" and part is None)
    with invocation.admin() as admin:
        if not follow:
            printer.show(admin.ask(client.logs(wanted)))
            return
        with while_read(admin.break_off):
            for frame in admin.follow_logs(wanted):
                printer.show(frame)


class _Printer:
    """``several``: lines of more than one source may come, so each says whose it is. Nodes whose lines may be missing are noted
    once for each reason."""

    def __init__(self, form: str, *, several: bool) -> None:
        self._json, self._several = form == "json", several
        self._lost: dict[str, str] = {}

    def show(self, frame: LogFrame) -> None:
        for node, why in frame.lost.items():
            if self._lost.get(node) != why:
                note(f"node {node}: {why}")
        self._lost = frame.lost
        if self._json:
            import msgspec

            for line in frame.items:
                write(msgspec.json.encode(line).decode())
            return
        for line in frame.items:
            stream(f"[{line.source}] {line.text}\n" if self._several else f"{line.text}\n")
