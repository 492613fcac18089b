"""Lines in a terminal: several series of points over one pair of axes, each with a mark of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["Series", "text_plot"]

Series = tuple[str, Sequence[tuple[float, float]]]
"""Its name, and its points in order of x."""

_MARKS = "*o+x#%@&="
_MARGIN = 10


def text_plot(
    title: str, x_label: str, series: Sequence[Series], *, log_x: bool = False, width: int = 78, height: int = 18
) -> str:
    """The plot as lines of text. Between points a line is drawn straight; with ``log_x`` what is not above 0 is left out."""
    shown = [(name, [(x, y) for x, y in points if x > 0 or not log_x]) for name, points in series]
    drawn = [point for _, points in shown for point in points]
    if not drawn:
        return f"{title}\n(nothing to plot)"
    columns, rows = max(width - _MARGIN - 1, 20), max(height, 5)
    low_x, high_x = _span([_at(x, log_x) for x, _ in drawn])
    low_y, high_y = _span([0.0, *(y for _, y in drawn)])
    grid = [[" "] * columns for _ in range(rows)]
    for number, (_, points) in enumerate(shown):
        mark = _MARKS[number % len(_MARKS)]
        placed = [
            ((_at(x, log_x) - low_x) / (high_x - low_x) * (columns - 1), (y - low_y) / (high_y - low_y) * (rows - 1))
            for x, y in points
        ]
        for column, row in _cells(placed):
            grid[rows - 1 - row][column] = mark
    lines = [title]
    for at, cells in enumerate(grid):
        value = high_y - (high_y - low_y) * at / (rows - 1)
        label = f"{value:.3g}" if (at % 4 == 0 and at < rows - 2) or at == rows - 1 else ""
        lines.append(f"{label:>{_MARGIN - 2}} |{''.join(cells)}".rstrip())
    lines.append(" " * (_MARGIN - 1) + "+" + "-" * columns)
    lines.append(" " * _MARGIN + _ticks(low_x, high_x, columns, log_x))
    lines.append(f"{x_label:>{_MARGIN + columns}}")
    lines += [f"{'':{_MARGIN}}{_MARKS[number % len(_MARKS)]} {name}" for number, (name, _) in enumerate(shown)]
    return "\n".join(lines)


def _at(x: float, log_x: bool) -> float:
    return math.log10(x) if log_x else x


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _cells(placed: Sequence[tuple[float, float]]) -> set[tuple[int, int]]:
    """Every cell that a line through the points touches, by steps of at most one cell."""
    cells = {(round(x), round(y)) for x, y in placed}
    for (x0, y0), (x1, y1) in pairwise(placed):
        steps = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
        cells |= {(round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps)) for step in range(steps)}
    return cells


def _ticks(low: float, high: float, columns: int, log_x: bool) -> str:
    line = [" "] * (columns + 8)
    for quarter in range(5):
        value = low + (high - low) * quarter / 4
        text = f"{10**value if log_x else value:.3g}"
        start = max(0, min(round((columns - 1) * quarter / 4) - len(text) // 2, columns - len(text)))
        line[start : start + len(text)] = text
    return "".join(line).rstrip()
