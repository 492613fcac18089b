"""Instances: where each runs, how busy it is, and why it is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from schema.admin import InstanceView
from schema.states import ModelState
from tui.feed import Cluster
from tui.format import MUTED, WARN, Cell, Span, age, bar, count, seconds, short, size, state
from tui.grid import Column
from tui.views.base import Detail, Scope, View, progress_cell

__all__ = ["Instances"]


class Instances(View[InstanceView]):
    name, aliases = "instances", ("instance", "in")
    help = "Instances: node, devices, state, running sequences, KV cache, and why it is there."
    empty = "no instance: models that are scaled to zero start one when a request comes"
    sort = ("model", False)

    def nothing(self, cluster: Cluster, scope: Scope | None) -> str:
        model = cluster.models.get(scope.value) if scope is not None and scope.field == "model" else None
        if model is None:
            return self.empty
        match model.state:
            case ModelState.FAILED:
                why = f": {model.fault.message}" if model.fault is not None else ""
                return f"no instance: {model.name} could not be ingested{why}; a, among the models, adds it again"
            case ModelState.INGESTING:
                return f"no instance: {model.name} is being ingested"
            case ModelState.STOPPED:
                return f"no instance: {model.name} is stopped; o, among the models, deploys it"
        if model.no_place:
            return f"no instance: {model.no_place}"
        return f"no instance: {model.name} starts one when a request comes"

    def columns(self, cluster: Cluster) -> Sequence[Column[InstanceView]]:
        return _COLUMNS

    def rows(self, cluster: Cluster) -> Iterable[InstanceView]:
        return cluster.instances.values()

    def key(self, row: InstanceView) -> str:
        return row.id

    def words(self, row: InstanceView) -> str:
        return f"{row.id} {row.model} {row.node} {row.state}"

    def drill(self, row: InstanceView) -> tuple[str, Scope]:
        return "requests", Scope("instance", row.id)

    def detail(self, row: InstanceView, cluster: Cluster) -> Detail:
        now = cluster.now()
        detail = Detail(row.id).field("model", row.model).field("state", state(row.state.value))
        detail.field("node", row.node).field("devices", ", ".join(map(str, row.devices))).field("pid", str(row.pid or ""))
        detail.field("age", age(now - row.created_at)).field("changed", f"{age(now - row.changed_at)} ago")
        detail.field("restarts", str(row.restarts or ""))
        if row.retry_at is not None:
            detail.field("next try", f"in {seconds(max(0.0, row.retry_at - now))}")
        detail.field("checkpoint", row.digest[:16])
        detail.head("why here").line(row.reason)
        detail.head("KV cache").line(*bar(_kv(row), 20), f" {_kv(row):.0%}")
        detail.line(f"{count(row.kv_used_tokens)} of {count(row.kv_capacity_tokens)} tokens")
        detail.line(f"{size(row.working_bytes)} beside its weights")
        if (phases := row.phases) is not None:
            detail.start("last start", phases)
        return detail.progress(row.progress).fault(row.fault)


def _kv(instance: InstanceView) -> float:
    return instance.kv_used_tokens / instance.kv_capacity_tokens if instance.kv_capacity_tokens else 0.0


def _why(instance: InstanceView) -> Cell:
    if instance.progress is not None:
        return progress_cell(instance.progress)
    if instance.fault is not None:
        return Span(instance.fault.message, state("failed").style)
    return Span(instance.reason, MUTED)


def _restarts(instance: InstanceView) -> Cell:
    return Span(str(instance.restarts), WARN if instance.restarts else MUTED)


_COLUMNS: Sequence[Column[InstanceView]] = (
    Column("id", "INSTANCE", 13, lambda one: short(one.id, 13), lambda one: one.id),
    Column("model", "MODEL", 14, lambda one: one.model, lambda one: (one.model, one.id), flex=True),
    Column("node", "NODE", 12, lambda one: one.node, lambda one: (one.node, one.id)),
    Column("devices", "DEV", 4, lambda one: ",".join(map(str, one.devices)), lambda one: one.devices, since=92),
    Column("state", "STATE", 8, lambda one: state(one.state.value), lambda one: one.state),
    Column("running", "RUN", 4, lambda one: count(one.running), lambda one: one.running, right=True),
    Column("kv", "KV", 11, lambda one: [*bar(_kv(one), 6), Span(f" {_kv(one):>4.0%}")], _kv),
    Column("restarts", "RST", 4, _restarts, lambda one: one.restarts, right=True),
    Column("why", "WHY", 20, _why, lambda one: one.reason, flex=True, since=110),
)
