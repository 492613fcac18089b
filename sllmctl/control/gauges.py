"""The cluster as Prometheus gauges, made of the view at every scrape; nothing is counted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from schema.states import NodeState, Tier, TierState
from sllmctl.control.view import ClusterView
from sllmctl.control.views import LiveNumbers

__all__ = ["cluster_gauges"]


def cluster_gauges(view: ClusterView, live: LiveNumbers) -> Iterable[Metric]:
    """Nodes by state, instances and requests by model; bytes resident in each node's tiers, and their budgets; what loads
    move now, by where it comes from."""
    nodes = GaugeMetricFamily("sllm_nodes", "Nodes by state.", labels=("state",))
    for state, count in Counter(node.state.value for node in view.nodes.values()).items():
        nodes.add_metric((state,), count)

    instances = GaugeMetricFamily("sllm_instances", "Instances by model and state.", labels=("model", "state"))
    for (model, state), count in Counter((i.model, i.state.value) for i in view.instances.values()).items():
        instances.add_metric((model, state), count)

    requests = GaugeMetricFamily("sllm_model_requests", "Live requests by model and state.", labels=("model", "state"))
    for model in view.models:
        waiting, running = live.model_counts(model)
        requests.add_metric((model, "waiting"), waiting)
        requests.add_metric((model, "running"), running)

    tiers = GaugeMetricFamily("sllm_tier_bytes", "Bytes of resident checkpoints by node and tier.", labels=("node", "tier"))
    resident: Counter[tuple[str, Tier]] = Counter()
    for placement in view.placements.values():
        if placement.state is TierState.RESIDENT:
            resident[placement.node, placement.tier] += placement.size_bytes
    for (node, tier), size_bytes in resident.items():
        tiers.add_metric((node, tier.value), size_bytes)

    arenas = GaugeMetricFamily("sllm_arena_budget_bytes", "The DRAM tier's budget by node.", labels=("node",))
    for known in view.nodes.values():
        if known.inventory is not None and known.state is not NodeState.REMOVED:
            arenas.add_metric((known.id,), known.inventory.arena.budget_bytes)
    loads = GaugeMetricFamily("sllm_loads", "Loads and other copies under way by node and stage.", labels=("node", "stage"))
    rates = GaugeMetricFamily(
        "sllm_load_bytes_per_second", "What those move now, by node and tier that it comes from.", labels=("node", "source")
    )
    left = GaugeMetricFamily("sllm_load_left_bytes", "What those have yet to move.", labels=("node", "source"))
    disks = GaugeMetricFamily("sllm_disk_budget_bytes", "The disk tier's budget by node.", labels=("node",))
    for known in view.nodes.values():
        if known.inventory is not None and known.state is not NodeState.REMOVED:
            disks.add_metric((known.id,), known.inventory.disk_budget_bytes)
        counts: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        missing: Counter[str] = Counter()
        for _, progress in live.loads(known.id):
            source = progress.source.value if progress.source is not None else "unknown"
            counts[progress.stage] += 1
            moved[source] += round(progress.now_bps)
            missing[source] += progress.total_bytes - progress.done_bytes
        for stage, count in counts.items():
            loads.add_metric((known.id, stage), count)
        for source in moved:
            rates.add_metric((known.id, source), moved[source])
            left.add_metric((known.id, source), missing[source])
    return (nodes, instances, requests, tiers, arenas, disks, loads, rates, left)
