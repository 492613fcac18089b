"""The table of docs/metrics.md, of what a manager registers: ``python -m tests.sllmctl.gateway.metrics_table`` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sllmctl.cluster.view import ClusterView
from sllmctl.control.gauges import cluster_gauges, decision_counts
from sllmctl.gateway.engines import EngineTotals
from sllmctl.gateway.metrics import Metrics
from sllmctl.nodes.links import Links
from sllmctl.nodes.settings import LinkSettings

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
_BEGIN, _END = "<!-- generated table -->\n", "<!-- end of the table -->\n"


def whole() -> Metrics:
    """The metrics of a manager whose cluster is empty, joined as `sllmctl.serve` joins them."""
    metrics, view, engines = Metrics(), ClusterView(), EngineTotals()
    nobody: Any = None
    links = Links(cluster="", generation=1, software="", router=nobody, post=nobody, settings=LinkSettings())
    metrics.add(lambda: cluster_gauges(view, nobody))
    metrics.add(lambda: decision_counts({}))
    metrics.add(lambda: engines.families(()))
    metrics.add(links.families)
    return metrics


def rows(metrics: Metrics) -> Iterator[str]:
    labels = {}
    for collector in list(metrics._registry._collector_to_names):
        name = getattr(collector, "_name", None)
        if name is not None:
            labels[name] = collector._labelnames  # type: ignore[attr-defined]
    for family in sorted(metrics.families(), key=lambda family: family.name):
        names = labels.get(family.name, getattr(family, "_labelnames", ()))
        name = family.name + ("_total" if family.type == "counter" else "")
        yield f"| `{name}` | {family.type} | {', '.join(names) or '-'} | {family.documentation} |"


def table() -> str:
    head = "| name | type | labels | meaning |\n|---|---|---|---|\n"
    return head + "".join(row + "\n" for row in rows(whole()))


def written() -> str:
    """The table as the page has it."""
    return PAGE.read_text().partition(_BEGIN)[2].partition(_END)[0]


def write() -> None:
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    PAGE.write_text(before + _BEGIN + table() + _END + rest.partition(_END)[2])


if __name__ == "__main__":
    write()
