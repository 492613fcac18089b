"""What one plan reads, gathered once: the cluster, the ask, where its weights lie, and what losing others' things costs."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from schema.states import Tier
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Abilities, Journals
from sllmctl.planner.prices import Prices
from sllmctl.planner.rooms import Ask, Fleet

__all__ = ["CHEAP", "Inquiry", "PlannerOptions"]

CHEAP = 0.02
"""What costs others less than this part of the start is as good as free."""


class PlannerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a planner leaves out, to see what it is worth. Without ``locality`` it looks neither at where weights lie nor at
    queues when it compares nodes, and the roomiest wins. Without ``sharing`` a device is one instance's alone."""

    locality: bool = True
    sharing: bool = True


class Inquiry:
    """``device``, ``dram``, ``disk``: the nodes where the weights lie; ``fetch``: the others may fetch them, at
    ``fetch_s`` beside what it takes; ``peers``: from whom, the best two."""

    __slots__ = ("abilities", "asked", "device", "disk", "dram", "estimates", "fetch", "fetch_s", "fleet", "journals",
                 "options", "peers", "prices", "settings", "view")  # fmt: skip

    def __init__(
        self,
        view: ClusterView,
        estimates: Estimates,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        options: PlannerOptions,
        fleet: Fleet,
        asked: Ask,
    ) -> None:
        self.view = view
        self.estimates = estimates
        self.journals = journals
        self.settings = settings
        self.abilities = abilities
        self.options = options
        self.fleet = fleet
        self.asked = asked
        self.prices = Prices(view, estimates, settings, asked.now)
        self.device: Mapping[str, int] = view.nodes_with(asked.digest, Tier.DEVICE)
        self.dram: Mapping[str, int] = view.nodes_with(asked.digest, Tier.DRAM)
        self.disk: Mapping[str, int] = view.nodes_with(asked.digest, Tier.DISK)
        self.fetch = abilities.fetch or (abilities.published and view.is_published(asked.digest))
        self.fetch_s = 0.0 if abilities.fetch else settings.fetch_cost_s
        self.peers = self._find_peers() if abilities.fetch else [""]

    def holds(self, node: str) -> bool:
        return node in self.disk or node in self.dram or node in self.device

    def source(self, node: str) -> tuple[Tier | None, str]:
        """Where a start on a node whose devices lack the weights gets them, and from which peer."""
        if node in self.dram:
            return Tier.DRAM, ""
        if node in self.disk:
            return Tier.DISK, ""
        if self.fetch:
            return Tier.REMOTE, next((peer for peer in self.peers if peer != node), "")
        return None, ""

    def _find_peers(self) -> list[str]:
        """Those that have it in DRAM before those that have it on disk."""
        found: list[str] = []
        for members in (self.dram, self.disk):
            for name in members:
                if name in self.fleet.open and name not in found:
                    found.append(name)
                    if len(found) == 2:
                        return found
        return found
