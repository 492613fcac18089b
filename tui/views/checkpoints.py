"""Checkpoints as a matrix: a row each, and for every node the tiers that they lie on there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from schema.admin import CheckpointView, PlacementView
from schema.states import NodeState, Tier, TierState
from tui.feed import Cluster
from tui.format import ACCENT, BAD, DEVICE, FAINT, GOOD, MUTED, WARN, Cell, Span, age, count, short, size, state
from tui.grid import Column
from tui.views.base import Detail, View

__all__ = ["Checkpoints"]

_LETTERS = {Tier.DISK: ("D", ACCENT), Tier.DRAM: ("M", GOOD), Tier.DEVICE: ("G", DEVICE)}
_PIN = Span("\N{BULLET}", WARN)


class Checkpoints(View[CheckpointView]):
    name, aliases = "checkpoints", ("checkpoint", "ch", "matrix")
    help = "Checkpoints by node and tier: D disk, M DRAM, G device; small: on its way, \N{BULLET} pinned, ! in quarantine."
    empty = "no checkpoint: adding a model ingests one"
    sort = ("models", False)

    def __init__(self) -> None:
        self._nodes: tuple[str, ...] = ()
        self._columns: Sequence[Column[CheckpointView]] = ()

    def columns(self, cluster: Cluster) -> Sequence[Column[CheckpointView]]:
        nodes = tuple(sorted(node.name for node in cluster.nodes.values() if node.state is not NodeState.REMOVED))
        if nodes != self._nodes or not self._columns:
            self._nodes = nodes
            moving = (
                Column(f"on {node}", short(node, 12), max(6, min(12, len(node))), partial(_on, node), moves=True)
                for node in nodes
            )
            self._columns = (*_FIXED, *moving)
        return self._columns

    def rows(self, cluster: Cluster) -> Iterable[CheckpointView]:
        return cluster.checkpoints.values()

    def key(self, row: CheckpointView) -> str:
        return row.digest

    def words(self, row: CheckpointView) -> str:
        return f"{row.digest} {' '.join(row.models)} {row.architecture}"

    def detail(self, row: CheckpointView, cluster: Cluster) -> Detail:
        detail = Detail(row.digest[:24]).field("models", ", ".join(row.models) or "none").field("type", row.architecture)
        detail.field("image", size(row.image_bytes)).field("KV", f"{size(row.kv_token_bytes)} a token")
        detail.field("context", f"{count(row.max_context_tokens)} tokens").field("age", age(cluster.now() - row.created_at))
        detail.head("copies")
        if not row.placements:
            detail.line(Span("on no node", MUTED))
        pins = {(pin.node, pin.tier) for pin in row.pins}
        for place in sorted(row.placements, key=lambda each: (each.node, each.tier, each.device)):
            pinned = [Span(" pinned", WARN)] if (place.node, place.tier) in pins else []
            used = Span(f" {place.users} in use", MUTED) if place.users else Span("")
            where = f"{place.tier}{f' {place.device}' if place.tier is Tier.DEVICE else ''}"
            detail.line(
                f"{place.node:<14} ",
                Span(f"{where:<9} ", _LETTERS.get(place.tier, ("", MUTED))[1]),
                f"{size(place.size_bytes):>5} ",
                state(place.state.value),
                used,
                *pinned,
            )
            for copy in place.copies:
                how = "in place" if copy.in_place else "ingested"
                sound = copy.state is TierState.RESIDENT
                known = ("verified" if copy.verified else "not verified") if sound else copy.state.value
                detail.line(Span(f"  {copy.layout} ({how}) {size(copy.size_bytes)} {known}", MUTED))
            if place.reason:
                detail.line(Span(f"  {place.reason}", BAD))
        for published in row.publications:
            detail.head("published").line(published.url).line(Span(f"{age(cluster.now() - published.published_at)} ago", MUTED))
            if published.doubt:
                detail.line(Span(f"in doubt: {published.doubt}", BAD))
        detail.head("legend").line(Span("D", ACCENT), " disk  ", Span("M", GOOD), " DRAM  ", Span("G", DEVICE), " device")
        return detail.line("small: on its way   ", _PIN, " pinned   ", Span("!", BAD), " in quarantine")


def _on(node: str, checkpoint: CheckpointView) -> Cell:
    pins = {pin.tier for pin in checkpoint.pins if pin.node == node}
    found: dict[Tier, PlacementView] = {place.tier: place for place in checkpoint.placements if place.node == node}
    spans: list[Span] = []
    for tier, (letter, colour) in _LETTERS.items():
        place = found.get(tier)
        if place is None or place.state is TierState.ABSENT:
            if tier in pins:
                spans += [Span("·", MUTED), _PIN]
            continue
        if place.state is TierState.QUARANTINED:
            spans.append(Span("!", BAD))
        elif place.state is TierState.RESIDENT:
            spans.append(Span(letter, colour))
        else:
            spans.append(Span(letter.lower(), WARN))
        if tier in pins:
            spans.append(_PIN)
    return spans or Span("·", FAINT)


_FIXED: Sequence[Column[CheckpointView]] = (
    Column("digest", "CHECKPOINT", 12, lambda one: one.digest[:12], lambda one: one.digest),
    Column("models", "MODELS", 16, lambda one: ", ".join(one.models) or "-", lambda one: (one.models, one.digest), flex=True),
    Column("size", "SIZE", 5, lambda one: size(one.image_bytes), lambda one: one.image_bytes, right=True),
    Column("copies", "COPIES", 6, lambda one: str(len(one.placements)), lambda one: len(one.placements), right=True, since=92),
    Column(
        "remote",
        "REMOTE",
        6,
        lambda one: Span(str(len(one.publications) or ""), GOOD),
        lambda one: len(one.publications),
        right=True,
    ),
)
