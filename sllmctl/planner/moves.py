"""Where busy instances could go, and which of them do, to where: dynamic programming over victims and their targets.

A victim is busy, has served, and has sequences in the journals. Its targets are a ready instance of its model elsewhere with
room for its sequences, or a new instance on a node with room, made by dropping idle weights there if need be. Capacity is
consumed as it is assigned: a partial choice carries what its moves claim of devices, of DRAM budgets and of instances.

A move takes ``ready_s`` until the target is there, and ``migrate_s`` to recompute its tokens there in rounds while the source
goes on. Computing a token anew costs about a tenth of generating one (ServerlessLLM, OSDI 2024, section 5), so each round
leaves a tenth of the gap before it. With T the estimate of a sequence and t its tokens, the rounds take
``T(t) + T(t/10) + ...`` for each sequence, until the gap of the longest is at most `_LAST_GAP_TOKENS`; recomputing that gap is
``pause_s``, and each of the sequences pays it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from schema.states import InstanceState, Tier
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import ClusterView, Instance, Model, Node
from sllmctl.planner.cover import choose
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.memory import KvNeed, kv_given_bytes
from sllmctl.planner.plans import Abilities, Journals, Move
from sllmctl.planner.prices import Prices
from sllmctl.planner.rooms import Ask, Fleet, Ground, ask, ground
from sllmctl.planner.victims import Exit

__all__ = ["Movers", "Target"]

_LAST_GAP_TOKENS = 16
_SHRINK = 10
_TARGETS = 4
"""So many instances, and so many nodes, are considered for one victim."""
_BEAM = 32
"""So many partial choices are kept after each victim; with no more of them the choice is the best there is."""


class Target:
    """Where a victim could go: ``instance``, or a new one on ``node``."""

    __slots__ = ("ask", "drops", "ground", "instance", "node", "peer", "room_tokens", "slots", "source")

    def __init__(self, node: Node, instance: Instance | None) -> None:
        self.node = node
        self.instance = instance
        self.slots = 0
        self.room_tokens = 0
        self.source = Tier.DRAM
        self.peer = ""
        self.ask: Ask | None = None
        self.ground: Ground | None = None
        self.drops: list[Exit] | None = None


@dataclass(slots=True)
class Victim:
    """A busy instance with its sequences, and where they could go: when the last token would have moved, and to where. New
    instances are looked for only if no ready one can take it. ``least_s``: no target is sooner."""

    instance: Instance
    model: Model
    count: int
    tokens: int
    longest: int
    targets: list[tuple[float, Target]] = field(default_factory=list)
    least_s: float = 0.0
    asked_ready: bool = False
    asked_starts: bool = False


@dataclass(slots=True, frozen=True)
class Claim:
    """What one move takes: bytes on each of ``devices`` and of the arena, slots and tokens of ``instance``."""

    node: str
    devices: tuple[int, ...]
    device_bytes: tuple[int, ...]
    digest: str
    arena_bytes: int
    load_s: float
    instance: str
    slots: int
    tokens: int
    drops: tuple[str, ...]


@dataclass(slots=True)
class _Partial:
    freed: tuple[int, ...]
    delay_s: float
    room_s: float
    exits: tuple[Exit, ...]
    moves: tuple[Move, ...]
    claims: tuple[Claim, ...]


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
        self._settings = settings
        self._abilities = abilities
        self._fleet = fleet
        self._asked = asked
        self._prices = prices
        self._sharing = sharing
        self._victims: dict[str, Victim | None] = {}
        self._starts: dict[str, list[Target]] = {}

    # --- victims and targets ---

    def exit_of(self, instance: Instance, limit_s: float) -> Exit | None:
        """A busy instance as one that may leave by migrating, at the price of its soonest target; None if it may not, or not
        for less than ``limit_s``."""
        if self.least_s(instance) >= limit_s:
            return None
        victim = self._victims[instance.id]
        if victim is None:
            return None
        if not victim.targets:
            self._find_targets(victim)
        if not victim.targets or victim.targets[0][0] >= limit_s:
            return None
        soonest_s, target = victim.targets[0]
        pause_s = self._times(victim, target.node)[1]
        found = Exit(dict.fromkeys(instance.devices, instance.kv_bytes), victim.count * pause_s, soonest_s)
        found.ids = (instance.id,)
        found.victim = instance.id
        return found

    def least_s(self, instance: Instance) -> float:
        """No move of a busy instance takes less; infinite if it may not move."""
        if instance.id not in self._victims:
            self._victims[instance.id] = self._victim(instance)
        victim = self._victims[instance.id]
        return float("inf") if victim is None else victim.least_s

    def _victim(self, instance: Instance) -> Victim | None:
        model = self._view.models.get(instance.model)
        if model is None or not instance.served:
            return None
        tokens = self._journals.tokens(instance.id)
        if not tokens:
            return None
        found = Victim(instance, model, len(tokens), sum(tokens), max(tokens))
        found.least_s = self._times(found, self._view.nodes[instance.node])[0]
        return found

    def _find_targets(self, victim: Victim) -> None:
        """Ready instances; and, if there are none, nodes for a new one, the soonest first."""
        if not victim.asked_ready:
            victim.asked_ready = True
            for target in self._ready_targets(victim.instance, victim.model):
                victim.targets.append((self._times(victim, target.node)[0], target))
            if victim.targets:
                return
        if not victim.asked_starts:
            victim.asked_starts = True
            count = victim.model.spec.devices
            starts: list[tuple[float, Target]] = []
            for target in self._start_targets(victim.model):
                assert target.ground is not None
                rooms = target.ground.rooms
                devices = sorted(rooms, key=lambda index: (-rooms[index], index))[:count]
                starts.append((self._ready_s(target, devices) + self._times(victim, target.node)[0], target))
            starts.sort(key=lambda item: (item[0], item[1].node.id))
            victim.targets += starts

    def _times(self, victim: Victim, node: Node) -> tuple[float, float]:
        """(until the last token has moved, how long each sequence stands still), the target being there."""
        assert node.inventory is not None
        kind, digest = node.inventory.devices[0].kind, victim.instance.digest
        base_s = self._estimates.migration_s(digest, kind, 0)
        tokens, gap, seconds = float(victim.tokens), float(victim.longest), 0.0
        while True:
            seconds += self._estimates.migration_s(digest, kind, round(tokens)) + (victim.count - 1) * base_s
            tokens, gap = tokens / _SHRINK, gap / _SHRINK
            if gap <= _LAST_GAP_TOKENS:
                break
        pause_s = self._estimates.migration_s(digest, kind, max(1, round(gap)))
        return seconds + pause_s, pause_s

    def _ready_targets(self, victim: Instance, model: Model) -> list[Target]:
        found: list[Target] = []
        checkpoint = self._view.checkpoints[victim.digest]
        for other in self._view.instances_of(model.name).values():
            node = self._fleet.open.get(other.node)
            if other is victim or other.state is not InstanceState.READY or other.digest != victim.digest or node is None:
                continue
            target = Target(node, other)
            target.slots = model.spec.scale.max_concurrency - other.running
            capacity = other.kv_capacity_tokens or other.kv_bytes * len(other.devices) // max(1, checkpoint.kv_token_bytes)
            target.room_tokens = capacity - sum(self._journals.tokens(other.id))
            if target.slots > 0 and target.room_tokens > 0:
                found.append(target)
        found.sort(key=lambda target: (-target.room_tokens, target.instance.id if target.instance is not None else ""))
        return found[:_TARGETS]

    def _start_targets(self, model: Model) -> list[Target]:
        """Nodes where a new instance of a victim's model would find room, idle weights there counted as such."""
        found = self._starts.get(model.name)
        if found is None:
            found = self._starts[model.name] = self._find_starts(model)
        return found

    def _find_starts(self, model: Model) -> list[Target]:
        view, fleet = self._view, self._fleet
        assert model.digest is not None
        checkpoint = view.checkpoints.get(model.digest)
        if checkpoint is None:
            return []
        wanted = ask(model, checkpoint, self._settings, self._asked.now)
        device, dram = view.nodes_with(model.digest, Tier.DEVICE), view.nodes_with(model.digest, Tier.DRAM)
        disk = view.nodes_with(model.digest, Tier.DISK)
        need = wanted.least if fleet.mixed else wanted.least + wanted.share
        found: list[Target] = []
        seen: set[str] = set()

        def consider(name: str) -> bool:
            node = fleet.open.get(name)
            if node is None or name in seen:
                return False
            seen.add(name)
            target = self._start_at(node, wanted, chain(dram, disk))
            if target is not None:
                found.append(target)
            return len(found) >= _TARGETS

        for faster in (device, dram):
            for looked, name in enumerate(faster):
                if looked == _TARGETS or consider(name):
                    break
        members: Mapping[str, object] = fleet.open if self._abilities.fetch else disk
        for index in (view.free, view.loose):
            looked = 0
            for _, name in index.nodes(wanted.count, need):
                if name not in members:
                    continue
                looked += 1
                if looked > _TARGETS or consider(name):
                    break
        return found

    def _start_at(self, node: Node, wanted: Ask, holders: Iterable[str]) -> Target | None:
        view = self._view
        assert node.inventory is not None
        if len(node.inventory.devices) < wanted.count:
            return None
        target = Target(node, None)
        target.ask = wanted
        target.ground = here = ground(view, node, wanted, sharing=self._sharing)
        if node.id in view.nodes_with(wanted.digest, Tier.DRAM):
            target.source = Tier.DRAM
        elif node.id in view.nodes_with(wanted.digest, Tier.DISK):
            target.source = Tier.DISK
        elif self._abilities.fetch:
            target.source = Tier.REMOTE
            target.peer = next((name for name in holders if name in self._fleet.open), "")
        elif len(here.own) < wanted.count:
            return None
        else:
            target.source = Tier.DEVICE
        unlodged = self._unlodged(here, ())
        if len(unlodged) < wanted.count:
            return None
        if sorted((here.rooms[index] for index in unlodged), reverse=True)[wanted.count - 1] >= wanted.least:
            return target
        loose = sorted((here.wholes[index] - view.committed_bytes.get((node.id, index), 0) for index in unlodged), reverse=True)
        if loose[wanted.count - 1] < wanted.least:
            return None
        found = choose(here.rooms, unlodged, {}, self._drops(target), wanted.count, wanted.least)
        return target if found is not None else None

    def _drops(self, target: Target) -> list[Exit]:
        """The idle weights that could go from a target's node, priced when they are first needed."""
        if target.drops is None:
            assert target.ground is not None
            assert target.ask is not None
            view, node = self._view, target.node
            lying: dict[str, dict[int, int]] = {}
            for index in target.ground.rooms:
                for digest, size in view.idle_weights.get((node.id, index), {}).items():
                    if digest not in (target.ask.digest, self._asked.digest) and not view.holds_arena(node.id, digest):
                        lying.setdefault(digest, {})[index] = size
            target.drops = []
            for digest, frees in lying.items():
                leaving = Exit(frees, self._prices.weights_s(node, digest, max(frees.values())))
                leaving.drops = (digest,)
                target.drops.append(leaving)
        return target.drops

    def _unlodged(self, here: Ground, claims: Sequence[Claim]) -> list[int]:
        if self._sharing:
            return list(here.rooms)
        taken = {index for claim in claims if claim.node == here.node.id for index in claim.devices}
        return [index for index in here.rooms if not here.lodgers.get(index) and index not in taken]

    def _ready_s(self, target: Target, devices: Sequence[int]) -> float:
        here, wanted = target.ground, target.ask
        assert here is not None
        assert wanted is not None
        source = Tier.DEVICE if here.own and all(index in here.own for index in devices) else target.source
        peer = target.peer if source is Tier.REMOTE else ""
        return self._estimates.startup(here.node, wanted.checkpoint, devices, source, peer, self._asked.now).total_s

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
        rest = [[0] * len(devices) for _ in range(len(items) + 1)]
        for at in range(len(items) - 1, -1, -1):
            rest[at] = [after + items[at].frees.get(index, 0) for after, index in zip(rest[at + 1], devices, strict=True)]
        best: _Partial | None = None
        best_s = limit_s
        states = [_Partial((0,) * len(devices), 0.0, 0.0, (), (), ())]
        for at, one in enumerate(items):
            forced = any(name in must for name in one.ids)
            after: dict[object, _Partial] = {}
            for state in states:
                grown = self._extended(here, devices, state, one, deficits, best_s)
                if not forced:
                    grown.append(state)
                for new in grown:
                    if new.room_s + new.delay_s >= best_s:
                        continue
                    if any(freed + left < need for freed, left, need in zip(new.freed, rest[at + 1], deficits, strict=True)):
                        continue
                    done = all(freed >= need for freed, need in zip(new.freed, deficits, strict=True))
                    if done and not (must - {name for taken in new.exits for name in taken.ids}):
                        best, best_s = new, new.room_s + new.delay_s
                        continue
                    key = (new.freed, new.claims)
                    known = after.get(key)
                    if known is None or new.room_s + new.delay_s < known.room_s + known.delay_s:
                        after[key] = new
            states = sorted(after.values(), key=lambda state: state.room_s + state.delay_s)[:_BEAM]
            if not states:
                break
        return None if best is None else (list(best.exits), best.moves)

    def _extended(
        self, here: Ground, devices: Sequence[int], state: _Partial, one: Exit, deficits: tuple[int, ...], limit_s: float
    ) -> list[_Partial]:
        """A partial choice with one more that leaves; a victim in each way that it can go."""
        freed = tuple(
            min(need, before + one.frees.get(index, 0))
            for before, index, need in zip(state.freed, devices, deficits, strict=True)
        )
        if not one.victim:
            room_s = max(state.room_s, one.room_s)
            return [_Partial(freed, state.delay_s + one.delay_s, room_s, (*state.exits, one), state.moves, state.claims)]
        victim = self._victims[one.victim]
        assert victim is not None
        found: list[_Partial] = []
        self._extend_with(here, devices, state, one, victim, 0, freed, limit_s, found)
        if not found and not victim.asked_starts:
            at = len(victim.targets)
            self._find_targets(victim)
            self._extend_with(here, devices, state, one, victim, at, freed, limit_s, found)
        return found

    def _extend_with(
        self,
        here: Ground,
        devices: Sequence[int],
        state: _Partial,
        one: Exit,
        victim: Victim,
        since: int,
        freed: tuple[int, ...],
        limit_s: float,
        found: list[_Partial],
    ) -> None:
        for soonest_s, target in victim.targets[since:]:
            if max(state.room_s, soonest_s) + state.delay_s >= limit_s:
                break
            assigned = self._assign(here, devices, state.claims, victim, target)
            if assigned is None:
                continue
            move, claim, drop_s = assigned
            gone = Exit(one.frees, victim.count * move.pause_s + drop_s, move.ready_s + move.migrate_s)
            gone.ids, gone.drops, gone.weights = one.ids, one.drops, one.weights
            found.append(
                _Partial(
                    freed,
                    state.delay_s + gone.delay_s,
                    max(state.room_s, gone.room_s),
                    (*state.exits, gone),
                    (*state.moves, move),
                    (*state.claims, claim),
                )
            )

    def _assign(
        self, here: Ground, devices: Sequence[int], claims: tuple[Claim, ...], victim: Victim, target: Target
    ) -> tuple[Move, Claim, float] | None:
        """A victim's move to a target beside those that are assigned already, and what the idle weights dropped for it cost."""
        node = target.node
        migrate_s, pause_s = self._times(victim, node)
        instance = target.instance
        if instance is not None:
            if node.id == here.node.id and any(index in devices for index in instance.devices):
                return None
            same = [claim for claim in claims if claim.instance == instance.id]
            if target.slots - sum(claim.slots for claim in same) < victim.count:
                return None
            if target.room_tokens - sum(claim.tokens for claim in same) < victim.tokens:
                return None
            move = Move(
                instance=victim.instance.id,
                node=node.id,
                devices=instance.devices,
                kv_bytes=instance.kv_bytes,
                target=instance.id,
                ready_s=0.0,
                migrate_s=migrate_s,
                pause_s=pause_s,
            )
            claim = Claim(node.id, (), (), victim.instance.digest, 0, 0.0, instance.id, victim.count, victim.tokens, ())
            return move, claim, 0.0
        return self._assign_start(here, devices, claims, victim, target, migrate_s, pause_s)

    def _assign_start(
        self,
        here: Ground,
        devices: Sequence[int],
        claims: tuple[Claim, ...],
        victim: Victim,
        target: Target,
        migrate_s: float,
        pause_s: float,
    ) -> tuple[Move, Claim, float] | None:
        node, wanted, there = target.node, target.ask, target.ground
        assert wanted is not None
        assert there is not None
        beside = [claim for claim in claims if claim.node == node.id]
        rooms = dict(there.rooms)
        dropped = {digest for claim in beside for digest in claim.drops}
        for claim in beside:
            for index, size in zip(claim.devices, claim.device_bytes, strict=True):
                rooms[index] -= size
        if dropped:
            for leaving in self._drops(target):
                if leaving.drops[0] in dropped:
                    for index, size in leaving.frees.items():
                        rooms[index] += size
        allowed = [index for index in self._unlodged(there, beside) if node.id != here.node.id or index not in devices]
        if len(allowed) < wanted.count:
            return None
        token_bytes = -(-wanted.checkpoint.kv_token_bytes // wanted.count)
        least = max(wanted.least, victim.tokens * token_bytes)
        chosen = choose(rooms, allowed, {}, (), wanted.count, least)
        if chosen is None:
            drops = [leaving for leaving in self._drops(target) if leaving.drops[0] not in dropped]
            chosen = choose(rooms, allowed, {}, drops, wanted.count, least)
        if chosen is None:
            return None
        _, places, taken = chosen
        free = min(rooms[index] + sum(one.frees.get(index, 0) for one in taken) for index in places)
        own = bool(there.own) and all(index in there.own for index in places)
        if not own and target.source is Tier.DEVICE:
            return None
        arena_bytes = 0 if own else self._arena_bytes(here, node, wanted.digest, beside)
        if arena_bytes is None:
            return None
        kv_bytes = kv_given_bytes(KvNeed(least, max(least, wanted.wanted)), free)
        load_s = self._ready_s(target, places)
        ready_s = load_s + sum(claim.load_s for claim in beside)
        source = Tier.DEVICE if own else target.source
        move = Move(
            instance=victim.instance.id,
            node=node.id,
            devices=tuple(places),
            kv_bytes=kv_bytes,
            source=source,
            peer=target.peer if source is Tier.REMOTE else "",
            drops=tuple(digest for one in taken for digest in one.drops),
            ready_s=ready_s,
            migrate_s=migrate_s,
            pause_s=pause_s,
        )
        assert node.inventory is not None
        kinds = {device.index: device.kind for device in node.inventory.devices}
        sizes = tuple(kv_bytes + (0 if kinds[index] == "cpu" else wanted.share) for index in places)
        claim = Claim(node.id, tuple(places), sizes, wanted.digest, arena_bytes, 0.0 if own else load_s, "", 0, 0, move.drops)
        return move, claim, sum(one.delay_s for one in taken)

    def _arena_bytes(self, here: Ground, node: Node, digest: str, beside: Sequence[Claim]) -> int | None:
        """What a load takes of a node's DRAM budget beside other claims; None if there is no room. What its own node's arena is
        to hold for the newcomer is spoken for."""
        view = self._view
        if view.holds_arena(node.id, digest) or any(claim.digest == digest and claim.arena_bytes for claim in beside):
            return 0
        assert node.inventory is not None
        size = view.arena_bytes_of(node.id, digest)
        held = view.arena_held_bytes.get(node.id, 0) + sum(claim.arena_bytes for claim in beside)
        if node.id == here.node.id and not view.holds_arena(node.id, self._asked.digest):
            held += view.arena_bytes_of(node.id, self._asked.digest)
        return size if held + size <= node.inventory.arena.budget_bytes else None
