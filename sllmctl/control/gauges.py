"""The cluster as Prometheus metrics, made of the view at every scrape; nothing is counted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from schema.states import NodeState, Tier, TierState
from sllmctl.cluster.records import Node
from sllmctl.cluster.view import ClusterView
from sllmctl.control.views import LiveNumbers

__all__ = ["cluster_gauges", "decision_counts"]


def cluster_gauges(view: ClusterView, live: LiveNumbers) -> Iterable[Metric]:
    """Nodes by state; instances, requests and KV caches by model; what each node's tiers hold and may hold; what loads move
    now, by where it comes from."""
    nodes = GaugeMetricFamily("sllm_nodes", "Nodes by state.", labels=("state",))
    for state, count in Counter(node.state.value for node in view.nodes.values()).items():
        nodes.add_metric((state,), count)
    present = [node for node in view.nodes.values() if node.state is not NodeState.REMOVED]
    return (nodes, *_models(view, live), *_tiers(view, present), *_loads(live, present))


def decision_counts(counts: Mapping[str, int]) -> Iterable[Metric]:
    """What the planner has decided."""
    family = CounterMetricFamily(
        "sllm_planner_decisions",
        "Decisions of the planner: start an instance, wait for one, or refused; one that is only repeated counts once.",
        labels=("kind",),
    )
    for kind in ("start", "wait", "refused"):
        family.add_metric((kind,), counts.get(kind, 0))
    return (family,)


def _models(view: ClusterView, live: LiveNumbers) -> Iterable[Metric]:
    instances = GaugeMetricFamily("sllm_instances", "Instances by model and state.", labels=("model", "state"))
    for (model, state), count in Counter((i.model, i.state.value) for i in view.instances.values()).items():
        instances.add_metric((model, state), count)
    requests = GaugeMetricFamily(
        "sllm_model_requests", "Live requests by model: waiting for an instance, or running.", labels=("model", "state")
    )
    for model in view.models:
        waiting, running = live.model_counts(model)
        requests.add_metric((model, "waiting"), waiting)
        requests.add_metric((model, "running"), running)
    used, room = Counter[str](), Counter[str]()
    for instance in view.instances.values():
        room[instance.model] += instance.kv_capacity_tokens
        load = live.instance_load(instance.id)
        if load is not None and load.epoch == instance.epoch:
            used[instance.model] += load.kv_used_tokens
    kv_used = GaugeMetricFamily("sllm_kv_used_tokens", "Tokens that KV caches hold, by model.", labels=("model",))
    kv_room = GaugeMetricFamily("sllm_kv_capacity_tokens", "Tokens that KV caches have room for, by model.", labels=("model",))
    for model in room:
        kv_used.add_metric((model,), used[model])
        kv_room.add_metric((model,), room[model])
    return (instances, requests, kv_used, kv_room, _memory(view))


def _memory(view: ClusterView) -> Metric:
    memory = GaugeMetricFamily(
        "sllm_instance_memory_bytes",
        "What instances take of their devices beside weights, by model: promised, and of that activations and logits at most.",
        labels=("model", "part"),
    )
    parts: Counter[tuple[str, str]] = Counter()
    for instance in view.instances.values():
        parts[instance.model, "promised"] += instance.working_bytes * len(instance.devices)
        parts[instance.model, "activations"] += instance.activation_bytes
        parts[instance.model, "logits"] += instance.logits_bytes
    for key, size_bytes in parts.items():
        memory.add_metric(key, size_bytes)
    return memory


def _tiers(view: ClusterView, present: list[Node]) -> Iterable[Metric]:
    tiers = GaugeMetricFamily("sllm_tier_bytes", "Bytes of resident checkpoints by node and tier.", labels=("node", "tier"))
    resident: Counter[tuple[str, Tier]] = Counter()
    for placement in view.placements.values():
        if placement.state is TierState.RESIDENT:
            resident[placement.node, placement.tier] += placement.size_bytes
    room = GaugeMetricFamily(
        "sllm_tier_capacity_bytes",
        "What checkpoints may take of a tier; on devices, weights and KV caches together.",
        labels=("node", "tier"),
    )
    for node in present:
        means = node.inventory
        if means is None:
            continue
        for tier, capacity in (
            (Tier.DISK, means.disk_budget_bytes),
            (Tier.DRAM, means.arena.budget_bytes),
            (Tier.DEVICE, sum(device.memory_bytes for device in means.devices)),
        ):
            room.add_metric((node.id, tier.value), capacity)
            tiers.add_metric((node.id, tier.value), resident[node.id, tier])
    return (tiers, room)


def _loads(live: LiveNumbers, present: list[Node]) -> Iterable[Metric]:
    loads = GaugeMetricFamily("sllm_loads", "Loads and other copies under way by node and stage.", labels=("node", "stage"))
    rates = GaugeMetricFamily(
        "sllm_load_bytes_per_second",
        "What those move, over their last seconds, by node and tier that it comes from.",
        labels=("node", "source"),
    )
    left = GaugeMetricFamily("sllm_load_left_bytes", "What those have yet to move.", labels=("node", "source"))
    for node in present:
        counts, moved, missing = Counter[str](), Counter[str](), Counter[str]()
        for _, progress in live.loads(node.id):
            source = progress.source.value if progress.source is not None else "unknown"
            counts[progress.stage.partition(",")[0]] += 1
            moved[source] += round(progress.now_bps)
            missing[source] += progress.total_bytes - progress.done_bytes
        for stage, count in counts.items():
            loads.add_metric((node.id, stage), count)
        for source in moved:
            rates.add_metric((node.id, source), moved[source])
            left.add_metric((node.id, source), missing[source])
    return (loads, rates, left)
