"""`sllmctl doctor`: what is wrong with this machine, and what to do."""

from __future__ import annotations

import os

import click

from sllmctl.cli.context import Invocation, output_option, pass_invocation
from sllmctl.cli.diagnostics import DOCTOR_FAULT, OK, note
from sllmctl.cli.output import Column, Format, show_items

__all__ = ["command"]


@click.command("doctor")
@output_option
@pass_invocation
def command(invocation: Invocation, form: Format) -> int:
    """Check this machine: what sllmctl needs, what runs, what is in the way. Exits with 8 if something must be mended.

    It changes nothing, and needs neither root nor a manager, though each may show it more. docs/doctor.md lists the checks.

    \b
    Examples:
      sllmctl doctor
      sllmctl doctor -o json
    """
    from schema.errors import InvalidInput
    from sllmctl.cli.checks import Finding, check_machine, check_python
    from sllmctl.config import config_file
    from sllmctl.state.engines import database_path

    try:
        settings = invocation.settings()
        database_path(settings.database_url)
    except InvalidInput as error:
        findings = [*check_python(), Finding("config", "fault", str(error), "mend or remove this setting")]
    else:
        findings = [
            *check_python(),
            Finding("config", "ok", f"settings are sound; state in {settings.state_dir}"),
            *check_machine(settings, config_file(os.environ, invocation.file)[0]),
        ]
    columns: list[Column[Finding]] = [
        Column("CHECK", lambda f: f.check),
        Column("LEVEL", lambda f: f.level),
        Column("FINDING", lambda f: f.message + (f"; {f.advice}" if f.advice else "")),
    ]
    show_items(form, findings, columns, lambda finding: finding.check)
    faults, warnings = (sum(f.level == level for f in findings) for level in ("fault", "warn"))
    note(f"faults: {faults}, warnings: {warnings}")
    return DOCTOR_FAULT if faults else OK
