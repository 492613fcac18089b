"""Where one more instance of a model goes: the place where it would be ready soonest, what others pay for that included.

The cost of a place is ``startup_s + delay_s``. ``startup_s`` is the time until those who leave have left, and from then what
`Estimates` say of a start there: the queues of its channels, and its bytes over the slowest of them. ``delay_s`` is what others
pay (see `victims`; for those that migrate, `moves`).

Nodes are looked at in classes, by where the weights come from: the device, DRAM, disk, another node. Within a class those with
the most free room come first, then those with the most room if what may leave had left; ties go to a place for which nobody
leaves, then to the one with more free memory, then to the smaller node id. A class has an end (settings.plan_nodes, or
`_ENOUGH` places without a queue), and a node whose start alone would cost more than the best place so far is passed over. So
of nodes that differ in nothing but room and
queues the choice is the best among those looked at. On a cluster of up to `_ENOUGH` nodes its cost is at most the best place's
start and ``2 * devices + 3`` times what that place's room costs, its time and what others pay (see `victims.choose`; all of it
where the DRAM budget has to be made room in as well). Devices of one node are taken by their room first, and with migration
only the soonest few targets of a victim, and only so many nodes, are worked out.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import comb

import msgspec

from schema.states import InstanceState, Tier
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import HOLDING, ClusterView, Instance, Model, Node
from sllmctl.planner.estimates import Channel, Estimates, Startup
from sllmctl.planner.memory import KvNeed, kv_given_bytes
from sllmctl.planner.moves import Movers
from sllmctl.planner.plans import Abilities, Candidate, Decision, Journals, Move, Plan, Rejection, Wait
from sllmctl.planner.reasons import plan_reason, refusal, wait_reason
from sllmctl.planner.rooms import Ask, Fleet, Ground, arena_deficit_bytes, ask, fleet, ground
from sllmctl.planner.victims import Exit, Prices, choose, cover, exits_on, spared

__all__ = ["LocalityPlanner", "PlannerOptions"]

_ENOUGH = 8
"""Places of one class without a queue that are compared: with so many, another is hardly better."""
_MISSED = 16
"""After so many nodes of a class on which nobody may leave, or not soon enough, the others are left for the next time; for
requests that have aged they are not."""
_CHEAP = 0.02
"""What costs others less than this part of the start is as good as free."""
_SOLVED = 4
"""Migrations are worked out for so many nodes of one plan."""
_DEVICE_SETS = 6
"""So many sets of devices are tried on each."""


_Chosen = tuple[float, list[int], list[Exit]]


class PlannerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a planner leaves out, to see what it is worth. Without ``locality`` it looks neither at where weights lie nor at
    queues when it compares nodes, and the roomiest wins. Without ``sharing`` a device is one instance's alone."""

    locality: bool = True
    sharing: bool = True


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
    free: int
    exits: list[Exit]
    ground: Ground
    moves: tuple[Move, ...] = ()

    @property
    def cost_s(self) -> float:
        return self.room_s + self.startup.total_s + self.delay_s


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
        return self._decide(model, now, wait_s, full=False)[0]

    def explain(self, model: Model, now: float) -> tuple[Decision, list[tuple[str, Candidate | Rejection]]]:
        """What `plan` would decide if it looked at every node, and what it found on each, by the node's id."""
        decision, search = self._decide(model, now, None, full=True)
        if search is None:
            return decision, [(node, Rejection.UNKNOWN) for node in self._view.nodes]
        return decision, search.verdicts()

    def reload_s(self, model: Model, now: float) -> float:
        """How long a start of ``model`` would take, with no queue, when its idle instances and their KV caches are gone: its
        weights still on their device, if they lie on one, or else in the fastest tier that has them."""
        view, settings = self._view, self._settings
        checkpoint = view.checkpoints.get(model.digest) if model.digest is not None else None
        if checkpoint is None:
            return settings.start_base_s
        nodes = self.fleet().open
        later = now + settings.keep_alive_most_s
        for tier in (Tier.DEVICE, Tier.DRAM, Tier.DISK):
            best: float | None = None
            looked = 0
            for name in view.nodes_with(checkpoint.digest, tier):
                node = nodes.get(name)
                if node is None or node.inventory is None or len(node.inventory.devices) < model.spec.devices:
                    continue
                devices = [device.index for device in node.inventory.devices[: model.spec.devices]]
                found = self._estimates.startup(node, checkpoint, devices, tier, "", later).total_s
                best = found if best is None else min(best, found)
                looked += 1
                if looked == _ENOUGH:
                    break
            if best is not None:
                return best
        return settings.start_base_s

    def fleet(self) -> Fleet:
        if self._fleet is None or self._fleet.means != self._view.means:
            self._fleet = fleet(self._view)
        return self._fleet

    def _decide(self, model: Model, now: float, wait_s: float | None, *, full: bool) -> tuple[Decision, _Search | None]:
        view = self._view
        checkpoint = view.checkpoints.get(model.digest) if model.digest is not None else None
        fleet = self.fleet()
        if checkpoint is None:
            count = len(view.nodes) - len(fleet.removed)
            return refusal(model, {Rejection.UNKNOWN: count} if count else {}), None
        asked = ask(model, checkpoint, self._settings, now)
        search = _Search(view, self._estimates, self._journals, self._settings, self._abilities, self._options, fleet, asked)
        search.run(full=full)
        found = search.found()
        rejected = search.rejected()
        if not found:
            return refusal(model, rejected), search
        best = search.candidate(found[0], roomy=True)
        others = tuple(search.candidate(one) for one in found[1 : self._settings.plan_candidates])
        limit = best.startup_s if asked.aged else best.cost_s
        if wait_s is not None and wait_s < limit:
            return Wait(wait_s, best, rejected, wait_reason(best, wait_s)), search
        return Plan(best, others, rejected, plan_reason(view, best, len(found), rejected)), search


class _Search:
    """One plan: the nodes looked at, and what was found on each."""

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
        self._view = view
        self._estimates = estimates
        self._journals = journals
        self._settings = settings
        self._abilities = abilities
        self._options = options
        self._fleet = fleet
        self._asked = asked
        self._prices = Prices(view, estimates, settings, asked.now)
        self._looked: dict[str, Option | Rejection] = {}
        self._best: Option | None = None
        self._device = view.nodes_with(asked.digest, Tier.DEVICE)
        self._dram = view.nodes_with(asked.digest, Tier.DRAM)
        self._disk = view.nodes_with(asked.digest, Tier.DISK)
        self._solved = 0
        self._full = False
        self._movers: Movers | None = None
        self._peers = self._find_peers() if abilities.fetch else [""]

    # --- what was found ---

    def found(self) -> list[Option]:
        options = [one for one in self._looked.values() if isinstance(one, Option)]
        options.sort(key=lambda one: one.key)
        return options

    def rejected(self) -> dict[Rejection, int]:
        """How many nodes were rejected for what; with the candidates they are all that are not removed."""
        counts: dict[Rejection, int] = {}
        for verdict in self._looked.values():
            if not isinstance(verdict, Option):
                counts[verdict] = counts.get(verdict, 0) + 1
        total = len(self._fleet.open) + len(self._fleet.closed)
        fetch = self._abilities.fetch
        closed = 0
        for node, reason in self._fleet.closed.items():
            if fetch or self._holds(node):
                closed += 1
                counts[reason] = counts.get(reason, 0) + 1
        if fetch:
            holding = len(self._fleet.open)
        else:
            holding = self._count_holding() - closed
            if total > holding + closed:
                counts[Rejection.NO_COPY] = total - holding - closed
        left = holding - len(self._looked)
        if left > 0:
            if self._best is not None:
                counts[Rejection.SLOWER] = counts.get(Rejection.SLOWER, 0) + left
            else:
                self._count_full(counts, left)
        return counts

    def verdicts(self) -> list[tuple[str, Candidate | Rejection]]:
        """What was found on every node that is not removed."""
        found: list[tuple[str, Candidate | Rejection]] = []
        for name in self._view.nodes:
            if name in self._fleet.removed:
                continue
            verdict = self._looked.get(name)
            if isinstance(verdict, Option):
                found.append((name, self.candidate(verdict)))
            elif verdict is not None:
                found.append((name, verdict))
            elif name in self._fleet.closed and (self._abilities.fetch or self._holds(name)):
                found.append((name, self._fleet.closed[name]))
            else:
                found.append((name, Rejection.NO_COPY))
        return found

    def _holds(self, node: str) -> bool:
        return node in self._disk or node in self._dram or node in self._device

    def _count_holding(self) -> int:
        """Nodes with a whole copy, closed ones included."""
        disk, dram, removed = self._disk, self._dram, self._fleet.removed
        count = len(disk)
        count += sum(node not in disk for node in dram)
        count += sum(node not in disk and node not in dram for node in self._device)
        if removed:
            count -= sum(self._holds(node) for node in removed)
        return count

    def _count_full(self, counts: dict[Rejection, int], left: int) -> None:
        """Nodes that the indexes rule out: too small for it, or in use."""
        asked, fleet = self._asked, self._fleet
        fits = not fleet.mixed and fleet.whole.count(asked.count, asked.least + asked.share) == len(fleet.open)
        if fits and asked.checkpoint.image_bytes <= fleet.least_arena_bytes - fleet.chunk_bytes:
            counts[Rejection.BUSY_DEVICE] = counts.get(Rejection.BUSY_DEVICE, 0) + left
            return
        for node in fleet.open if self._abilities.fetch else self._holders():
            if node in fleet.open and node not in self._looked:
                reason = self._too_small(fleet.open[node]) or Rejection.BUSY_DEVICE
                counts[reason] = counts.get(reason, 0) + 1

    def _holders(self) -> Iterator[str]:
        disk, dram = self._disk, self._dram
        yield from disk
        yield from (node for node in dram if node not in disk)
        yield from (node for node in self._device if node not in disk and node not in dram)

    # --- looking ---

    def run(self, *, full: bool) -> None:
        """Look at nodes, class by class; ``full``: at all of them."""
        open_nodes = self._fleet.open
        self._full = full
        if full:
            for name in open_nodes:
                if self._abilities.fetch or self._holds(name):
                    self._look(open_nodes[name], bounded=False)
            return
        if not self._options.locality:
            members: Mapping[str, object] = open_nodes if self._abilities.fetch else dict.fromkeys(self._holders())
            self._walk(members)
            return
        self._walk(self._device)
        self._walk(self._dram)
        self._walk(self._disk)
        if self._abilities.fetch:
            self._walk(open_nodes)

    def _walk(self, members: Mapping[str, object]) -> None:
        """Look at the nodes of a class: those with room, then those where some leave, then those where the busy would."""
        open_nodes, looked = self._fleet.open, self._looked
        seen = enough = missed = 0
        for name in self._by_room(members):
            if name in looked or name not in open_nodes:
                continue
            if seen >= self._settings.plan_nodes:
                return
            seen += 1
            if self._slower(open_nodes[name]):
                continue
            found = self._look(open_nodes[name], bounded=True)
            if not isinstance(found, Option):
                missed += 1
                if missed >= _MISSED and not self._asked.aged:
                    return
            elif found.startup.queue_s <= 0.0:
                enough += 1
                others_s = found.room_s + found.delay_s
                if enough >= _ENOUGH or (found.exits and others_s <= _CHEAP * found.startup.total_s):
                    return

    def _by_room(self, members: Mapping[str, object]) -> Iterator[str]:
        view, asked, fleet = self._view, self._asked, self._fleet
        count = asked.count
        need = asked.least if fleet.mixed else asked.least + asked.share
        few = 4 * self._settings.plan_nodes
        if len(members) <= few:
            free, loose = view.free, view.loose
            rooms: list[tuple[bool, int, str]] = []
            for name in members:
                if name in self._looked or (self._best is not None and name in fleet.open and self._slower(fleet.open[name])):
                    continue
                room = free.room(name, count)
                if room is None:
                    if name in fleet.open:
                        rooms.append((True, 0, name))
                    continue
                if room >= need:
                    rooms.append((False, -room, name))
                else:
                    rooms.append((True, -(loose.room(name, count) or 0), name))
            rooms.sort()
            for _, _, name in rooms:
                yield name
            return
        for _, name in view.free.nodes(count, need):
            if name in members:
                yield name
        for _, name in view.loose.nodes(count, -(1 << 62)):
            if name in members:
                yield name

    def _look(self, node: Node, *, bounded: bool) -> Option | Rejection:
        found = self._on(node, bounded=bounded)
        self._looked[node.id] = found
        if isinstance(found, Option) and (self._best is None or found.key < self._best.key):
            self._best = found
        return found

    # --- one node ---

    def _too_small(self, node: Node) -> Rejection | None:
        asked, inventory = self._asked, node.inventory
        assert inventory is not None
        whole = self._fleet.whole.room(node.id, asked.count)
        if whole is None:
            return Rejection.FEW_DEVICES
        if whole - (0 if inventory.devices[0].kind == "cpu" else asked.share) < asked.least:
            return Rejection.SMALL_DEVICE
        if node.id not in self._device and self._arena_bytes(node) > inventory.arena.budget_bytes:
            return Rejection.SMALL_ARENA
        return None

    def _arena_bytes(self, node: Node) -> int:
        return self._view.arena_bytes_of(node.id, self._asked.digest)

    def _slower(self, node: Node) -> bool:
        """True if no start on a node whose devices lack the weights could be better than the best so far."""
        if self._best is None or not self._options.locality or node.id in self._device:
            return False
        asked, estimates = self._asked, self._estimates
        if node.id not in self._dram:
            channel = Channel.DISK if node.id in self._disk else Channel.NETWORK
            return asked.checkpoint.image_bytes > self._best.key[0] * estimates.bandwidth_bps(node, channel)
        if node.inventory is None or node.inventory.devices[0].kind == "cpu":
            return False
        return asked.share > self._best.key[0] * estimates.bandwidth_bps(node, Channel.DEVICE)

    def _on(self, node: Node, *, bounded: bool) -> Option | Rejection:
        """The best place on a node, or why there is none."""
        asked = self._asked
        small = self._too_small(node)
        if small is not None:
            return small
        here = ground(self._view, node, asked, sharing=self._options.sharing)
        found: Option | Rejection = Rejection.BUSY_DEVICE
        if len(here.own) >= asked.count:
            found = self._try(here, here.own, Tier.DEVICE, "", bounded=bounded)
        source, peer = self._source(node)
        if source is None or len(here.own) == len(here.rooms):
            return found
        if self._arena_bytes(node) > here.inventory.arena.budget_bytes:
            return found if isinstance(found, Option) else Rejection.SMALL_ARENA
        other = self._try(here, list(here.rooms), source, peer, bounded=bounded)
        if not isinstance(other, Option):
            return found if isinstance(found, Option) or found is Rejection.SLOWER else other
        return other if not isinstance(found, Option) or other.key < found.key else found

    def _source(self, node: Node) -> tuple[Tier | None, str]:
        if node.id in self._dram:
            return Tier.DRAM, ""
        if node.id in self._disk:
            return Tier.DISK, ""
        if self._abilities.fetch:
            peer = next((peer for peer in self._peers if peer != node.id), "")
            return Tier.REMOTE, peer
        return None, ""

    def _find_peers(self) -> list[str]:
        """Nodes to fetch from, the best two: those that have it in DRAM before those that have it on disk."""
        found: list[str] = []
        for members in (self._dram, self._disk):
            for name in members:
                if name in self._fleet.open and name not in found:
                    found.append(name)
                    if len(found) == 2:
                        return found
        return found

    def _try(self, here: Ground, allowed: list[int], source: Tier, peer: str, *, bounded: bool) -> Option | Rejection:
        """The best place on these devices, its weights coming from there."""
        asked, node = self._asked, here.node
        count = asked.count
        rooms = here.rooms
        order = sorted(allowed, key=lambda index: (-rooms[index], index))
        devices = order[:count]
        deficit = 0 if source is Tier.DEVICE else arena_deficit_bytes(self._view, node, asked.digest)
        free = rooms[devices[-1]] >= asked.least and not any(here.lodgers.get(index) for index in devices)
        if not free and here.lodgers:
            unlodged = [index for index in order if not here.lodgers.get(index)][:count]
            if len(unlodged) == count and rooms[unlodged[-1]] >= asked.least:
                devices, free = unlodged, True
        startup = self._startup(here, devices, source, peer, asked.now)
        if bounded and self._best is not None and self._options.locality:
            floor_s = startup.total_s - startup.queue_s
            if floor_s > self._best.key[0] or (floor_s == self._best.key[0] and not free and not self._best.exits):
                return Rejection.SLOWER
        if free and not deficit:
            if startup.queue_s > 0.0 and self._options.locality:
                devices, startup = self._least_queued(here, order, devices, source, peer, startup)
            return self._option(here, sorted(devices), source, peer, startup, [])
        taken: list[Exit] = []
        moves: tuple[Move, ...] = ()
        everything = bool(deficit or here.lodgers)
        loose = here.wholes if everything else self._loose(here, allowed)
        exits = self._exits(here, loose, busy=everything) if loose else []
        if not free:
            chosen = choose(rooms, allowed, here.lodgers, exits, count, asked.least)
            floor_s = startup.total_s - startup.queue_s if self._options.locality else 0.0
            if chosen is None or (chosen[0] > _CHEAP * floor_s and not deficit):
                limit_s = self._best.key[0] - floor_s if bounded and self._best is not None else float("inf")
                found = self._with_busy(here, allowed, chosen, limit_s, deficit)
                if found is None:
                    return Rejection.BUSY_DEVICE if limit_s == float("inf") else Rejection.SLOWER
                devices, taken, moves = found
            else:
                devices, taken = chosen[1], chosen[2]
        for_arena: list[Exit] = []
        if deficit:
            more = self._clear_arena(here, exits, taken, deficit)
            if more is None:
                return Rejection.BUSY_ARENA
            for_arena = more
            taken = taken + [one for one in more if one not in taken]
        if len(taken) > 1 and not here.lodgers and not moves:
            taken = spared(rooms, devices, asked.least, taken, for_arena)
        return self._option(here, sorted(devices), source, peer, None, taken, moves)

    def _exits(
        self, here: Ground, devices: Container[int], *, busy: bool, moving: Callable[[Instance], Exit | None] | None = None
    ) -> list[Exit]:
        return exits_on(
            self._view, here.node, self._asked, self._prices, self._journals, self._settings,
            devices=devices, busy=busy, moving=moving,
        )  # fmt: skip

    def _loose(self, here: Ground, allowed: list[int]) -> list[int]:
        """The devices that would have room without idle weights, and without those who rest or leave already."""
        view, node, least = self._view, here.node.id, self._asked.least
        found: list[int] = []
        for index in allowed:
            key = (node, index)
            room = here.wholes[index] - view.committed_bytes.get(key, 0)
            if room + view.resting_bytes.get(key, 0) + view.leaving_bytes.get(key, 0) >= least:
                found.append(index)
        return found

    def _with_busy(
        self, here: Ground, allowed: list[int], chosen: _Chosen | None, limit_s: float, deficit: int
    ) -> tuple[list[int], list[Exit], tuple[Move, ...]] | None:
        """The best devices and who leaves them for less than ``limit_s``, the busy counted in, and where those of them go that
        migrate; ``chosen`` is the best without the busy."""
        asked = self._asked
        best: tuple[list[int], list[Exit], tuple[Move, ...]] | None = None
        if chosen is not None and chosen[0] <= limit_s:
            limit_s, best = chosen[0], (chosen[1], chosen[2], ())
        if not self._busy_under(here.node, limit_s):
            return best
        moving = None
        if self._abilities.migrate and not deficit and (self._full or self._solved < _SOLVED):
            self._solved += 1
            moving = partial(self._find_movers().exit_of, limit_s=limit_s)
        exits = self._exits(here, here.wholes, busy=True, moving=moving)
        found = choose(here.rooms, allowed, here.lodgers, exits, asked.count, asked.least)
        if found is None:
            return best
        if not any(one.victim for one in exits):
            return (found[1], found[2], ()) if found[0] < limit_s or best is None else best
        return self._solve(here, allowed, found[1], exits, limit_s) or best

    def _busy_under(self, node: Node, limit_s: float) -> bool:
        """True if a busy instance of a node might leave for less than ``limit_s``."""
        asked, base_s, age_s = self._asked, self._prices.least_s, self._settings.age_s
        for instance in self._view.instances_on(node.id).values():
            if instance.running and instance.served and instance.state is InstanceState.READY and not instance.moving:
                if self._abilities.migrate and self._find_movers().least_s(instance) < limit_s:
                    return True
                if asked.aged or (instance.ready_at is not None and asked.now - instance.ready_at >= age_s):
                    known_s = self._journals.remaining_s(instance.id)
                    least_s = base_s / len(self._view.instances_of(instance.model)) + min(
                        known_s, self._settings.drain_longest_s
                    )
                    if (known_s > 0.0 or asked.aged) and least_s < limit_s:
                        return True
        return False

    def _find_movers(self) -> Movers:
        if self._movers is None:
            self._movers = Movers(
                self._view, self._estimates, self._journals, self._settings, self._abilities, self._fleet, self._asked,
                self._prices, sharing=self._options.sharing,
            )  # fmt: skip
        return self._movers

    def _solve(
        self, here: Ground, allowed: list[int], first: list[int], exits: list[Exit], limit_s: float
    ) -> tuple[list[int], list[Exit], tuple[Move, ...]] | None:
        """The best devices, who leaves them, and where the busy go: all sets of devices where those are few, or else the
        cheapest single ones, or the set that is cheapest before targets are assigned."""
        asked = self._asked
        if asked.count == 1:
            priced = [(choose(here.rooms, [index], here.lodgers, exits, 1, asked.least), index) for index in allowed]
            singles = sorted((found[0], index) for found, index in priced if found is not None)
            sets = [[index] for _, index in singles[:_DEVICE_SETS]]
        elif comb(len(allowed), asked.count) <= _DEVICE_SETS:
            sets = [list(devices) for devices in combinations(allowed, asked.count)]
        else:
            sets = [first]
        best: tuple[list[int], list[Exit], tuple[Move, ...]] | None = None
        for devices in sets:
            found = self._find_movers().solve(here, devices, exits, asked.least, limit_s)
            if found is not None:
                best = (devices, found[0], found[1])
                limit_s = max((one.room_s for one in found[0]), default=0.0) + sum(one.delay_s for one in found[0])
        return best

    def _least_queued(
        self, here: Ground, order: list[int], devices: list[int], source: Tier, peer: str, startup: Startup
    ) -> tuple[list[int], Startup]:
        """Of the devices with room, those with less room but a shorter queue."""
        count = self._asked.count
        fit = [index for index in order if here.rooms[index] >= self._asked.least and not here.lodgers.get(index)]
        for at in range(1, len(fit) - count + 1):
            other = fit[at : at + count]
            found = self._startup(here, other, source, peer, self._asked.now)
            if found.total_s < startup.total_s:
                devices, startup = other, found
        return devices, startup

    def _clear_arena(self, here: Ground, exits: list[Exit], taken: list[Exit], deficit: int) -> list[Exit] | None:
        """Who leaves so that the arena has room for ``deficit`` bytes more: a checkpoint's bytes are free when all who use it
        have left."""
        view, node = self._view, here.node.id
        by_id = {name: one for one in exits for name in one.ids}
        users: dict[str, list[Instance]] = {}
        for instance in view.instances_on(node).values():
            if instance.state in HOLDING:
                users.setdefault(instance.digest, []).append(instance)
        items: list[tuple[int, float, float, Exit]] = []
        groups: dict[int, list[Exit]] = {}
        freed: list[Exit] = []
        for digest, group in users.items():
            if digest == self._asked.digest or any(one.id not in by_id for one in group):
                continue
            leaving = list(dict.fromkeys(by_id[one.id] for one in group))
            size = view.arena_bytes_of(node, digest)
            extra = [one for one in leaving if one not in taken]
            if not extra:
                deficit -= size
                freed += leaving
                continue
            joined = Exit({}, sum(one.delay_s for one in extra), max(one.room_s for one in extra))
            groups[id(joined)] = leaving
            items.append((size, joined.delay_s, joined.room_s, joined))
        if deficit <= 0:
            return freed
        since_s = max((one.room_s for one in taken), default=0.0)
        found = cover(deficit, items, since_s)
        if found is None:
            return None
        return freed + [one for joined in found[1] for one in groups[id(joined)]]

    def _startup(self, here: Ground, devices: list[int], source: Tier, peer: str, at: float) -> Startup:
        own = here.own
        if source is not Tier.DEVICE and own and all(index in own for index in devices):
            source, peer = Tier.DEVICE, ""
        return self._estimates.startup(here.node, self._asked.checkpoint, devices, source, peer, at)

    def _option(
        self,
        here: Ground,
        devices: list[int],
        source: Tier,
        peer: str,
        startup: Startup | None,
        exits: list[Exit],
        moves: tuple[Move, ...] = (),
    ) -> Option:
        asked = self._asked
        room_s = delay_s = 0.0
        frees: dict[int, int] = {}
        for one in exits:
            room_s = max(room_s, one.room_s)
            delay_s += one.delay_s
            for index, size in one.frees.items():
                frees[index] = frees.get(index, 0) + size
        if source is not Tier.DEVICE and here.own and all(index in here.own for index in devices):
            source, peer = Tier.DEVICE, ""
        if startup is None:
            startup = self._startup(here, devices, source, peer, asked.now + room_s)
        if exits:
            saved = self._keep_weights(here, devices, exits, frees)
            delay_s -= saved
        free = min(here.rooms[index] + frees.get(index, 0) for index in devices)
        cost_s = room_s + delay_s + (startup.total_s if self._options.locality else 0.0)
        return Option(
            key=(cost_s, bool(exits), -free, here.node.id),
            node=here.node,
            devices=tuple(devices),
            source=source,
            peer=peer,
            startup=startup,
            room_s=room_s,
            delay_s=delay_s,
            free=free,
            exits=exits,
            ground=here,
            moves=moves,
        )

    def _keep_weights(self, here: Ground, devices: list[int], exits: list[Exit], frees: dict[int, int]) -> float:
        """Weights of those who leave stay where there is room enough, the costliest first; returns the delay saved."""
        saved = 0.0
        for at, one in sorted(enumerate(exits), key=lambda item: -item[1].weights_s):
            if not one.weights or not one.ids:
                continue
            left = [here.rooms[index] + frees.get(index, 0) - one.weights.get(index, 0) for index in devices]
            if min(left) < self._asked.least:
                continue
            kept = Exit({index: size - one.weights.get(index, 0) for index, size in one.frees.items()})
            kept.delay_s, kept.room_s = one.delay_s - one.weights_s, one.room_s
            kept.ids, kept.stops, kept.drains = one.ids, one.stops, one.drains
            exits[at] = kept
            saved += one.weights_s
            for index, size in one.weights.items():
                frees[index] -= size
        return saved

    # --- telling ---

    def candidate(self, option: Option, *, roomy: bool = False) -> Candidate:
        """``roomy``: weights that cost next to nothing to drop go too, until the KV cache gets what it wants."""
        asked = self._asked
        exits = option.exits
        free, delay_s = option.free, option.delay_s
        if roomy and self._options.sharing and free // 2 < asked.wanted and not option.ground.cpu:
            exits, free, delay_s = self._widened(option)
        need = KvNeed(asked.least, asked.wanted)
        kv_bytes = kv_given_bytes(need, free) if self._options.sharing else max(asked.least, min(asked.wanted, free))
        return Candidate(
            node=option.node.id,
            name=option.node.name,
            devices=option.devices,
            kv_bytes=kv_bytes,
            source=option.source,
            peer=option.peer,
            queue_s=option.startup.queue_s,
            load_s=option.startup.load_s,
            room_s=option.room_s,
            startup_s=option.room_s + option.startup.total_s,
            delay_s=delay_s,
            free_bytes=free,
            drops=tuple(dict.fromkeys(digest for one in exits for digest in one.drops)),
            stops=tuple(name for one in exits for name in one.stops),
            drains=tuple(name for one in exits for name in one.drains),
            moves=option.moves,
        )

    def _widened(self, option: Option) -> tuple[list[Exit], int, float]:
        asked, view, node = self._asked, self._view, option.node
        gone = {digest for one in option.exits for digest in one.drops}
        exits, delay_s = list(option.exits), option.delay_s
        rooms = {index: option.ground.rooms[index] + sum(one.frees.get(index, 0) for one in exits) for index in option.devices}
        limit_s = _CHEAP * option.startup.total_s
        lying = {digest for index in option.devices for digest in view.idle_weights.get((node.id, index), ())}
        items = sorted(
            (self._prices.weights_s(node, digest, view.checkpoints[digest].image_bytes), digest)
            for digest in lying - gone - {asked.digest}
            if digest in view.checkpoints and not view.holds_arena(node.id, digest)
        )
        for weights_s, digest in items:
            if min(rooms.values()) // 2 >= asked.wanted or weights_s > limit_s:
                break
            frees = {
                device.index: view.idle_weights.get((node.id, device.index), {}).get(digest, 0)
                for device in option.ground.inventory.devices
            }
            one = Exit(frees, weights_s)
            one.drops = (digest,)
            exits.append(one)
            delay_s += weights_s
            for index in rooms:
                rooms[index] += frees[index]
        return exits, min(rooms.values()), delay_s
