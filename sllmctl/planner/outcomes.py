"""How good estimates were: the distribution of their errors, from estimates beside what happened."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from statistics import fmean, median

from schema.admin import EstimateErrorView, OutcomeView

__all__ = ["summarise"]


def summarise(outcomes: Sequence[OutcomeView]) -> tuple[EstimateErrorView, ...]:
    """The error, actual minus estimated, of each kind and source: its mean (bias), and quantiles of its absolute value."""
    groups: dict[tuple[str, str], list[OutcomeView]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.kind, outcome.source), []).append(outcome)
    return tuple(_summary(kind, source, group) for (kind, source), group in sorted(groups.items()))


def _summary(kind: str, source: str, group: Sequence[OutcomeView]) -> EstimateErrorView:
    errors = [outcome.actual_s - outcome.estimated_s for outcome in group]
    sizes = sorted(abs(error) for error in errors)
    return EstimateErrorView(
        kind=kind,
        source=source,
        count=len(group),
        bias_s=fmean(errors),
        p50_s=_quantile(sizes, 0.5),
        p90_s=_quantile(sizes, 0.9),
        p99_s=_quantile(sizes, 0.99),
        median_actual_s=median(outcome.actual_s for outcome in group),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    return ordered[min(len(ordered), max(1, ceil(share * len(ordered)))) - 1]
