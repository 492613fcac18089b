"""Where one more instance of a model goes: the place where it would be ready soonest, what others pay for that included.

The cost of a place is ``startup_s + delay_s``, and ``failed_cost_s`` more where an instance of the model was just given up.
``startup_s`` is the time until those who leave have left, and from then what `Estimates` say of a start there: the queues of
its channels, and its bytes over the slowest of them. ``delay_s`` is what others pay (see `prices`; for those that migrate,
`moves`). A KV cache that is short of what is wanted costs up to ``kv_short_s`` more: its requests would wait for each other,
and few of them would fill it. Ties go to a place for which nobody leaves, then to the one with more free memory, then to the
smaller node id.

`search` says which nodes are compared, `spot` what is the best place on one of them: of nodes that differ in nothing but room
and queues the choice is the best among those looked at. On a cluster of a few nodes its cost is at most 1.04 times the best
place's start and ``2 * devices + 3`` times what that place's room costs, its time and what others pay (see `cover.pick`; all of
it where the DRAM budget has to be made room in as well). Devices of one node are taken by their room first, and with migration
only the soonest few targets of a victim, and only so many nodes, are worked out.
"""

from __future__ import annotations

from schema.states import Tier
from sllmctl.cluster.plans import Candidate, Decision, Plan, Refusal, Rejection, Wait
from sllmctl.cluster.records import Model
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.inquiry import Inquiry, PlannerOptions
from sllmctl.planner.interface import Abilities, Journals
from sllmctl.planner.memory import WorkingNeed, given_bytes
from sllmctl.planner.reasons import plan_reason, refusal, wait_reason
from sllmctl.planner.rooms import Fleet, ask, fleet
from sllmctl.planner.search import Search
from sllmctl.planner.spot import Option
from sllmctl.planner.telling import candidate

__all__ = ["LocalityPlanner", "PlannerOptions"]

_COPIES = 8
"""So many copies of a checkpoint are compared for what a reload takes."""
_COMFORT = 0.5
"""A KV cache of this part of what is wanted is not short."""


class LocalityPlanner:
    """Reads the view, the estimates and the journals by reference, and keeps nothing but an index of the nodes' means."""

    def __init__(
        self,
        view: ClusterView,
        estimates: Estimates,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        options: PlannerOptions | None = None,
    ) -> None:
        self._view = view
        self._estimates = estimates
        self._journals = journals
        self._settings = settings
        self._abilities = abilities
        self._options = options or PlannerOptions()
        self._fleet: Fleet | None = None

    def plan(self, model: Model, now: float, *, wait_s: float | None = None) -> Decision:
        """Where one more instance of ``model`` goes, or why it should not or cannot be. The same view gives the same answer.

        It waits if ``wait_s`` is less than the best place costs, or, once its requests have waited for ``age_s``, less than
        its start takes: what others would pay counts no more then.
        """
        inquiry = self._inquire(model, now)
        return self._unknown(model) if inquiry is None else self._decide(*self._searched(inquiry), wait_s)

    def explain(self, model: Model, now: float) -> tuple[Decision, list[tuple[str, Candidate | Rejection]]]:
        """What `plan` would decide if it looked at every node, and what it found on each, by the node's id."""
        inquiry = self._inquire(model, now)
        if inquiry is None:
            return self._unknown(model), [(node, Rejection.UNKNOWN) for node in self._view.nodes]
        search, inquiry = self._searched(inquiry, bounded=False)
        decision = self._decide(search, inquiry, None)
        told: list[tuple[str, Candidate | Rejection]] = []
        for node, verdict in search.verdicts():
            told.append((node, candidate(inquiry, verdict) if isinstance(verdict, Option) else verdict))
        return decision, told

    def reload_s(self, model: Model, now: float) -> float:
        """How long a start of ``model`` would take, with no queue, when its idle instances and their KV caches are gone: its
        weights still on their device, if they lie on one, or else in the fastest tier that has them."""
        view, settings = self._view, self._settings
        checkpoint = view.checkpoints.get(model.digest) if model.digest is not None else None
        if checkpoint is None:
            return settings.start_base_s
        nodes = self.fleet().open
        later_s = settings.keep_alive_most_s
        for tier in (Tier.DEVICE, Tier.DRAM, Tier.DISK):
            best: float | None = None
            looked = 0
            for name in view.nodes_with(checkpoint.digest, tier):
                node = nodes.get(name)
                if node is None or node.inventory is None or len(node.inventory.devices) < model.spec.devices:
                    continue
                devices = [device.index for device in node.inventory.devices[: model.spec.devices]]
                found = self._estimates.startup(node, checkpoint, devices, tier, "", now, later_s=later_s).total_s
                best = found if best is None else min(best, found)
                looked += 1
                if looked == _COPIES:
                    break
            if best is not None:
                return best
        return settings.start_base_s

    def fleet(self) -> Fleet:
        if self._fleet is None or self._fleet.means != self._view.means:
            self._fleet = fleet(self._view)
        return self._fleet

    def _inquire(self, model: Model, now: float, *, least: int = 0) -> Inquiry | None:
        checkpoint = self._view.checkpoints.get(model.digest) if model.digest is not None else None
        if checkpoint is None:
            return None
        asked = ask(model, checkpoint, self._settings, now)
        asked.least = max(asked.least, least)
        return Inquiry(
            self._view, self._estimates, self._journals, self._settings, self._abilities, self._options, self.fleet(), asked
        )

    def _unknown(self, model: Model) -> Refusal:
        count = len(self._view.nodes) - len(self.fleet().removed)
        return refusal(self._view, model, {Rejection.UNKNOWN: count} if count else {})

    def _searched(self, inquiry: Inquiry, *, bounded: bool = True) -> tuple[Search, Inquiry]:
        """Look for a place with room for a KV cache that is not short; and, unless that is as good as any, for one with room
        for the least that will do, which is then taken if it is cheaper by more than its cache's shortness costs."""
        asked, settings = inquiry.asked, self._settings
        comfort = int(asked.wanted * _COMFORT)
        search = Search(inquiry, bounded=bounded)
        comfortable = None
        if settings.kv_short_s and asked.least < comfort and self._options.sharing:
            comfortable = self._inquire(asked.model, asked.now, least=comfort)
        if comfortable is None:
            search.run()
            return search, inquiry
        roomy = Search(comfortable, bounded=bounded)
        roomy.run()
        if roomy.best is not None and _is_easy(comfortable, roomy.best):
            return roomy, comfortable
        search.run()
        if roomy.best is None or search.best is None:
            return search, inquiry
        if self._priced(comfortable, roomy.best) <= self._priced(inquiry, search.best):
            return roomy, comfortable
        return search, inquiry

    def _priced(self, inquiry: Inquiry, option: Option) -> float:
        """What a place costs, the shortness of its KV cache included."""
        wanted = inquiry.asked.wanted
        given = given_bytes(WorkingNeed(inquiry.asked.least, wanted), option.free, cpu=option.ground.cpu)
        return option.key[0] + self._settings.kv_short_s * (1.0 - given / wanted)

    def _decide(self, search: Search, inquiry: Inquiry, wait_s: float | None) -> Decision:
        found, rejected = search.found(), search.rejected()
        if not found:
            return refusal(self._view, inquiry.asked.model, rejected)
        best = candidate(inquiry, found[0], roomy=True)
        others = tuple(candidate(inquiry, one) for one in found[1 : self._settings.plan_candidates])
        limit = best.startup_s if inquiry.asked.aged else best.cost_s
        if wait_s is not None and wait_s < limit:
            return Wait(wait_s, best, rejected, wait_reason(best, wait_s))
        return Plan(best, others, rejected, plan_reason(self._view, best, len(found), rejected))


def _is_easy(inquiry: Inquiry, option: Option) -> bool:
    """Nobody leaves for it, it waits for nothing, and no node has the weights on a faster tier."""
    if option.exits or option.startup.queue_s > 0.0:
        return False
    if option.source is Tier.DEVICE or inquiry.device:
        return option.source is Tier.DEVICE
    if option.source is Tier.DRAM or inquiry.dram:
        return option.source is Tier.DRAM
    return option.source is Tier.DISK or not inquiry.disk
