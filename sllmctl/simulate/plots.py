"""Summaries as pictures: the distribution of startup latency, and latency against what was varied; as files or as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schema.errors import InvalidInput
from sllmctl.simulate.summary import Summary
from sllmctl.simulate.textplot import Series, text_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot_path", "plot_file", "plot_text", "series_against"]

_FORMATS = (".png", ".svg")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933", "#882255")
"""Okabe and Ito's, told apart by most who see few colours, and two more."""
_DASHES = ("-", "--", "-.", ":")


def check_plot_path(path: Path) -> None:
    """Before anything long is begun: that a plot can be written there. Raises InvalidInput."""
    if path.suffix.lower() not in _FORMATS:
        raise InvalidInput(f"{path}: a plot is written as .png or .svg")
    if not path.parent.is_dir():
        raise InvalidInput(f"{path}: there is no directory {path.parent}")
    _matplotlib()


def _matplotlib() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidInput("plots as files need matplotlib: pip install 'sllmctl[plots]'; --plot - needs nothing") from error
    return Figure


def series_against(key: str, summaries: Sequence[Summary], figure: str) -> list[Series]:
    """A line for each policy: ``figure`` ("mean_s", "p99_s") of startup latency against a setting that was varied."""
    found: dict[str, list[tuple[float, float]]] = {}
    for summary in summaries:
        x = summary.settings.get(key)
        if isinstance(x, int | float):
            found.setdefault(summary.policy, []).append((float(x), getattr(summary.startup, figure)))
    return [(policy, sorted(points)) for policy, points in found.items()]


def plot_text(title: str, distributions: Sequence[Series], summaries: Sequence[Summary], key: str | None, width: int) -> str:
    """What `plot_file` draws, for a terminal."""
    if key is None:
        return text_plot(
            f"{title}: share of requests by startup latency", "seconds", _positive(distributions), log_x=True, width=width
        )
    label = key.rpartition(".")[2]
    return "\n\n".join(
        text_plot(f"{title}: {name} startup latency (s)", label, series_against(key, summaries, figure), width=width)
        for name, figure in (("mean", "mean_s"), ("P99", "p99_s"))
    )


def plot_file(path: Path, title: str, distributions: Sequence[Series], summaries: Sequence[Summary], key: str | None) -> None:
    """With ``key``, mean and P99 of startup latency against it; without, the distributions. Raises InvalidInput."""
    check_plot_path(path)
    make = _matplotlib()
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = make(figsize=(7.2, 4.4) if key is None else (10.4, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    if key is None:
        axes = figure.subplots()
        for number, (name, points) in enumerate(_positive(distributions)):
            axes.step([x for x, _ in points], [y for _, y in points], where="post", label=name, **_style(number))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="startup latency (s)", ylabel="share of requests", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    else:
        for axes, name, which in zip(figure.subplots(1, 2), ("mean", "P99"), ("mean_s", "p99_s"), strict=True):
            for number, (policy, points) in enumerate(series_against(key, summaries, which)):
                axes.plot(
                    [x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=policy, **_style(number)
                )
            axes.set(xlabel=key, ylabel=f"{name} startup latency (s)")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from error


def _style(number: int) -> dict[str, Any]:
    """Lines that lie upon each other stay apart by their dashes."""
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _DASHES[number % len(_DASHES)]}


def _positive(series: Sequence[Series]) -> list[Series]:
    """For a logarithmic axis: what took no time stands at a millisecond."""
    return [(name, [(max(x, 0.001), y) for x, y in points]) for name, points in series]
