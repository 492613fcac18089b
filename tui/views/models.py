"""Models: their state, instances, and how busy they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from schema.admin import ModelView
from schema.spec import HubSource, UrlSource
from tui.feed import Cluster
from tui.format import BAD, MUTED, WARN, Cell, Span, age, count, seconds, state
from tui.grid import Column
from tui.views.base import Detail, Scope, View, progress_cell

__all__ = ["Models"]


class Models(View[ModelView]):
    name, aliases = "models", ("model", "mo")
    help = "Models: instances that are ready and wanted, requests that wait and run."
    empty = "no model yet: a adds one"
    sort = ("name", False)

    def columns(self, cluster: Cluster) -> Sequence[Column[ModelView]]:
        return _COLUMNS

    def rows(self, cluster: Cluster) -> Iterable[ModelView]:
        return cluster.models.values()

    def key(self, row: ModelView) -> str:
        return row.name

    def words(self, row: ModelView) -> str:
        return f"{row.name} {row.state} {_source(row)}"

    def drill(self, row: ModelView) -> tuple[str, Scope]:
        return "instances", Scope("model", row.name)

    def detail(self, row: ModelView, cluster: Cluster) -> Detail:
        spec, scale = row.spec, row.spec.scale
        detail = Detail(row.name).field("state", state(row.state.value)).field("source", _source(row))
        detail.field("age", age(cluster.now() - row.created_at)).field("devices", f"{spec.devices} an instance")
        detail.field("checkpoint", row.digest[:16] if row.digest else "")
        detail.progress(row.progress).fault(row.fault)
        if row.failing is not None:
            detail.failing(row.failing, cluster.now())
        if row.no_place:
            detail.head("no place").line(Span(row.no_place, BAD))
        detail.head("scale").field("instances", f"{scale.min} to {scale.max}")
        for name, number in sorted(row.instances.items()):
            detail.field("", [Span(f"{number} "), state(name)])
        detail.field("keep alive", seconds(scale.keep_alive_s) or "as a reload costs")
        detail.field("at once", f"{scale.max_concurrency} an instance").field("queue", str(scale.queue_limit))
        detail.head("requests").field("waiting", str(row.waiting)).field("running", str(row.running))
        return detail


def _source(model: ModelView) -> str:
    source = model.spec.source
    if isinstance(source, HubSource):
        return source.repo
    if isinstance(source, UrlSource):
        return source.url
    return f"{source.node}:{source.path}" if source.node else source.path


def _instances(model: ModelView) -> Cell:
    there = sum(number for name, number in model.instances.items() if name != "stopped")
    ready = model.instances.get("ready", 0)
    short = ready < model.spec.scale.min or (there > ready)
    return [Span(f"{ready:>3}", WARN if short else state("ready").style if ready else MUTED), Span(f"/{there:<3}", MUTED)]


def _waiting(model: ModelView) -> Cell:
    return Span(count(model.waiting), WARN if model.waiting else MUTED)


def _running(model: ModelView) -> Cell:
    return Span(count(model.running), state("running").style if model.running else MUTED)


def _what(model: ModelView) -> Cell:
    if model.progress is not None:
        return progress_cell(model.progress)
    if model.fault is not None:
        return Span(model.fault.message, state("failed").style)
    if model.no_place:
        return Span(model.no_place, WARN)
    if model.failing is not None:
        return Span(model.failing.fault.message, state("failed").style)
    return Span(_source(model), MUTED)


_COLUMNS: Sequence[Column[ModelView]] = (
    Column("name", "MODEL", 18, lambda model: model.name, lambda model: model.name, flex=True),
    Column("state", "STATE", 9, lambda model: state(model.state.value), lambda model: model.state),
    Column("instances", "READY/ALL", 9, _instances, lambda model: sum(model.instances.values())),
    Column(
        "scale",
        "SCALE",
        7,
        lambda model: Span(f"{model.spec.scale.min}..{model.spec.scale.max}", MUTED),
        lambda model: model.spec.scale.max,
    ),
    Column("waiting", "WAIT", 5, _waiting, lambda model: model.waiting, right=True),
    Column("running", "RUN", 5, _running, lambda model: model.running, right=True),
    Column("source", "SOURCE", 16, _what, lambda model: _source(model), flex=True),
)
