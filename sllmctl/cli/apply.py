"""`sllmctl apply` and `sllmctl diff`: models as files say, with what would change told field by field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sllmctl.cli.context import Invocation, output_option, pass_invocation, timeout_option, yes_option
from sllmctl.cli.format import printable
from sllmctl.cli.output import Column, Format, show_items, write

if TYPE_CHECKING:
    from schema.admin import AppliedView, ChangeView
    from sllmctl.client import AdminClient, Until
    from sllmctl.specs.files import Entry

__all__ = ["apply", "diff"]

F = TypeVar("F", bound=Callable[..., Any])


def _file_options(function: F) -> F:
    options = (
        click.option(
            "-f",
            "--file",
            "files",
            multiple=True,
            required=True,
            metavar="FILE|DIR|-",
            type=click.Path(),
            help="Specs in YAML or JSON: a file, the files of a directory, or - for standard input; may be repeated.",
        ),
        click.option("--no-deploy", is_flag=True, help="Leave it as it is whether they are served; ingest new ones only."),
        click.option("--prune", is_flag=True, help="Remove the models that stand in none of the files."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command("apply")
@_file_options
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--wait", is_flag=True, help="Return when the models are ready.")
@timeout_option
@yes_option
@output_option
@pass_invocation
def apply(
    invocation: Invocation,
    /,
    files: tuple[str, ...],
    no_deploy: bool,
    prune: bool,
    dry_run: bool,
    wait: bool,
    timeout: float | None,
    yes: bool,
    form: Format,
) -> None:
    """Make models as files say: new ones are ingested and served, others configured anew.

    All of it is checked before anything is changed, and done at once or not at all; what is so already is left as it is. A new
    engine configuration restarts a model's instances. Another source is refused: that is another model. --prune asks before it
    removes models.

    \b
    Examples:
      sllmctl apply -f models.yaml --wait
      sllmctl apply -f ./models/ --prune --dry-run
      sllmctl model spec qwen | sed 's/max: 1/max: 4/' | sllmctl apply -f -
    """
    from sllmctl import client
    from sllmctl.cli.diagnostics import Refusals, confirm, note
    from sllmctl.cli.waiting import wait_for

    entries = _entries(files)
    specs = [entry.spec for entry in entries]
    patience = invocation.patience(timeout)
    with invocation.admin(patience) as admin:
        told = _plan(admin, entries, deploy=not no_deploy, prune=prune)
        going = [each.name for each in told if each.action == "removed"]
        if not dry_run:
            if going:
                confirm(f"Remove {', '.join(going)}, which no file has, and the checkpoints that no other model uses?", yes)
                if not yes:
                    patience.restart()
            told = admin.ask(client.apply_models(specs, going, deploy=not no_deploy))
        show_items(form, told, _COLUMNS, lambda each: each.name)
        if dry_run:
            note("nothing was changed")
        elif wait:
            until: Until = "ingested" if no_deploy else "ready"
            with Refusals() as refusals:
                refusals.each([spec.name for spec in specs], lambda name: wait_for(admin, name, until, patience))


@click.command("diff")
@_file_options
@output_option
@pass_invocation
def diff(invocation: Invocation, /, files: tuple[str, ...], no_deploy: bool, prune: bool, form: Format) -> int:
    """Say field by field what `sllmctl apply` would change. Exits with 1 when that is anything, with 0 when it is nothing.

    \b
    Examples:
      sllmctl diff -f models.yaml
      sllmctl diff -f ./models/ --prune -o json
    """
    from sllmctl.cli.diagnostics import FAILED, OK

    entries = _entries(files)
    with invocation.admin() as admin:
        told = _plan(admin, entries, deploy=not no_deploy, prune=prune)
    changed = [each for each in told if each.action != "unchanged"]
    if form in ("table", "wide"):
        for each in told if form == "wide" else changed:
            _write_changes(each)
    else:
        show_items(form, changed, _COLUMNS, lambda each: each.name)
    return FAILED if changed else OK


def _entries(files: Sequence[str]) -> list[Entry]:
    from sllmctl.cli.diagnostics import note
    from sllmctl.specs.files import read_specs

    entries = read_specs(files)
    for entry in entries:
        for line in entry.notes:
            note(f"warning: {line}")
    return entries


def _plan(admin: AdminClient, entries: Sequence[Entry], *, deploy: bool, prune: bool) -> tuple[AppliedView, ...]:
    """What would change. Raises the refusals, each with the place that asks for it."""
    from schema.errors import Fault
    from sllmctl import client

    by_name = {entry.spec.name: entry for entry in entries}
    going = [model.name for model in admin.ask(client.models()) if model.name not in by_name] if prune else []
    specs = [entry.spec for entry in entries]
    told = admin.ask(client.apply_models(specs, going, deploy=deploy, dry_run=True))
    faults = [(by_name[each.name].place(each.key), each.fault) for each in told if each.fault is not None]
    if faults:
        raise Fault(faults[0][1].code, "\n".join(f"{place}: {fault.message}" for place, fault in faults)).to_error()
    return told


def _write_changes(told: AppliedView) -> None:
    sign = {"created": "+", "removed": "-", "unchanged": " "}.get(told.action, "~")
    restarts = f", restarts {told.restarts} instance{'' if told.restarts == 1 else 's'}" if told.restarts else ""
    write(printable(f"{sign} model {told.name}: {told.action}{restarts}"))
    for change in told.changes:
        write(printable(f"    {_change(change)}"))


def _change(change: ChangeView) -> str:
    before = f"{_value(change.old)} -> " if change.old is not None else ""
    return f"{change.key}: {before}{_value(change.new)}"


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_COLUMNS: list[Column[AppliedView]] = [
    Column("MODEL", lambda a: a.name),
    Column("ACTION", lambda a: a.action),
    Column("RESTARTS", lambda a: str(a.restarts), right=True),
    Column("CHANGES", lambda a: ", ".join(_change(each) for each in a.changes) or "-"),
]
