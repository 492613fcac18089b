"""`sllmctl schema`: what an editor needs to complete and check files of specs."""

from __future__ import annotations

import click

from sllmctl.cli.output import write

__all__ = ["command"]


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of the files that `sllmctl apply -f` takes.

    An editor with a YAML language server uses it when the first line of such a file names it:
    # yaml-language-server: $schema=PATH

    \b
    Examples:
      sllmctl schema > model-spec.schema.json
    """
    from sllmctl.specs.published import schema_text

    write(schema_text())
