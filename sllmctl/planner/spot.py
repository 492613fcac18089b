"""The best place on one node: the devices that have room, or would have it soonest and at the least cost to others."""

from __future__ import annotations

from dataclasses import dataclass

from schema.states import Tier
from sllmctl.cluster.plans import Move, Rejection
from sllmctl.cluster.records import Node
from sllmctl.planner.arena import clear_arena
from sllmctl.planner.cover import pick, spared
from sllmctl.planner.estimates import Startup
from sllmctl.planner.inquiry import CHEAP, Inquiry
from sllmctl.planner.rooms import Ground, arena_deficit_bytes, ground
from sllmctl.planner.victims import Exit, Exits
from sllmctl.planner.working import Working

__all__ = ["Option", "Spots"]

_ANY_S = float("inf")
_MORE = 3
"""So many devices more than it takes are compared for what it costs to make room on them, those with the most room first."""


@dataclass(slots=True)
class Option:
    """A place, before it is told: ``key`` orders them."""

    key: tuple[float, bool, int, str]
    node: Node
    devices: tuple[int, ...]
    source: Tier
    peer: str
    startup: Startup
    room_s: float
    delay_s: float
    risk_s: float
    free: int
    exits: list[Exit]
    ground: Ground
    moves: tuple[Move, ...] = ()


class Spots:
    """Finds them for one inquiry. ``bounded``: migrations are worked out for a few nodes only."""

    def __init__(self, inquiry: Inquiry, *, bounded: bool) -> None:
        self._inquiry = inquiry
        self._view = inquiry.view
        self._asked = inquiry.asked
        self._locality = inquiry.options.locality
        self._working = Working(inquiry, bounded=bounded)

    def too_small(self, node: Node) -> Rejection | None:
        inquiry, asked, inventory = self._inquiry, self._asked, node.inventory
        assert inventory is not None
        whole = inquiry.fleet.whole.room(node.id, asked.count)
        if whole is None:
            return Rejection.FEW_DEVICES
        if whole - (0 if inventory.devices[0].kind == "cpu" else asked.share) < asked.least:
            return Rejection.SMALL_DEVICE
        if node.id not in inquiry.device and self._arena_bytes(node) > inventory.arena.budget_bytes:
            return Rejection.SMALL_ARENA
        return None

    def best_on(self, node: Node, best: Option | None) -> Option | Rejection:
        """The best place on a node, or why there is none; one that cannot be better than ``best`` is not looked for."""
        asked = self._asked
        small = self.too_small(node)
        if small is not None:
            return small
        if self._is_full(node) and not self._working.any_under(node, _ANY_S if best is None else best.key[0]):
            return Rejection.BUSY_DEVICE
        here = ground(self._view, node, asked, sharing=self._inquiry.options.sharing)
        found: Option | Rejection = Rejection.BUSY_DEVICE
        if len(here.own) >= asked.count:
            found = self._try(here, here.own, Tier.DEVICE, "", best)
        source, peer = self._inquiry.source(node.id)
        if source is None or len(here.own) == len(here.rooms):
            return found
        if self._arena_bytes(node) > here.inventory.arena.budget_bytes:
            return found if isinstance(found, Option) else Rejection.SMALL_ARENA
        if isinstance(found, Option) and best is not None and found.key < best.key:
            best = found
        other = self._try(here, list(here.rooms), source, peer, best)
        if not isinstance(other, Option):
            return found if isinstance(found, Option) or found is Rejection.SLOWER else other
        return other if not isinstance(found, Option) or other.key < found.key else found

    def _is_full(self, node: Node) -> bool:
        """True if only the busy could make room on enough of its devices."""
        asked, loose = self._asked, self._view.memory.loose_on[node.id].values()
        need = asked.least + (0 if self._inquiry.fleet.mixed else asked.share)
        return (max(loose) if asked.count == 1 else sorted(loose)[-asked.count]) < need

    def _arena_bytes(self, node: Node) -> int:
        return self._view.memory.arena_bytes_of(node.id, self._asked.digest)

    def _try(self, here: Ground, allowed: list[int], source: Tier, peer: str, best: Option | None) -> Option | Rejection:
        """The best place on these devices, its weights coming from there."""
        asked, node = self._asked, here.node
        count, least, rooms, lodgers = asked.count, asked.least, here.rooms, here.lodgers
        order = sorted(allowed, key=lambda index: (-rooms[index], index)) if len(allowed) > 1 else allowed
        devices = order[:count]
        deficit = 0 if source is Tier.DEVICE else arena_deficit_bytes(self._view, node, asked.digest)
        free = rooms[devices[-1]] >= least
        if lodgers:
            unlodged = [index for index in order if not lodgers.get(index)][:count]
            free = len(unlodged) == count and rooms[unlodged[-1]] >= least
            devices = unlodged if free else devices
        startup = self._startup(here, devices, source, peer)
        floor_s = startup.total_s - startup.queue_s if self._locality else 0.0
        if best is not None and self._locality:
            limit_s = best.key[0]
            if floor_s > limit_s or (floor_s == limit_s and not free and not best.exits):
                return Rejection.SLOWER
        if free and not deficit:
            if startup.queue_s > 0.0 and self._locality:
                devices, startup = self._least_queued(here, order, devices, source, peer, startup)
            return self._option(here, sorted(devices), source, peer, startup, [], ())
        limit_s = _ANY_S if best is None else best.key[0] - floor_s
        found = self._make_room(here, order, devices if free else None, deficit, floor_s, limit_s)
        if not isinstance(found, tuple):
            return found
        return self._option(here, sorted(found[0]), source, peer, None, found[1], found[2])

    def _make_room(
        self, here: Ground, order: list[int], free: list[int] | None, deficit: int, floor_s: float, limit_s: float
    ) -> tuple[list[int], list[Exit], tuple[Move, ...]] | Rejection:
        """Devices, who leaves them (or, where they are ``free``, the arena), and where the busy go."""
        asked, inquiry, rooms = self._asked, self._inquiry, here.rooms
        taken: list[Exit] = []
        moves: tuple[Move, ...] = ()
        exits = Exits(inquiry.view, here.node, asked, inquiry.prices, inquiry.journals, inquiry.settings, busy=bool(deficit))
        if free is None:
            loose = order if deficit else self._loose(here, order)
            enough_s = CHEAP * floor_s
            chosen = None
            if len(loose) >= asked.count:
                few = loose[: asked.count + _MORE]
                chosen = pick(rooms, few, here.lodgers, exits.on, asked.count, asked.least, enough_s)
                if chosen is None and len(few) < len(loose):
                    chosen = pick(rooms, loose, here.lodgers, exits.on, asked.count, asked.least, enough_s)
            if chosen is None or (chosen[0] > enough_s and not deficit):
                found = self._working.with_busy(here, order, chosen, limit_s, deficit)
                if found is None:
                    return Rejection.BUSY_DEVICE if limit_s == _ANY_S else Rejection.SLOWER
                free, taken, moves = found
            else:
                free, taken = chosen[1], chosen[2]
        for_arena: list[Exit] = []
        if deficit:
            more = clear_arena(inquiry, here.node.id, exits.all(), taken, deficit)
            if more is None:
                return Rejection.BUSY_ARENA
            for_arena = more
            taken = taken + [one for one in more if one not in taken]
        if len(taken) > 1 and not here.lodgers and not moves:
            taken = spared(rooms, free, asked.least, taken, for_arena)
        return free, taken, moves

    def _loose(self, here: Ground, allowed: list[int]) -> list[int]:
        """The devices that would have room without idle weights, and without those who rest or leave already."""
        loose, asked = self._view.memory.loose_on[here.node.id], self._asked
        # On a CPU the weights take none of it, and more devices are let through than have room.
        need = asked.least + (0 if here.cpu else asked.share)
        return [index for index in allowed if loose[index] >= need]

    def _least_queued(
        self, here: Ground, order: list[int], devices: list[int], source: Tier, peer: str, startup: Startup
    ) -> tuple[list[int], Startup]:
        """Of the devices with room, those with less room but a shorter queue."""
        count = self._asked.count
        fit = [index for index in order if here.rooms[index] >= self._asked.least and not here.lodgers.get(index)]
        for at in range(1, len(fit) - count + 1):
            other = fit[at : at + count]
            found = self._startup(here, other, source, peer)
            if found.total_s < startup.total_s:
                devices, startup = other, found
        return devices, startup

    def _startup(self, here: Ground, devices: list[int], source: Tier, peer: str, later_s: float = 0.0) -> Startup:
        if source is not Tier.DEVICE and here.has_own(devices):
            source, peer = Tier.DEVICE, ""
        asked = self._asked
        return self._inquiry.estimates.startup(here.node, asked.checkpoint, devices, source, peer, asked.now, later_s=later_s)

    def _option(
        self,
        here: Ground,
        devices: list[int],
        source: Tier,
        peer: str,
        startup: Startup | None,
        exits: list[Exit],
        moves: tuple[Move, ...],
    ) -> Option:
        room_s = delay_s = 0.0
        rooms = {index: here.rooms[index] for index in devices}
        for one in exits:
            room_s = max(room_s, one.room_s)
            delay_s += one.delay_s
            for index, size in one.frees.items():
                if index in rooms:
                    rooms[index] += size
        if source is not Tier.DEVICE and here.has_own(devices):
            source, peer = Tier.DEVICE, ""
        if startup is None:
            startup = self._startup(here, devices, source, peer, room_s)
        if source is Tier.REMOTE:
            delay_s += self._inquiry.fetch_s
        if exits:
            delay_s -= self._keep_weights(rooms, exits)
        free = min(rooms.values())
        asked = self._asked
        risk_s = self._inquiry.settings.failed_cost_s if asked.model.avoided.get(here.node.id, 0.0) > asked.now else 0.0
        cost_s = room_s + delay_s + risk_s + (startup.total_s if self._locality else 0.0)
        return Option(
            (cost_s, bool(exits), -free, here.node.id), here.node, tuple(devices), source, peer, startup, room_s, delay_s,
            risk_s, free, exits, here, moves,
        )  # fmt: skip

    def _keep_weights(self, rooms: dict[int, int], exits: list[Exit]) -> float:
        """Weights of those who leave stay where there is room enough, the costliest first; returns the delay saved."""
        saved = 0.0
        for at, one in sorted(enumerate(exits), key=lambda item: -item[1].weights_s):
            if not one.weights or not one.ids:
                continue
            if min(room - one.weights.get(index, 0) for index, room in rooms.items()) < self._asked.least:
                continue
            kept = Exit({index: size - one.weights.get(index, 0) for index, size in one.frees.items()})
            kept.delay_s, kept.room_s = one.delay_s - one.weights_s, one.room_s
            kept.ids, kept.stops, kept.drains = one.ids, one.stops, one.drains
            exits[at] = kept
            saved += one.weights_s
            for index, size in one.weights.items():
                if index in rooms:
                    rooms[index] -= size
        return saved
