"""New instances for those that migrate to one node, all together: on which of its devices, and what is dropped for them there.

Room is what is free now, and what idle weights give that are dropped: of checkpoints that nothing uses on the node, and that
none of the new instances is of. Of the sets of devices, and of the idle weights in the way, the cheapest are taken: all
are looked at up to `_SETS` sets for each instance, `_TRIALS` together and `_SUBSETS` idle checkpoints in the way; beyond that
the roomiest sets, and what gives most bytes for its price. The DRAM budget has to hold what is loaded, beside what is used.
The loads share the node's channels, so each is counted as done when all of them are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product
from math import comb

from schema.states import Tier
from sllmctl.cluster.records import Node
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.memory import WorkingNeed, given_bytes
from sllmctl.planner.prices import Prices
from sllmctl.planner.rooms import Ask

__all__ = ["Packer", "Packing", "Start", "Tenant"]

_SETS = 10
_TRIALS = 64
_SUBSETS = 5


class Start:
    """A way to start an instance on a node: with weights from ``source``, on some of ``devices``."""

    __slots__ = ("ask", "devices", "node", "peer", "source")

    def __init__(self, node: Node, wanted: Ask, devices: tuple[int, ...], source: Tier, peer: str) -> None:
        self.node = node
        self.ask = wanted
        self.devices = devices
        self.source = source
        self.peer = peer


@dataclass(slots=True, frozen=True)
class Tenant:
    """One that is to start so, with a KV cache of ``least`` bytes on each device."""

    start: Start
    least: int


@dataclass(slots=True, frozen=True)
class Packing:
    """Where the tenants go, in their order: devices, working memory, when each is ready; what is dropped, what that costs."""

    places: tuple[tuple[int, ...], ...]
    working_bytes: tuple[int, ...]
    ready_s: tuple[float, ...]
    drops: tuple[str, ...]
    drops_s: float


@dataclass(slots=True)
class _Lot:
    """A node's devices: ``free`` bytes where nothing is promised, before idle weights; those, with what dropping them costs.
    ``loose``: what is free without those that may be dropped."""

    free: dict[int, int]
    loose: dict[int, int]
    idle: dict[int, dict[str, int]]
    prices: dict[str, float]
    arena_bytes: int


class Packer:
    """Packs tenants as of one plan. ``sharing``: several instances may be on one device."""

    def __init__(
        self, view: ClusterView, estimates: Estimates, prices: Prices, newcomer: Ask, *, now: float, sharing: bool
    ) -> None:
        self._view = view
        self._estimates = estimates
        self._prices = prices
        self._newcomer = newcomer
        self._now = now
        self._sharing = sharing
        self._lots: dict[str, _Lot] = {}
        self._known: dict[tuple[tuple[Tenant, ...], tuple[int, ...], bool], Packing | None] = {}

    def has_room(self, tenant: Tenant) -> bool:
        """True if one alone would find enough devices, whatever is dropped; the DRAM budget is not looked at."""
        start, digest = tenant.start, tenant.start.ask.digest
        lot = self._lot(start.node)
        need = tenant.least + self._share(start)
        held = self._view.memory.holds_arena(start.node.id, digest)
        fit = 0
        for index in start.devices:
            loose = lot.loose.get(index)
            if loose is not None and loose + (lot.idle[index].get(digest, 0) if held else 0) >= need:
                fit += 1
        return fit >= start.ask.count

    def pack(self, tenants: tuple[Tenant, ...], *, beside: tuple[int, ...] = (), loads: bool = False) -> Packing | None:
        """All of them on one node; None if that cannot be. ``beside``: it is the newcomer's node too, which has those devices;
        ``loads``: and loads its weights there."""
        key = (tenants, beside, loads)
        if key not in self._known:
            self._known[key] = self._pack(tenants, beside, loads)
        return self._known[key]

    def _pack(self, tenants: tuple[Tenant, ...], beside: tuple[int, ...], loads: bool) -> Packing | None:
        node = tenants[0].start.node
        lot = self._lot(node)
        if not self._arena_holds(node, lot, tenants, beside, loads):
            return None
        own = {tenant.start.ask.digest for tenant in tenants}
        kept = set(own)
        for index in beside:
            kept.update(lot.idle.get(index, ()))
        if beside:
            kept.add(self._newcomer.digest)
        best: tuple[float, tuple[tuple[int, ...], ...], tuple[str, ...]] | None = None
        sets = [self._sets(lot, tenant, beside) for tenant in tenants]
        for places in islice(product(*sets), _TRIALS) if len(sets) > 1 else zip(*sets, strict=True):
            found = self._drops(node, lot, tenants, places, kept, float("inf") if best is None else best[0])
            if found is not None and (best is None or found[0] < best[0]):
                best = (found[0], places, found[1])
                if not found[1]:
                    break
        if best is None:
            return None
        drops_s, places, drops = best
        return Packing(places, self._given(lot, tenants, places, drops), self._ready_s(tenants, places), drops, drops_s)

    # --- what is there ---

    def _lot(self, node: Node) -> _Lot:
        lot = self._lots.get(node.id)
        if lot is None:
            view = self._view
            assert node.inventory is not None
            lot = self._lots[node.id] = _Lot({}, {}, {}, {}, view.memory.arena_held_bytes.get(node.id, 0))
            taken: set[int] = set()
            if not self._sharing:
                taken = {index for one in view.instances_on(node.id).values() for index in one.devices}
            for device in node.inventory.devices:
                key = (node.id, device.index)
                if device.index not in taken:
                    lot.free[device.index] = device.memory_bytes - view.memory.committed_bytes.get(key, 0)
                    idle = lot.idle[device.index] = view.memory.idle_weights.get(key, {})
                    held = sum(size for digest, size in idle.items() if view.memory.holds_arena(node.id, digest))
                    lot.loose[device.index] = lot.free[device.index] - held
        return lot

    def _price_s(self, node: Node, lot: _Lot, digest: str) -> float:
        """What others pay if idle weights are dropped; infinite if they may not be."""
        found = lot.prices.get(digest)
        if found is None:
            if self._view.memory.holds_arena(node.id, digest):
                found = float("inf")
            else:
                found = self._prices.weights_s(node, digest, max(here.get(digest, 0) for here in lot.idle.values()))
            lot.prices[digest] = found
        return found

    def _arena_holds(self, node: Node, lot: _Lot, tenants: Sequence[Tenant], beside: tuple[int, ...], loads: bool) -> bool:
        view = self._view
        loaded = {tenant.start.ask.digest for tenant in tenants if tenant.start.source is not Tier.DEVICE}
        if loads and beside:
            loaded.add(self._newcomer.digest)
        assert node.inventory is not None
        more = sum(
            view.memory.arena_bytes_of(node.id, digest) for digest in loaded if not view.memory.keeps_arena(node.id, digest)
        )
        return not more or lot.arena_bytes + more <= node.inventory.arena.budget_bytes

    # --- places ---

    def _sets(self, lot: _Lot, tenant: Tenant, beside: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Sets of devices for one, the roomiest first."""
        digest, count = tenant.start.ask.digest, tenant.start.ask.count
        rooms: dict[int, int] = {}
        for index in tenant.start.devices:
            if index in lot.free and index not in beside:
                idle = lot.idle[index]
                rooms[index] = lot.free[index] - sum(idle.values()) + idle.get(digest, 0)
        if len(rooms) < count:
            return []
        order = sorted(rooms, key=lambda index: (-rooms[index], index))
        if comb(len(order), count) <= _SETS:
            return list(combinations(order, count))
        loosest = sorted(rooms, key=lambda index: (-lot.free[index], index))
        return [tuple(order[:count]), tuple(loosest[:count])]

    def _drops(
        self,
        node: Node,
        lot: _Lot,
        tenants: Sequence[Tenant],
        places: Sequence[tuple[int, ...]],
        kept: set[str],
        limit_s: float,
    ) -> tuple[float, tuple[str, ...]] | None:
        """The cheapest idle weights to drop so that all have room there, for less than ``limit_s``."""
        lacks: dict[int, int] = {}
        for index, room in self._rooms(lot, tenants, places).items():
            if room < 0:
                lacks[index] = -room
        if not lacks:
            return 0.0, ()
        in_way: dict[str, float] = {}
        for index, lack in lacks.items():
            for digest, size in lot.idle[index].items():
                if digest not in kept and (price_s := self._price_s(node, lot, digest)) < limit_s:
                    in_way[digest] = price_s
                    lack -= size
            if lack > 0:
                return None
        found: tuple[float, tuple[str, ...]] | None = None
        for trial in _trials(sorted(in_way), in_way, lot, lacks):
            price_s = sum(in_way[digest] for digest in trial)
            if price_s < (limit_s if found is None else found[0]) and all(
                sum(lot.idle[index].get(digest, 0) for digest in trial) >= lack for index, lack in lacks.items()
            ):
                found = (price_s, trial)
        return found

    def _rooms(self, lot: _Lot, tenants: Sequence[Tenant], places: Sequence[tuple[int, ...]]) -> dict[int, int]:
        """What is left of each device when all have their least; weights of their own that lie there are theirs."""
        rooms: dict[int, int] = {}
        mine: dict[int, set[str]] = {}
        taken: set[int] = set()
        for tenant, devices in zip(tenants, places, strict=True):
            wanted = tenant.start.ask
            for index in devices:
                if index not in rooms:
                    rooms[index] = lot.free[index] - sum(lot.idle[index].values())
                elif not self._sharing:
                    rooms[index] = -1 << 62
                digests = mine.setdefault(index, set())
                if wanted.digest not in digests:
                    digests.add(wanted.digest)
                    rooms[index] += lot.idle[index].get(wanted.digest, 0)
                rooms[index] -= tenant.least + self._share(tenant.start)
                taken.add(index)
        return rooms

    def _share(self, start: Start) -> int:
        assert start.node.inventory is not None
        return 0 if start.node.inventory.devices[0].kind == "cpu" else start.ask.share

    def _given(
        self, lot: _Lot, tenants: Sequence[Tenant], places: Sequence[tuple[int, ...]], drops: Iterable[str]
    ) -> tuple[int, ...]:
        """KV bytes for each: what all need at least is set aside before anybody gets more."""
        rooms = self._rooms(lot, tenants, places)
        for index in rooms:
            rooms[index] += sum(lot.idle[index].get(digest, 0) for digest in drops)
        given: list[int] = []
        for tenant, devices in zip(tenants, places, strict=True):
            free = tenant.least + min(rooms[index] for index in devices)
            cpu = self._share(tenant.start) == 0
            size = given_bytes(WorkingNeed(tenant.least, max(tenant.least, tenant.start.ask.wanted)), free, cpu=cpu)
            for index in devices:
                rooms[index] -= size - tenant.least
            given.append(size)
        return tuple(given)

    def _ready_s(self, tenants: Sequence[Tenant], places: Sequence[tuple[int, ...]]) -> tuple[float, ...]:
        loads = [self.load_s(tenant.start, devices) for tenant, devices in zip(tenants, places, strict=True)]
        own = [tenant.start.source is Tier.DEVICE for tenant in tenants]
        all_s = sum(load_s for load_s, there in zip(loads, own, strict=True) if not there)
        return tuple(load_s if there else all_s for load_s, there in zip(loads, own, strict=True))

    def load_s(self, start: Start, devices: Sequence[int]) -> float:
        """A start alone."""
        return self._estimates.startup(start.node, start.ask.checkpoint, devices, start.source, start.peer, self._now).total_s

    def soonest_s(self, start: Start) -> float:
        """How soon it could be ready alone, on whichever of its devices."""
        count, devices = start.ask.count, start.devices
        found = self._estimates.startup(start.node, start.ask.checkpoint, devices[:count], start.source, start.peer, self._now)
        if found.queue_s <= 0.0 or len(devices) == count:
            return found.total_s
        later = (self.load_s(start, devices[at : at + count]) for at in range(1, len(devices) - count + 1))
        return min(found.total_s, *later)


def _trials(digests: Sequence[str], prices: dict[str, float], lot: _Lot, lacks: dict[int, int]) -> Iterator[tuple[str, ...]]:
    if len(digests) <= _SUBSETS:
        for size in range(1, len(digests) + 1):
            yield from combinations(digests, size)
        return

    def given(digest: str) -> int:
        return sum(min(lack, lot.idle[index].get(digest, 0)) for index, lack in lacks.items())

    taken: list[str] = []
    for digest in sorted(digests, key=lambda digest: (prices[digest] / max(1, given(digest)), digest)):
        taken.append(digest)
        if all(sum(lot.idle[index].get(one, 0) for one in taken) >= lack for index, lack in lacks.items()):
            for one in sorted(taken, key=lambda digest: (-prices[digest], digest)):
                fewer = [other for other in taken if other != one]
                if all(sum(lot.idle[index].get(other, 0) for other in fewer) >= lack for index, lack in lacks.items()):
                    taken = fewer
            yield tuple(taken)
            return
