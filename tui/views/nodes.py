"""The cluster: nodes, how full each tier of them is, and how many tokens they made lately."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from schema.admin import NodeView
from schema.states import NodeState
from tui.feed import Cluster
from tui.format import MUTED, WARN, Cell, Span, age, bar, history, rate, size, state
from tui.grid import Column
from tui.views.base import Detail, Scope, View, progress_cell

__all__ = ["Nodes"]


class Nodes(View[NodeView]):
    name, aliases = "cluster", ("nodes", "node", "no")
    help = "Nodes and their devices: how full each tier is, what loads, tokens made lately."
    empty = "no node has joined yet"
    sort = ("name", False)

    def __init__(self) -> None:
        self._cluster: Cluster | None = None
        self._columns: Sequence[Column[NodeView]] = (
            Column("name", "NODE", 14, lambda node: node.name, lambda node: node.name, flex=True),
            Column("state", "STATE", 11, _state, lambda node: (node.state, node.cordoned)),
            Column("instances", "INST", 5, lambda node: str(node.instances), lambda node: node.instances, right=True),
            Column("device", "DEVICE", 13, lambda node: _tier(*_device(node)), lambda node: _part(*_device(node))),
            Column("dram", "DRAM", 13, lambda node: _tier(*_dram(node)), lambda node: _part(*_dram(node))),
            Column("disk", "DISK", 13, lambda node: _tier(*_disk(node)), lambda node: _part(*_disk(node))),
            Column("tokens", "TOKENS/S", 20, self._tokens, self._rate, since=110),
            Column("loads", "LOADING", 22, _loading, lambda node: len(node.loads), since=130),
            Column("seen", "SEEN", 5, self._seen, _unheard, right=True, since=145),
        )

    def columns(self, cluster: Cluster) -> Sequence[Column[NodeView]]:
        self._cluster = cluster
        return self._columns

    def rows(self, cluster: Cluster) -> Iterable[NodeView]:
        return [node for node in cluster.nodes.values() if node.state is not NodeState.REMOVED]

    def key(self, row: NodeView) -> str:
        return row.id

    def words(self, row: NodeView) -> str:
        return f"{row.name} {row.state} {row.address} {'cordoned' if row.cordoned else ''}"

    def drill(self, row: NodeView) -> tuple[str, Scope]:
        return "instances", Scope("node", row.name)

    def detail(self, row: NodeView, cluster: Cluster) -> Detail:
        detail = Detail(row.name).field("state", _state(row)).field("address", row.address)
        linked = "connected" if row.state is NodeState.READY else "last seen"
        seen = f"{age(cluster.now() - row.seen_at)} ago" if row.seen_at else "never"
        detail.field(linked, seen).field("instances", str(row.instances))
        means = row.inventory
        if means is None:
            return detail.line(Span("it has not stated its means yet", MUTED))
        detail.field("host", f"{means.hostname}, {means.cpus} CPUs, {size(means.memory_bytes)}")
        detail.head("devices")
        for place, device in enumerate(means.devices):
            used = row.device_used_bytes[place] if place < len(row.device_used_bytes) else 0
            part = used / device.memory_bytes if device.memory_bytes else 0.0
            detail.line(f"{device.index:>2} {device.kind:<5}", *bar(part, 14), f" {size(used)}/{size(device.memory_bytes)}")
            detail.line(Span(f"   {device.name}", MUTED))
        detail.head("tiers")
        for name, (used, budget) in (("DRAM", _dram(row)), ("disk", _disk(row))):
            part = used / budget if budget else 0.0
            detail.line(f"{name:<8}", *bar(part, 14), f" {size(used)}/{size(budget)}" if budget else f" {size(used)}, no limit")
        detail.line().field("pages", means.arena.pages).field("disk reads", rate(means.disk_read_bps) or "not measured")
        detail.field("copies", rate(means.device_copy_bps))
        if samples := cluster.tokens.get(row.name):
            detail.head("tokens per second").line(history(samples, 30)).line(
                f"{samples[-1]:.0f} now, {max(samples):.0f} at most"
            )
        for load in row.loads:
            detail.head(f"loading {load.of or load.id}").progress(load.progress)
        return detail

    def _tokens(self, node: NodeView) -> Cell:
        samples = self._cluster.tokens.get(node.name) if self._cluster is not None else None
        if not samples:
            return ""
        return [history(samples, 13), Span(f"{samples[-1]:>6.0f}")]

    def _rate(self, node: NodeView) -> float:
        samples = self._cluster.tokens.get(node.name) if self._cluster is not None else None
        return samples[-1] if samples else 0.0

    def _seen(self, node: NodeView) -> Cell:
        if node.state is NodeState.READY or self._cluster is None:
            return Span("now", MUTED)
        return Span(age(self._cluster.now() - node.seen_at) if node.seen_at else "never", WARN)


def _unheard(node: NodeView) -> tuple[bool, float]:
    """Nodes that are heard now first, then those that were heard last."""
    return (node.state is not NodeState.READY, 0.0 if node.state is NodeState.READY else -node.seen_at)


def _state(node: NodeView) -> Span:
    if node.cordoned and node.state is NodeState.READY:
        return Span("cordoned", WARN)
    return state(node.state.value)


def _device(node: NodeView) -> tuple[int, int]:
    devices = node.inventory.devices if node.inventory is not None else ()
    return sum(node.device_used_bytes), sum(device.memory_bytes for device in devices)


def _dram(node: NodeView) -> tuple[int, int]:
    return (node.inventory.arena.used_bytes, node.inventory.arena.budget_bytes) if node.inventory is not None else (0, 0)


def _disk(node: NodeView) -> tuple[int, int]:
    return (node.inventory.disk_used_bytes, node.inventory.disk_budget_bytes) if node.inventory is not None else (0, 0)


def _part(used: int, budget: int) -> float:
    return used / budget if budget else 0.0


def _tier(used: int, budget: int) -> Cell:
    if not budget:
        return Span(f"{'':7}{size(used):>6}", MUTED) if used else Span(f"{'-':>13}", MUTED)
    return [*bar(used / budget, 7), Span(f" {size(used):>5}")]


def _loading(node: NodeView) -> Cell:
    return progress_cell(node.loads[-1].progress) if node.loads else ""
