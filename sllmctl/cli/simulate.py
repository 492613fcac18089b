"""`sllmctl simulate`: a scenario under several policies, as a table, a file, a plot."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sllmctl.cli.context import report_option
from sllmctl.cli.diagnostics import ProgressLine, note
from sllmctl.cli.format import duration
from sllmctl.cli.output import Column, ReportFormat, show_items, write

if TYPE_CHECKING:
    from sllmctl.simulate.scenario import Scenario
    from sllmctl.simulate.sweep import Outcome

__all__ = ["command"]

_RATE = "workload.rate"
_ASSUMED_RPS = 2000.0
"""Requests simulated per second and process until this run has measured its own: what the first 20,000 of ``datacentre`` took
with policy sllmctl on one core."""
_BAR = 24


@click.command("simulate")
@click.argument("scenario", required=False)
@click.option(
    "--policy", "policies", multiple=True, metavar="NAME", help="A policy, or all; again for more. Default: the scenario's."
)
@click.option(
    "--rate", "rates", multiple=True, type=float, metavar="RPS", help="Requests per second; again to compare several."
)
@click.option("--sweep", metavar="KEY=V,V,...", help="Vary any number of the scenario, such as models[0].count=64,128,256.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change the scenario, such as nodes[0].count=8.")
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=click.IntRange(0),
    metavar="N",
    help="A seed; the requests of several are told together.",
)
@click.option("--requests", type=click.IntRange(1), metavar="N", help="No more requests than this.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Simulate in so many processes.")
@click.option("--plot", "plots", multiple=True, metavar="FILE", help="Draw to a .png or .svg file, or with - in the terminal.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every figure to this file too.")
@click.option("--list", "listing", is_flag=True, help="List the scenarios that come along, and the policies.")
@report_option
def command(
    scenario: str | None,
    policies: tuple[str, ...],
    rates: tuple[float, ...],
    sweep: str | None,
    assignments: tuple[str, ...],
    seeds: tuple[int, ...],
    requests: int | None,
    jobs: int,
    plots: tuple[str, ...],
    csv_file: Path | None,
    listing: bool,
    form: ReportFormat,
) -> None:
    """Simulate SCENARIO, a YAML file or the name of one that comes along, with the production scheduler on a virtual clock.

    Times are in seconds. STARTUP latency (MEAN, P50, P95, P99) is from a request's arrival until an instance takes it, with
    every later pause; TTFT until its first token; a request that failed counts as the scenario's timeout in both. WITHIN is the
    share that began within the timeout, HELD the device-hours promised to instances. A plot shows the distribution of startup
    latency, or, with several rates or a sweep, its mean and P99 against what was varied.

    \b
    Examples:
      sllmctl simulate --list
      sllmctl simulate demo --policy random --policy sllmctl --plot -
      sllmctl simulate opt-6.7b-gsm8k --policy all --rate 0.2 --rate 0.8 --rate 1.4 --plot rates.png
      sllmctl simulate many-models --sweep 'models[0].count=64,128,256' --jobs 4 --csv models.csv
    """
    from sllmctl.simulate.plots import check_plot_path
    from sllmctl.simulate.policies import POLICIES
    from sllmctl.simulate.scenario import load_scenario, override
    from sllmctl.simulate.sweep import check_policies, runs

    if listing:
        _list()
        return
    if scenario is None:
        raise click.UsageError("name a SCENARIO: a YAML file, or one of those that --list shows")
    files = [Path(plot) for plot in plots if plot != "-"]
    for file in files:
        check_plot_path(file)
    if csv_file is not None and csv_file.is_dir():
        raise click.UsageError(f"--csv {csv_file}: is a directory")
    if csv_file is not None and not csv_file.parent.is_dir():
        raise click.UsageError(f"--csv {csv_file}: there is no directory {csv_file.parent}")
    given = [*assignments, *([f"workload.requests={requests}"] if requests is not None else [])]
    # The file's own key is checked before it is changed, so that an error names the file.
    asked = override(load_scenario(scenario), given) if given else load_scenario(scenario)
    key, values = _varied(rates, sweep)
    names = tuple(POLICIES) if "all" in policies else policies or asked.policies
    check_policies(names)
    chosen = runs(asked, names, key, values, sorted(set(seeds)) or [asked.seed])
    found: list[Outcome] = []
    with _progress([run.scenario for run in chosen], names, jobs) as progress:
        from sllmctl.simulate.sweep import outcomes

        found.extend(outcomes(chosen, jobs, progress))
    _show(form, found)
    summaries = [outcome.summary for outcome in found]
    if csv_file is not None:
        from sllmctl.simulate.tables import to_csv

        _write_file(csv_file, to_csv(summaries))
    _draw(asked, found, key if len(values) > 1 else None, files, in_terminal="-" in plots)


def _list() -> None:
    from sllmctl.simulate.policies import POLICIES
    from sllmctl.simulate.scenario import load_scenario, shipped_scenarios

    scenarios = [load_scenario(name) for name in shipped_scenarios()]
    show_items(
        "table", scenarios, [Column("SCENARIO", lambda s: s.name), Column("WHAT", lambda s: s.description)], lambda s: s.name
    )
    write("")
    show_items(
        "table",
        list(POLICIES.values()),
        [Column("POLICY", lambda p: p.name), Column("WHAT", lambda p: p.title)],
        lambda p: p.name,
    )


def _varied(rates: Sequence[float], sweep: str | None) -> tuple[str | None, list[float | int]]:
    """The one thing that is varied, and its values in order."""
    if rates and sweep is not None:
        raise click.UsageError("vary one thing at a time: --rate or --sweep")
    if rates:
        for rate in rates:
            if not math.isfinite(rate):
                raise click.UsageError(f"--rate {rate}: write a number of requests per second")
        values: list[float | int] = list(dict.fromkeys(rates))
        return _RATE, values
    if sweep is None:
        return None, []
    key, separator, text = sweep.partition("=")
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not separator or not key.strip() or not numbers or not all(math.isfinite(number) for number in numbers):
        raise click.UsageError(f"--sweep {sweep!r}: write KEY=NUMBER,NUMBER,..., such as {_RATE}=0.2,0.8,1.4")
    return key.strip(), list(dict.fromkeys(int(number) if number.is_integer() else number for number in numbers))


@contextmanager
def _progress(scenarios: Sequence[Scenario], names: Sequence[str], jobs: int) -> Iterator[Callable[[int], None]]:
    """Say what is going to be done and how long it takes, then how far it has come, by the speed so far."""
    from sllmctl.simulate.sweep import expected_requests

    total = sum(_counted(scenarios, expected_requests))
    nodes = sum(group.count for group in scenarios[0].nodes)
    models = sum(group.count for group in scenarios[0].models)
    jobs = min(jobs, len(scenarios))
    seconds = total / _ASSUMED_RPS / jobs
    what = f"{_some(len(names), 'policy', 'policies')}, {_some(len(scenarios), 'simulation')}"
    note(
        f"{scenarios[0].name}: {total:,} requests in all ({what}) for {_some(models, 'model')} on {_some(nodes, 'node')}; "
        f"about {duration(max(seconds, 1.0))} at {_ASSUMED_RPS:,.0f} requests a second"
        + (f" in each of {jobs} processes" if jobs > 1 else "")
    )
    began = time.monotonic()
    with ProgressLine() as line:

        def progress(ended: int) -> None:
            line.line(lambda: _line(ended, total, time.monotonic() - began))

        yield progress
    note(f"done in {duration(time.monotonic() - began)}")


def _counted(scenarios: Sequence[Scenario], count: Callable[[Scenario], int]) -> Iterator[int]:
    """The policies share their scenarios, and some have to be counted request by request."""
    known: dict[int, int] = {}
    for scenario in scenarios:
        if id(scenario) not in known:
            known[id(scenario)] = count(scenario)
        yield known[id(scenario)]


def _line(ended: int, total: int, took_s: float) -> str:
    share = min(1.0, ended / total) if total else 1.0
    full = round(_BAR * share)
    text = f"[{'#' * full}{'.' * (_BAR - full)}] {100 * share:3.0f} %  {ended:,} of {total:,} requests"
    if ended and took_s > 0:
        rate = ended / took_s
        text += f", {rate:,.0f} a second, about {duration(max(total - ended, 0) / rate)} left"
    return text


def _some(count: int, what: str, many: str = "") -> str:
    return f"{count:,} {what if count == 1 else many or what + 's'}"


def _show(form: ReportFormat, found: Sequence[Outcome]) -> None:
    from sllmctl.simulate.tables import figures_of

    summaries = [outcome.summary for outcome in found]
    columns = [Column(one.header, one.cell, wide=one.wide, right=one.right) for one in figures_of(summaries)]
    show_items(form, summaries, columns, lambda summary: summary.policy)


def _draw(asked: Scenario, found: Sequence[Outcome], key: str | None, files: Sequence[Path], *, in_terminal: bool) -> None:
    from sllmctl.simulate.plots import plot_file, plot_text

    title = asked.description or asked.name
    distributions = [outcome.distribution for outcome in found]
    summaries = [outcome.summary for outcome in found]
    if in_terminal:
        import shutil

        width = max(50, min(shutil.get_terminal_size().columns, 120))
        write("\n" + plot_text(asked.name, distributions, summaries, key, width))
    for file in files:
        plot_file(file, title, distributions, summaries, key)
        note(f"wrote {file}")


def _write_file(path: Path, text: str) -> None:
    from schema.errors import InvalidInput

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from error
    note(f"wrote {path}")
