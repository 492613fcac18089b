"""The planners that sllmctl's own is compared with: a place drawn at random, and the soonest place by preemption.

Both take idle weights and resting instances for room, as the production planner does, and follow its rules for who may leave:
nobody takes an instance from the request that it was started for. A device that others are leaving is not taken until they
have left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import comb
from random import Random
from typing import Protocol, runtime_checkable

from schema.states import Tier
from sllmctl.cluster.plans import Candidate, Decision, Plan, Refusal, Rejection
from sllmctl.cluster.records import HOLDING, LEAVING, Instance, Model, Node
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.cover import choose
from sllmctl.planner.estimates import Estimates, Startup
from sllmctl.planner.interface import Abilities, Journals
from sllmctl.planner.memory import WorkingNeed, given_bytes
from sllmctl.planner.planner import LocalityPlanner
from sllmctl.planner.prices import Prices
from sllmctl.planner.rooms import Ask, Fleet, Ground, arena_deficit_bytes, ask, fleet, ground
from sllmctl.planner.victims import Exit, exits_on

__all__ = ["Histories", "Preempting", "RandomPlanner", "Unwaiting"]

_DRAWN = 16
"""So many nodes are drawn, and one of all their places. On clusters of up to so many, each place is as likely as any other."""
_LOOKED_AT = 16
"""So many nodes of each class of sources are compared, those with free room first."""
_PREEMPTION_S = 1.0
"""What `choose` counts for a preemption, so that of equally soon places it takes the one with the fewest."""


@runtime_checkable
class Histories(Protocol):
    """Journals that also tell who ran before."""

    def resumed(self, instance: str) -> int:
        """How many of the sequences on an instance were lost by another before."""


class Unwaiting:
    """A planner that never waits for an instance that runs: the paper's scheduler places each request by itself."""

    def __init__(self, planner: LocalityPlanner) -> None:
        self._planner = planner

    def plan(self, model: Model, now: float, *, wait_s: float | None = None) -> Decision:
        return self._planner.plan(model, now)

    def reload_s(self, model: Model, now: float) -> float:
        return self._planner.reload_s(model, now)


@dataclass(slots=True)
class _Place:
    """Devices of a node, who leaves them, and the room for the KV cache on the tightest."""

    here: Ground
    devices: list[int]
    exits: list[Exit]
    free: int


class _Baseline(ABC):
    """What both have in common: which places there are on a node, and how a place is told."""

    def __init__(
        self,
        view: ClusterView,
        estimates: Estimates,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        *,
        sharing: bool,
    ) -> None:
        self._view = view
        self._estimates = estimates
        self._journals = journals
        self._settings = settings
        self._abilities = abilities
        self._sharing = sharing
        self._fleet: Fleet | None = None
        self._reloads = LocalityPlanner(view, estimates, journals, settings, abilities)

    def plan(self, model: Model, now: float, *, wait_s: float | None = None) -> Decision:
        """A place for one more instance; it is never waited for one that runs."""
        view, open_ = self._view, self._open()
        checkpoint = view.checkpoints.get(model.digest) if model.digest is not None else None
        if checkpoint is None:
            return Refusal({Rejection.UNKNOWN: len(open_.open)}, True, f"model {model.name!r} has no known checkpoint")
        asked = ask(model, checkpoint, self._settings, now)
        found = self._find(asked, open_)
        if found is not None:
            return Plan(found, (), {}, f"on {found.name}: weights on {found.source.value}")
        if not open_.open and open_.closed:
            return Refusal({Rejection.JOINING: len(open_.closed)}, False, "no node takes instances yet")
        need = asked.least if open_.mixed else asked.least + asked.share
        reason = Rejection.BUSY_DEVICE if open_.whole.count(asked.count, need) else Rejection.SMALL_DEVICE
        text = f"no node has room for model {model.name!r}{' now' if reason.passing else ''}"
        return Refusal({reason: len(open_.open)}, not reason.passing, text)

    def reload_s(self, model: Model, now: float) -> float:
        return self._reloads.reload_s(model, now)

    @abstractmethod
    def _find(self, asked: Ask, open_: Fleet) -> Candidate | None: ...

    def _open(self) -> Fleet:
        if self._fleet is None or self._fleet.means != self._view.means:
            self._fleet = fleet(self._view)
        return self._fleet

    def _ground(self, node: Node, asked: Ask) -> Ground | None:
        assert node.inventory is not None
        if len(node.inventory.devices) < asked.count or arena_deficit_bytes(self._view, node, asked.digest):
            return None
        return ground(self._view, node, asked, sharing=self._sharing)

    def _exits(self, here: Ground, asked: Ask, *, preempting: bool) -> list[Exit]:
        """Who may leave at once: idle weights, resting instances and, if it may be, busy ones by preemption."""
        view, settings = self._view, self._settings
        prices = Prices(view, self._estimates, settings, asked.now)
        found = exits_on(
            view, here.node, asked, prices, self._journals, settings, devices=here.rooms, busy=preempting,
            moving=self._preempted if preempting else None,
        )  # fmt: skip
        return [
            one for one in found if one.room_s <= 0.0 and not one.drains and not any(self._leaves(name) for name in one.ids)
        ]

    def _leaves(self, instance: str) -> bool:
        return self._view.instances[instance].state in LEAVING

    def _preempted(self, instance: Instance) -> Exit | None:
        """No busy instance leaves but by preemption."""
        return None

    def _place(self, here: Ground, asked: Ask, devices: list[int], exits: list[Exit]) -> _Place | None:
        """These devices and the fewest who must leave them, or None."""
        rooms = here.rooms
        if all(rooms[index] >= asked.least and not here.lodgers.get(index) for index in devices):
            return _Place(here, devices, [], min(rooms[index] for index in devices))
        chosen = choose(rooms, devices, here.lodgers, exits, len(devices), asked.least)
        if chosen is None:
            return None
        return _Place(here, devices, chosen[2], _room(here, devices, chosen[2]))

    def _feasible(self, here: Ground, asked: Ask, exits: list[Exit]) -> list[int]:
        return [index for index in here.rooms if self._place(here, asked, [index], exits) is not None]

    def _source(self, here: Ground, devices: list[int], asked: Ask) -> tuple[Tier, str] | None:
        """Where the weights come from if the instance starts there; None if they cannot."""
        view, node, digest = self._view, here.node.id, asked.digest
        if here.own and all(index in here.own for index in devices):
            return Tier.DEVICE, ""
        for tier in (Tier.DRAM, Tier.DISK):
            if node in view.nodes_with(digest, tier):
                return tier, ""
        if not self._abilities.fetch:
            return None
        open_ = self._open().open
        for tier in (Tier.DRAM, Tier.DISK):
            for peer in view.nodes_with(digest, tier):
                if peer != node and peer in open_:
                    return Tier.REMOTE, peer
        return Tier.REMOTE, ""

    def _candidate(
        self, place: _Place, asked: Ask, source: tuple[Tier, str], startup: Startup, others: list[Exit]
    ) -> Candidate:
        """``others``: those who may leave too; idle weights among them go until the KV cache gets what it wants."""
        here, exits = place.here, list(place.exits)
        free = place.free
        if not here.cpu and self._sharing:
            for one in others:
                if free >= asked.wanted:
                    break
                if not one.ids and one not in exits and any(index in one.frees for index in place.devices):
                    exits.append(one)
                    free = _room(here, place.devices, exits)
        stops = tuple(name for one in exits for name in one.stops)
        return Candidate(
            node=here.node.id,
            name=here.node.name,
            devices=tuple(sorted(place.devices)),
            working_bytes=given_bytes(WorkingNeed(asked.least, asked.wanted), free, cpu=here.cpu),
            source=source[0],
            peer=source[1],
            queue_s=startup.queue_s,
            load_s=startup.load_s,
            startup_s=startup.total_s,
            free_bytes=free,
            drops=tuple(dict.fromkeys(digest for one in exits for digest in one.drops)),
            stops=stops,
            preempts=tuple(name for one in exits for name in one.ids if name not in stops),
        )

    def _startup(self, here: Ground, devices: list[int], asked: Ask, source: tuple[Tier, str]) -> Startup:
        return self._estimates.startup(here.node, asked.checkpoint, devices, source[0], source[1], asked.now)


def _room(here: Ground, devices: list[int], exits: list[Exit]) -> int:
    return min(here.rooms[index] + sum(one.frees.get(index, 0) for one in exits) for index in devices)


class RandomPlanner(_Baseline):
    """ "Serverless" of the paper: any place that has room is as good as any other."""

    def __init__(
        self,
        view: ClusterView,
        estimates: Estimates,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        random: Random,
        *,
        sharing: bool,
    ) -> None:
        super().__init__(view, estimates, journals, settings, abilities, sharing=sharing)
        self._random = random

    def _find(self, asked: Ask, open_: Fleet) -> Candidate | None:
        found: list[tuple[Ground, list[int], list[Exit]]] = []
        weights: list[int] = []
        for name in self._drawn(asked, open_):
            here = self._ground(open_.open[name], asked)
            if here is None or not (self._abilities.fetch or self._source(here, list(here.rooms), asked)):
                continue
            exits = self._exits(here, asked, preempting=False)
            devices = self._feasible(here, asked, exits)
            if len(devices) >= asked.count:
                found.append((here, devices, exits))
                weights.append(comb(len(devices), asked.count))
        while found:
            at = self._random.choices(range(len(found)), weights)[0]
            here, devices, exits = found.pop(at)
            weights.pop(at)
            chosen = sorted(self._random.sample(devices, asked.count))
            place = self._place(here, asked, chosen, exits)
            source = self._source(here, chosen, asked)
            # Each of them alone may have room, and not all together, if one who leaves was counted twice.
            if place is not None and source is not None:
                return self._candidate(place, asked, source, self._startup(here, chosen, asked, source), exits)
        return None

    def _drawn(self, asked: Ask, open_: Fleet) -> list[str]:
        """Nodes with room, or with room if what rests or leaves were gone; at most `_DRAWN` of them, all as likely."""
        loose = self._view.memory.loose
        need = asked.least if open_.mixed else asked.least + asked.share
        if not self._abilities.fetch:
            holders = self._holders(asked.digest)
            names = [name for name in holders if name in open_.open and (loose.room(name, asked.count) or 0) >= need]
            return names if len(names) <= _DRAWN else self._random.sample(names, _DRAWN)
        count = loose.count(asked.count, need)
        places = range(count) if count <= _DRAWN else sorted(self._random.sample(range(count), _DRAWN))
        return [loose.at(asked.count, place) for place in places]

    def _holders(self, digest: str) -> dict[str, None]:
        tiers = (Tier.DEVICE, Tier.DRAM, Tier.DISK)
        return {name: None for tier in tiers for name in self._view.nodes_with(digest, tier)}


class Preempting(_Baseline):
    """SHEPHERD* of the paper: the place with the lowest estimated startup, queues included, whatever runs there.

    A busy device is taken only if none that is free, or can be freed without preemption, has as low an estimate. Preempted is
    an instance that is ready and has been served, if no sequence on it was lost by another instance before: so a request is
    preempted once at most. It is resumed elsewhere from its tokens.
    """

    def __init__(
        self,
        view: ClusterView,
        estimates: Estimates,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        *,
        sharing: bool,
    ) -> None:
        super().__init__(view, estimates, journals, settings, abilities, sharing=sharing)
        if not isinstance(journals, Histories):
            raise TypeError("preemption needs journals that tell who ran before (Histories)")
        self._histories: Histories = journals
        self._asking = ""

    def _find(self, asked: Ask, open_: Fleet) -> Candidate | None:
        self._asking = asked.model.name
        best: tuple[tuple[float, bool, float, int, str], _Place, tuple[Tier, str], Startup, list[Exit]] | None = None
        looked: dict[str, None] = {}
        for members in self._classes(asked, open_):
            if members is open_.open and best is not None and not best[0][1]:
                # Fetching is slower than any copy that is there, but for queues; then a free place is near enough.
                break
            for name in self._few(members, asked, open_):
                if name in looked or name not in open_.open:
                    continue
                looked[name] = None
                here = self._ground(open_.open[name], asked)
                found = None if here is None else self._best_on(here, asked)
                if found is not None and (best is None or found[0] < best[0]):
                    best = found
        if best is None:
            return None
        _, place, source, startup, exits = best
        return self._candidate(place, asked, source, startup, exits)

    def _classes(self, asked: Ask, open_: Fleet) -> Iterator[Mapping[str, object]]:
        for tier in (Tier.DEVICE, Tier.DRAM, Tier.DISK):
            yield self._view.nodes_with(asked.digest, tier)
        if self._abilities.fetch:
            yield open_.open

    def _few(self, members: Mapping[str, object], asked: Ask, open_: Fleet) -> Iterator[str]:
        if len(members) <= _LOOKED_AT:
            yield from members
            return
        need = asked.least if open_.mixed else asked.least + asked.share
        yield from (name for _, name in islice(self._view.memory.free.nodes(asked.count, need), _LOOKED_AT) if name in members)
        yield from islice(members, _LOOKED_AT)

    def _best_on(
        self, here: Ground, asked: Ask
    ) -> tuple[tuple[float, bool, float, int, str], _Place, tuple[Tier, str], Startup, list[Exit]] | None:
        """The soonest place of a node, devices taken one by one; of equals that with the fewest preemptions."""
        exits = self._exits(here, asked, preempting=True)
        ranked: list[tuple[float, int, int, int]] = []
        for index in here.rooms:
            place = self._place(here, asked, [index], exits)
            source = self._source(here, [index], asked) if place is not None else None
            if place is not None and source is not None:
                startup = self._startup(here, [index], asked, source)
                ranked.append((startup.total_s, _preemptions(place.exits), -place.free, index))
        if len(ranked) < asked.count:
            return None
        devices = sorted(index for *_, index in sorted(ranked)[: asked.count])
        place, source = self._place(here, asked, devices, exits), self._source(here, devices, asked)
        if place is None or source is None:
            return None
        startup = self._startup(here, devices, asked, source)
        busy = _preemptions(place.exits)
        return (startup.total_s, busy > 0, busy, -place.free, here.node.id), place, source, startup, exits

    def _preempted(self, instance: Instance) -> Exit | None:
        if not instance.served or instance.model == self._asking or self._histories.resumed(instance.id):
            return None
        owner = self._view.models.get(instance.model)
        if owner is not None and owner.spec.scale.min:
            others = self._view.instances_of(instance.model).values()
            if sum(one.state in HOLDING and one.state not in LEAVING for one in others) <= owner.spec.scale.min:
                return None
        found = Exit(dict.fromkeys(instance.devices, instance.working_bytes), _PREEMPTION_S)
        found.ids = (instance.id,)
        return found


def _preemptions(exits: list[Exit]) -> int:
    return sum(len(one.ids) - len(one.stops) for one in exits)
