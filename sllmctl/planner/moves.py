"""Which busy instances migrate for a newcomer, and to where: dynamic programming over those who may leave and their targets.

A victim is busy, has served, and has sequences in the journals. It goes to a ready instance of its model or to a new one (see
`targets`), never to the devices that the newcomer gets. Capacity is consumed as it is assigned: a partial choice carries the
sequences that ready instances are to take, and what is started on each node, placed together (see `packing`). On the
newcomer's node a new instance uses what is free now and idle weights that lie on none of the newcomer's devices, and starts
from no weights on its devices, since those go with who leaves.

A choice costs ``room_s + delay_s``: until the last of those who leave has left, a victim with its last token, and what others
pay: for weights that are dropped, here and at the targets, and a pause for each sequence that migrates (see `rounds`). After
each item the partial choices that are no better than another with the same claims are dropped, and so many are kept, the
cheapest: `_BEAMS`, the next number when one that was left out for that cost less than what was found.

The bound: while the last number is enough, and `packing` looks at all sets of devices and idle weights, no choice of these
items and targets costs less than the answer. Beyond that none costs less than the cheapest partial one that was left out, and
the answer, if there is one, costs less than the newcomer's place does without migration. With one victim of its model
among the items and devices of one kind, a new instance is considered only if no ready one can take it: it is never sooner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from schema.states import Tier
from sllmctl.cluster.plans import Move
from sllmctl.cluster.records import Instance, Node
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.assignment import Lot, Partial, Victim, keep, kind_of, told
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Abilities, Journals
from sllmctl.planner.packing import Packer, Start, Tenant
from sllmctl.planner.prices import Prices
from sllmctl.planner.rooms import Ask, Fleet, Ground
from sllmctl.planner.rounds import rounds_s
from sllmctl.planner.targets import Ready, Targets
from sllmctl.planner.victims import Exit

__all__ = ["Movers"]

_BEAMS = (32, 512)
"""So many partial choices are kept after each item."""
_NEVER_S = float("inf")


@dataclass(slots=True)
class _Task:
    """Devices of a node that are to have ``deficits`` bytes more each, for less than ``limit_s``."""

    here: Ground
    devices: tuple[int, ...]
    deficits: tuple[int, ...]
    must: set[str]
    items: list[Exit]
    loads: bool
    crowded: set[str]


class Movers:
    """The victims of one plan; each is looked at once, whatever node it is to leave for."""

    def __init__(
        self,
        view: ClusterView,
        estimates: Estimates,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        fleet: Fleet,
        asked: Ask,
        prices: Prices,
        *,
        sharing: bool,
    ) -> None:
        self._view = view
        self._estimates = estimates
        self._journals = journals
        self._fleet = fleet
        self._packer = Packer(view, estimates, prices, asked, now=asked.now, sharing=sharing)
        self._targets = Targets(view, journals, settings, abilities, fleet, self._packer, now=asked.now)
        self._victims: dict[str, Victim | None] = {}
        self._kinds: set[str] | None = None

    # --- victims ---

    def exit_of(self, instance: Instance, limit_s: float) -> Exit | None:
        """A busy instance as one that may leave by migrating, at the price of its soonest target; None if it may not, or not
        for less than ``limit_s``."""
        if self.least_s(instance) >= limit_s:
            return None
        victim = self._victims[instance.id]
        assert victim is not None
        soonest = next(self._soonest(victim, limit_s), None)
        if soonest is None:
            return None
        soonest_s, target = soonest
        pause_s = self._times(victim, target.node)[1]
        found = Exit(dict.fromkeys(instance.devices, instance.working_bytes), len(victim.sequences) * pause_s, soonest_s)
        found.ids = (instance.id,)
        found.victim = instance.id
        return found

    def least_s(self, instance: Instance) -> float:
        """No move of a busy instance takes less; infinite if it may not move."""
        if instance.id not in self._victims:
            self._victims[instance.id] = self._victim(instance)
        victim = self._victims[instance.id]
        return _NEVER_S if victim is None else victim.least_s

    def _victim(self, instance: Instance) -> Victim | None:
        model = self._view.models.get(instance.model)
        if model is None or not instance.served or instance.moving:
            return None
        sequences = self._journals.tokens(instance.id)
        if not sequences:
            return None
        found = Victim(instance, model, sequences, sum(sequences))
        found.least_s = min(self._times_on(found, kind)[0] for kind in self._kinds_beside(instance.node))
        return found

    def _kinds_beside(self, node: str) -> set[str]:
        """The kinds of device that there are; only in a mixed cluster they differ from a node's own."""
        if not self._fleet.mixed:
            return {kind_of(self._view.nodes[node])}
        if self._kinds is None:
            self._kinds = {kind_of(one) for one in self._fleet.open.values()}
        return self._kinds

    def _times(self, victim: Victim, node: Node) -> tuple[float, float]:
        """(until the last token has moved, the pause of each sequence), the target being there."""
        return self._times_on(victim, kind_of(node))

    def _times_on(self, victim: Victim, kind: str) -> tuple[float, float]:
        found = victim.times.get(kind)
        if found is None:
            found = victim.times[kind] = rounds_s(self._estimates, victim.instance.digest, kind, victim.sequences)
        return found

    def _ready(self, victim: Victim) -> list[tuple[float, Ready | Start]]:
        if victim.ready is None:
            there = self._targets.ready(victim.instance, victim.model, len(victim.sequences), victim.tokens)
            victim.ready = [(self._times(victim, one.node)[0], one) for one in there]
            victim.ready.sort(key=lambda item: item[0])
        return victim.ready

    def _starts(self, victim: Victim) -> list[tuple[float, Ready | Start]]:
        if victim.starts is None:
            victim.starts = []
            # A victim's tokens go on with the very weights that they come from.
            if victim.model.digest == victim.instance.digest:
                there = self._targets.starts(victim.model)
                victim.starts = [(soonest_s + self._times(victim, one.node)[0], one) for soonest_s, one in there]
                victim.starts.sort(key=lambda item: item[0])
        return victim.starts

    def _soonest(self, victim: Victim, limit_s: float) -> Iterator[tuple[float, Ready | Start]]:
        """Its ready targets or, if there are none, its starts with room, while they are sooner than ``limit_s``."""
        ready = self._ready(victim)
        for soonest_s, target in ready or self._starts(victim):
            if soonest_s >= limit_s:
                return
            if isinstance(target, Ready) or self._packer.has_room(self._tenant(victim, target)):
                yield soonest_s, target

    @staticmethod
    def _tenant(victim: Victim, start: Start) -> Tenant:
        token_bytes = -(-start.ask.checkpoint.kv_token_bytes // start.ask.count)
        return Tenant(start, max(start.ask.least, start.ask.step + victim.tokens * token_bytes))

    # --- assignment ---

    def solve(
        self, here: Ground, devices: Sequence[int], exits: Sequence[Exit], least: int, limit_s: float
    ) -> tuple[list[Exit], tuple[Move, ...]] | None:
        """Who leaves these devices, and where the busy of them go, for less than ``limit_s`` in all; None if that cannot be."""
        deficits = tuple(max(0, least - here.rooms[index]) for index in devices)
        must = {name for index in devices for name in here.lodgers.get(index, ())}
        items = [one for one in exits if any(one.frees.get(index, 0) > 0 for index in devices)]
        if must - {name for one in items for name in one.ids}:
            return None
        if not must and not any(deficits):
            return [], ()
        items.sort(key=lambda one: (one.delay_s + one.room_s, one.ids, one.drops))
        loads = not here.own or any(index not in here.own for index in devices)
        task = _Task(here, tuple(devices), deficits, must, items, loads, self._crowded(items))
        best: Partial | None = None
        for beam in _BEAMS:
            found, dropped_s = self._search(task, limit_s, beam)
            if found is not None:
                best, limit_s = found, found.cost_s()
            if dropped_s >= limit_s:
                break
        return None if best is None else told(best)

    def _crowded(self, items: Sequence[Exit]) -> set[str]:
        """Models of which several are victims, or all where devices are of several kinds: a ready target may not be best."""
        models = [self._view.instances[one.victim].model for one in items if one.victim]
        return {name for name in models if self._fleet.mixed or models.count(name) > 1}

    def _search(self, task: _Task, limit_s: float, beam: int) -> tuple[Partial | None, float]:
        """The best choice for less than ``limit_s`` with so many partial ones kept, and the least cost of those not kept."""
        items, deficits, must = task.items, task.deficits, task.must
        rest = [(0,) * len(deficits)]
        for one in reversed(items):
            rest.append(tuple(after + one.frees.get(index, 0) for after, index in zip(rest[-1], task.devices, strict=True)))
        rest.reverse()
        best: Partial | None = None
        dropped_s = _NEVER_S
        states = [Partial((0,) * len(deficits), 0.0, 0.0, (), (), {}, {})]
        for at, one in enumerate(items):
            after: dict[object, list[Partial]] = {}
            forced = any(name in must for name in one.ids)
            for state in states:
                grown = self._extended(task, state, one, limit_s)
                if not forced:
                    grown.append(state)
                for new in grown:
                    if any(freed + left < need for freed, left, need in zip(new.freed, rest[at + 1], deficits, strict=True)):
                        continue
                    cost_s = new.cost_s()
                    if cost_s >= limit_s:
                        continue
                    if new.freed == deficits and not (must and must - {name for taken in new.exits for name in taken.ids}):
                        best, limit_s = new, cost_s
                        continue
                    keep(after.setdefault(new.key(), []), new)
            states = [state for group in after.values() for state in group]
            if len(states) > beam:
                states.sort(key=Partial.cost_s)
                dropped_s = min(dropped_s, states[beam].cost_s())
                del states[beam:]
            if not states:
                break
        return best, dropped_s

    def _extended(self, task: _Task, state: Partial, one: Exit, limit_s: float) -> list[Partial]:
        """A partial choice with one more that leaves; a victim in each way that it can go."""
        freed = tuple(
            min(need, before + one.frees.get(index, 0))
            for before, index, need in zip(state.freed, task.devices, task.deficits, strict=True)
        )
        exits = (*state.exits, one)
        if not one.victim:
            room_s = max(state.room_s, one.room_s)
            return [Partial(freed, state.delay_s + one.delay_s, room_s, exits, state.hosts, state.taken, state.lots)]
        victim = self._victims[one.victim]
        assert victim is not None
        found: list[Partial] = []
        for soonest_s, target in self._ready(victim):
            if state.delay_s + max(state.room_s, soonest_s) >= limit_s:
                break
            if isinstance(target, Ready):
                self._host(task, state, victim, target, freed, exits, found)
        if not found or victim.model.name in task.crowded:
            for soonest_s, target in self._starts(victim):
                if state.delay_s + max(state.room_s, soonest_s) >= limit_s:
                    break
                if isinstance(target, Start):
                    self._start(task, state, victim, target, freed, exits, found)
        return found

    def _host(
        self,
        task: _Task,
        state: Partial,
        victim: Victim,
        target: Ready,
        freed: tuple[int, ...],
        exits: tuple[Exit, ...],
        found: list[Partial],
    ) -> None:
        """A victim on a ready instance, if that has room for it beside those that go there already."""
        host = target.instance
        if host.node == task.here.node.id and any(index in task.devices for index in host.devices):
            return
        slots, tokens = state.taken.get(host.id, (0, 0))
        slots, tokens = slots + len(victim.sequences), tokens + victim.tokens
        if slots > target.slots or tokens > target.room_tokens:
            return
        migrate_s, pause_s = self._times(victim, target.node)
        hosts = (*state.hosts, (victim, target))
        taken = {**state.taken, host.id: (slots, tokens)}
        delay_s = state.delay_s + len(victim.sequences) * pause_s
        found.append(Partial(freed, delay_s, max(state.room_s, migrate_s), exits, hosts, taken, state.lots))

    def _start(
        self,
        task: _Task,
        state: Partial,
        victim: Victim,
        target: Start,
        freed: tuple[int, ...],
        exits: tuple[Exit, ...],
        found: list[Partial],
    ) -> None:
        """A victim on a new instance, together with the others that are started on that node."""
        node = target.node
        within = node.id == task.here.node.id
        if within and target.source is Tier.DEVICE:
            return
        tenant = self._tenant(victim, target)
        before = state.lots.get(node.id)
        victims = (*before.victims, victim) if before is not None else (victim,)
        tenants = (*before.tenants, tenant) if before is not None else (tenant,)
        packing = self._packer.pack(tenants, beside=task.devices if within else (), loads=within and task.loads)
        if packing is None:
            return
        room_s = max(ready_s + self._times(one, node)[0] for one, ready_s in zip(victims, packing.ready_s, strict=True))
        delay_s = state.delay_s + len(victim.sequences) * self._times(victim, node)[1]
        lots = {**state.lots, node.id: Lot(victims, tenants, packing, room_s)}
        found.append(Partial(freed, delay_s, state.room_s, exits, state.hosts, state.taken, lots))
