"""`sllmctl bench`: measurements that the manager has made of itself, and of how fast this machine loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sllmctl.cli.context import Invocation, pass_invocation, report_option
from sllmctl.cli.format import bandwidth, duration, short_digest, size
from sllmctl.cli.output import Column, ReportFormat, show_item, show_items, write

if TYPE_CHECKING:
    from schema.admin import EstimateErrorView
    from schema.loadreport import LoadReport, LoadRow
    from sllmctl.config import Settings

__all__ = ["command"]


_DIRECTORY = click.Path(path_type=Path, exists=True, file_okay=False)


@click.group("bench")
def command() -> None:
    """Measurements: how good the planner's estimates are, how fast this machine loads."""


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


@command.command("load")
@click.argument("name", metavar="[MODEL|DIGEST]", required=False)
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The directory of a checkpoint, or of a Hugging Face model.",
)
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="How often each step is measured.")
@report_option
@pass_invocation
def load(invocation: Invocation, name: str | None, directory: Path | None, rounds: int, form: ReportFormat) -> None:
    """Measure how fast this machine loads a checkpoint, and say what bounds that.

    The checkpoint is one on this machine's disk: of a model, by its digest, in a directory, or the largest there is. A process
    beside the node reads it into memory of its own, as large as the checkpoint; a node that serves shares its disk with it
    meanwhile. OF DISK is the share of what the disk gives raw, in the same round. The safetensors files of a Hugging Face model
    are looked through once and loaded where they lie, beside other loaders that are installed in the node's environment.

    \b
    Examples:
      sllmctl bench load
      sllmctl bench load my-model --rounds 7
      sllmctl bench load --dir /data/checkpoints/DIGEST/LAYOUT -o json
      sllmctl bench load --dir ./Qwen2.5-0.5B
    """
    from schema.errors import InvalidInput
    from sllmctl.cli.diagnostics import note

    if name is not None and directory is not None:
        raise InvalidInput("give a model or digest, or --dir, not both")
    settings = invocation.settings()
    digest = "" if name is None else _digest(invocation, name)
    report = _measure(settings, digest, directory, rounds)
    if form in ("json", "yaml"):
        show_item(form, report, lambda _: (), lambda _: "")
        return
    show_items(form, report.rows, _load_columns(), lambda row: row.step)
    note(
        f"checkpoint {short_digest(report.digest)}: {size(report.image_bytes)} in {report.tensors} tensors, medians of "
        f"{report.rounds}; reader {report.reader}, {report.pages} pages"
    )
    note(report.verdict)


def _digest(invocation: Invocation, name: str) -> str:
    """The digest that a model has, by the manager; a digest, or a beginning of one, needs none."""
    import re

    from sllmctl import client

    if re.fullmatch("[0-9a-f]{6,64}", name):
        return name
    with invocation.admin() as admin:
        return admin.ask(client.checkpoint(name)).digest


def _measure(settings: Settings, digest: str, directory: Path | None, rounds: int) -> LoadReport:
    """Ask the node's side, a process of its own, which may import what the manager may not."""
    import subprocess
    import sys

    import msgspec

    from schema.errors import SllmError
    from schema.loadreport import LoadAnswer
    from sllmctl.nodes.local import need_node_packages

    need_node_packages("the measurement of loads")
    node = settings.node
    arguments = [
        "--checkpoints",
        str((Path(node.data_dir) / "checkpoints").resolve()),
        "--digest",
        digest,
        "--rounds",
        str(rounds),
    ]
    arguments += ["--chunk-bytes", str(node.chunk_bytes), "--reader-threads", str(node.reader_threads)]
    if directory is not None:
        arguments += ["--directory", str(directory.resolve())]
    # Its progress goes to standard error as it comes; it ends with this process, whose terminal it shares.
    process = subprocess.run(
        [sys.executable, "-m", "agent", "bench-load", *arguments],
        stdout=subprocess.PIPE,
        check=False,
        cwd=Path(__file__).resolve().parents[2],  # the packages lie here; the caller's directory may hold others of these names
    )
    try:
        answer = msgspec.json.decode(process.stdout, type=LoadAnswer)
    except msgspec.DecodeError as error:
        text = f"the measuring process ended with {process.returncode} and without an answer"
        raise SllmError(f"{text}; is the node's part installed on this machine (pip install 'sllmctl[node]')?") from error
    if answer.report is None:
        raise SllmError("the measuring process gave no reason") if answer.fault is None else answer.fault.to_error()
    return answer.report


def _load_columns() -> list[Column[LoadRow]]:
    return [
        Column("STEP", lambda r: r.step),
        Column("TIME", lambda r: duration(r.seconds), right=True),
        Column("RATE", lambda r: bandwidth(r.rate_bps), right=True),
        Column("OF DISK", lambda r: "-" if r.of_limit is None else f"{r.of_limit:.0%}", right=True),
        Column("CPU S/GB", lambda r: "-" if r.cpu_s_per_gb is None else f"{r.cpu_s_per_gb:.3f}", right=True),
        Column("LEAST", lambda r: duration(r.low), wide=True, right=True),
        Column("MOST", lambda r: duration(r.high), wide=True, right=True),
    ]
