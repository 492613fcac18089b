"""Plots as files and as text: they hold every series, and what cannot be drawn is refused before anything is simulated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from schema.errors import InvalidInput
from sllmctl.simulate.plots import check_plot_path, plot_file, plot_text, series_against
from sllmctl.simulate.summary import summarise
from sllmctl.simulate.textplot import text_plot
from tests.sllmctl.simulate.test_summary import record

SERIES = [("random", [(0.0, 0.2), (1.0, 0.6), (90.0, 1.0)]), ("sllmctl", [(0.0, 0.7), (2.0, 1.0)])]
SUMMARIES = [
    summarise([record([factor * rate, 9 * factor * rate], policy=policy)], 300.0, {"workload.rate": rate})
    for policy, factor in (("random", 3.0), ("sllmctl", 1.0))
    for rate in (0.2, 0.8, 1.4)
]


@pytest.mark.parametrize("key", [None, "workload.rate"])
def test_svg_names_every_policy(tmp_path: Path, key: str | None) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        plot_file(tmp_path / "p.svg", "Title", SERIES, SUMMARIES, key)
    text = (tmp_path / "p.svg").read_text()
    assert all(word in text for word in ("Title", "random", "sllmctl", "startup latency (s)"))


def test_png(tmp_path: Path) -> None:
    plot_file(tmp_path / "p.PNG", "Title", SERIES, SUMMARIES, None)
    assert (tmp_path / "p.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"written as \.png or \.svg"):
        check_plot_path(tmp_path / "p.pdf")
    with pytest.raises(InvalidInput, match="there is no directory"):
        check_plot_path(tmp_path / "none" / "p.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidInput, match=r"pip install 'sllmctl\[plots\]'"):
        check_plot_path(tmp_path / "p.png")


def test_series_against_what_was_varied() -> None:
    found = dict(series_against("workload.rate", SUMMARIES, "mean_s"))
    assert [x for x, _ in found["random"]] == [0.2, 0.8, 1.4]
    assert [y for _, y in found["sllmctl"]] == pytest.approx([1.0, 4.0, 7.0])


@pytest.mark.parametrize("key", [None, "workload.rate"])
@pytest.mark.parametrize("width", [50, 120])
def test_text_keeps_within_its_width(key: str | None, width: int) -> None:
    text = plot_text("name", SERIES, SUMMARIES, key, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "* random" in text
    assert "o sllmctl" in text


def test_text_plot_draws_lines_between_points() -> None:
    text = text_plot("t", "x", [("a", [(0.0, 0.0), (10.0, 10.0)])], width=40, height=10)
    rows = [line.partition("|")[2] for line in text.splitlines() if "|" in line]
    assert all("*" in row for row in rows)
    assert rows[0].rstrip().endswith("*")
    assert rows[-1].startswith("*")


def test_nothing_and_one_point_are_plotted() -> None:
    assert "nothing to plot" in text_plot("t", "x", [])
    assert "*" in text_plot("t", "x", [("a", [(1.0, 1.0)])], log_x=True)
