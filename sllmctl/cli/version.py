"""`sllmctl version`."""

from __future__ import annotations

import platform

import click

from sllmctl.cli.output import write

__all__ = ["command"]


@click.command("version")
def command() -> None:
    """Print the version of sllmctl and of its Python, and where a single-file build is unpacked.

    \b
    Examples:
      sllmctl version
    """
    from sllmctl import __version__
    from sllmctl.bundle import unpacked_root

    root = unpacked_root()
    bundle = "" if root is None else f", single file, unpacked in {root}"
    write(f"sllmctl {__version__} (Python {platform.python_version()}{bundle})")
