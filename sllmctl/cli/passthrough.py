"""The node's processes under the one executable: hidden verbs that become `python -m agent`, arguments untouched."""

from __future__ import annotations

import os
import sys

import click

__all__ = ["agent", "ingest", "store", "zygote"]


_RAW = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def _verb(role: str) -> click.Command:
    @click.command(role, hidden=True, add_help_option=False, context_settings=_RAW)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def verb(arguments: tuple[str, ...]) -> None:
        # The process is replaced, not wrapped: whoever started it supervises the agent itself, by this pid.
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "agent", role, *arguments])  # noqa: S606

    return verb


agent = _verb("agent")
store = _verb("store")
zygote = _verb("zygote")
ingest = _verb("ingest")
