"""Summaries side by side: as rows of text, CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from sllmctl.simulate.summary import Summary

__all__ = ["COLUMNS", "Figure", "figures_of", "seconds_text", "share_text", "to_csv", "to_json", "to_markdown"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One column: its header, an item's text, whether only a wide table shows it, whether it is a number."""

    header: str
    cell: Callable[[Summary], str]
    wide: bool = False
    right: bool = True


def seconds_text(value: float) -> str:
    """In seconds, so that a column can be compared line by line."""
    if value < 0.0005:
        return "0"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def share_text(part: int, whole: int) -> str:
    """Rounded, but 100 % and 0 % mean all and none."""
    if not whole:
        return "-"
    percent = min(99.9, 100 * part / whole) if part < whole else 100.0
    return f"{max(percent, 0.1) if part else 0.0:.1f} %"


def _loads(summary: Summary) -> str:
    order = ("device", "dram", "disk", "peer", "remote")
    return " ".join(f"{tier}:{summary.loads[tier]}" for tier in order if summary.loads.get(tier)) or "-"


COLUMNS: tuple[Figure, ...] = (
    Figure("POLICY", lambda s: s.policy, right=False),
    Figure("REQUESTS", lambda s: str(s.requests)),
    Figure("WITHIN", lambda s: share_text(s.within, s.requests)),
    Figure("FAILED", lambda s: str(s.failed)),
    Figure("MEAN", lambda s: seconds_text(s.startup.mean_s)),
    Figure("P50", lambda s: seconds_text(s.startup.p50_s)),
    Figure("P95", lambda s: seconds_text(s.startup.p95_s)),
    Figure("P99", lambda s: seconds_text(s.startup.p99_s)),
    Figure("MOST", lambda s: seconds_text(s.startup.most_s), wide=True),
    Figure("TTFT MEAN", lambda s: seconds_text(s.first_token.mean_s)),
    Figure("TTFT P50", lambda s: seconds_text(s.first_token.p50_s), wide=True),
    Figure("TTFT P95", lambda s: seconds_text(s.first_token.p95_s), wide=True),
    Figure("TTFT P99", lambda s: seconds_text(s.first_token.p99_s)),
    Figure("COLD", lambda s: str(s.cold), wide=True),
    Figure("STARTS", lambda s: str(s.starts)),
    Figure("MIGRATED", lambda s: str(s.migrations)),
    Figure("PREEMPTED", lambda s: str(s.preemptions)),
    Figure("EVICTED", lambda s: str(s.evictions)),
    Figure("HELD", lambda s: f"{s.device_held_h:.1f} h"),
    Figure("BUSY", lambda s: f"{s.device_busy_h:.1f} h", wide=True),
    Figure("THROUGHPUT", lambda s: f"{s.throughput_rps:.3g}/s", wide=True),
    Figure("LOADS", _loads, wide=True, right=False),
    Figure("FAULTS", lambda s: " ".join(f"{code}:{count}" for code, count in s.faults.items()) or "-", wide=True, right=False),
    Figure("WALL", lambda s: f"{s.wall_s:.1f} s", wide=True),
    Figure("SIMULATED", lambda s: f"{s.simulated_rps:.0f}/s", wide=True),
)


def figures_of(summaries: Sequence[Summary]) -> tuple[Figure, ...]:
    """The columns for these, with one for each thing that was varied, after the policy's."""
    keys = dict.fromkeys(key for summary in summaries for key in summary.settings)
    varied = tuple(Figure(key.rpartition(".")[2].upper(), _setting(key)) for key in keys)
    return (COLUMNS[0], *varied, *COLUMNS[1:])


def _setting(key: str) -> Callable[[Summary], str]:
    return lambda summary: str(summary.settings.get(key, "-"))


def to_json(summaries: Sequence[Summary]) -> str:
    return msgspec.json.format(msgspec.json.encode(summaries), indent=2).decode() + "\n"


def to_csv(summaries: Sequence[Summary]) -> str:
    """A line each, every figure in a column of its own; counts by kind as ``faults.timed_out``."""
    rows = [_flat(summary) for summary in summaries]
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _flat(summary: Summary) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in msgspec.to_builtins(summary).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            flat[name] = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return flat


def to_markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are set to the right."""
    lines = [headers, ["---", *("---:" for _ in headers[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
