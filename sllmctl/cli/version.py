"""`sllmctl version`."""

from __future__ import annotations

import platform

import click

from sllmctl.cli.output import write

__all__ = ["command"]


@click.command("version")
def command() -> None:
    """Print the version of sllmctl and of its Python."""
    from sllmctl import __version__

    write(f"sllmctl {__version__} (Python {platform.python_version()})")
