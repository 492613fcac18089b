"""`sllmctl bench`: measurements that the manager has made of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sllmctl.cli.context import Invocation, pass_invocation, report_option
from sllmctl.cli.format import duration
from sllmctl.cli.output import Column, ReportFormat, show_item, show_items, write

if TYPE_CHECKING:
    from schema.admin import EstimateErrorView

__all__ = ["command"]


@click.group("bench")
def command() -> None:
    """Measurements: how good the planner's estimates are."""


@command.command("estimates")
@report_option
@pass_invocation
def estimates(invocation: Invocation, form: ReportFormat) -> None:
    """Show how far the planner's estimates were from what happened, by kind and by the tier that the weights came from.

    BIAS is the mean of actual minus estimated: above 0, things took longer than was thought. P50, P90 and P99 are quantiles
    of the error, whichever way; ACTUAL is the median of what happened. With -o wide come the coefficients that estimates are
    made of, with json and yaml the latest outcomes too.

    \b
    Examples:
      sllmctl bench estimates
      sllmctl bench estimates -o json
    """
    from sllmctl import client
    from sllmctl.cli.diagnostics import note

    with invocation.admin() as admin:
        view = admin.ask(client.estimates())
    if form in ("json", "yaml"):
        show_item(form, view, lambda _: (), lambda _: "")
        return
    show_items(form, view.errors, _columns(), lambda error: error.kind)
    if not view.errors:
        note("nothing has been both estimated and measured yet")
    if form == "wide" and view.coefficients:
        write("")
        columns: list[Column[tuple[str, float]]] = [
            Column("COEFFICIENT", lambda c: c[0]),
            Column("VALUE", lambda c: f"{c[1]:.4g}", right=True),
        ]
        show_items(form, sorted(view.coefficients.items()), columns, lambda c: c[0])


def _columns() -> list[Column[EstimateErrorView]]:
    return [
        Column("KIND", lambda e: e.kind),
        Column("SOURCE", lambda e: e.source or "-"),
        Column("COUNT", lambda e: str(e.count), right=True),
        Column("BIAS", lambda e: ("-" if e.bias_s < 0 else "+") + duration(abs(e.bias_s)), right=True),
        Column("P50", lambda e: duration(e.p50_s), right=True),
        Column("P90", lambda e: duration(e.p90_s), right=True),
        Column("P99", lambda e: duration(e.p99_s), right=True),
        Column("ACTUAL", lambda e: duration(e.median_actual_s), right=True),
    ]
