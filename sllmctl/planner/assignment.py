"""Choices of who leaves for a newcomer and where the busy of them go: partial ones with what they claim, and what is told of a
whole one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sllmctl.cluster.plans import Move
from sllmctl.cluster.records import Instance, Model, Node
from sllmctl.planner.packing import Packing, Start, Tenant
from sllmctl.planner.targets import Ready
from sllmctl.planner.victims import Exit

__all__ = ["Lot", "Partial", "Victim", "keep", "kind_of", "told"]


@dataclass(slots=True)
class Victim:
    """A busy instance with its sequences, and where they could go: when the last token would have moved at the soonest, and
    to where. ``least_s``: no target is sooner. ``ready`` and ``starts`` are None until they are looked for."""

    instance: Instance
    model: Model
    sequences: Sequence[int]
    tokens: int
    least_s: float = 0.0
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    ready: list[tuple[float, Ready | Start]] | None = None
    starts: list[tuple[float, Ready | Start]] | None = None


@dataclass(slots=True, frozen=True)
class Lot:
    """What starts on one node: the victims with their tenants, in order, and where they fit."""

    victims: tuple[Victim, ...]
    tenants: tuple[Tenant, ...]
    packing: Packing
    room_s: float


@dataclass(slots=True)
class Partial:
    """``exits`` with what each costs, so far as that does not depend on ``lots``; ``taken``: (sequences, tokens) by ready
    instance; ``hosts``: the victims that go to those."""

    freed: tuple[int, ...]
    delay_s: float
    room_s: float
    exits: tuple[Exit, ...]
    hosts: tuple[tuple[Victim, Ready], ...]
    taken: dict[str, tuple[int, int]]
    lots: dict[str, Lot]

    def cost_s(self) -> float:
        delay_s, room_s = self.whole_s()
        return delay_s + room_s

    def whole_s(self) -> tuple[float, float]:
        delay_s, room_s = self.delay_s, self.room_s
        for lot in self.lots.values():
            delay_s += lot.packing.drops_s
            room_s = max(room_s, lot.room_s)
        return delay_s, room_s

    def key(self) -> object:
        lots = tuple(
            sorted((node, tuple(sorted((id(one.start), one.least) for one in lot.tenants))) for node, lot in self.lots.items())
        )
        return self.freed, tuple(sorted(self.taken.items())), lots


def keep(group: list[Partial], new: Partial) -> None:
    """Keep a partial choice if none with the same claims is sooner and cheaper for others as well."""
    delay_s, room_s = new.whole_s()
    for other in group:
        other_delay_s, other_room_s = other.whole_s()
        if other_delay_s <= delay_s and other_room_s <= room_s:
            return
    group[:] = [other for other in group if not _covers(delay_s, room_s, other)]
    group.append(new)


def _covers(delay_s: float, room_s: float, other: Partial) -> bool:
    other_delay_s, other_room_s = other.whole_s()
    return delay_s <= other_delay_s and room_s <= other_room_s


def told(best: Partial) -> tuple[list[Exit], tuple[Move, ...]]:
    """Who leaves at what cost, and the moves."""
    moves: dict[str, Move] = {}
    prices_s: dict[str, float] = {}
    victims: dict[str, Victim] = {}
    for victim, ready in best.hosts:
        victims[victim.instance.id] = victim
        moves[victim.instance.id] = _to_ready(victim, ready)
    for lot in best.lots.values():
        for at, victim in enumerate(lot.victims):
            victims[victim.instance.id] = victim
            moves[victim.instance.id] = _to_start(lot, at)
        # The first of them drops, and pays, for all.
        prices_s[lot.victims[0].instance.id] = lot.packing.drops_s
    exits: list[Exit] = []
    for one in best.exits:
        if one.victim:
            move = moves[one.victim]
            pauses_s = len(victims[one.victim].sequences) * move.pause_s
            gone = Exit(one.frees, pauses_s + prices_s.get(one.victim, 0.0), move.ready_s + move.migrate_s)
            gone.ids, gone.drops, gone.weights = one.ids, one.drops, one.weights
            exits.append(gone)
        else:
            exits.append(one)
    return exits, tuple(moves[one.victim] for one in best.exits if one.victim)


def _to_ready(victim: Victim, ready: Ready) -> Move:
    host = ready.instance
    migrate_s, pause_s = victim.times[kind_of(ready.node)]
    return Move(
        instance=victim.instance.id,
        node=host.node,
        devices=host.devices,
        working_bytes=host.working_bytes,
        target=host.id,
        ready_s=0.0,
        migrate_s=migrate_s,
        pause_s=pause_s,
    )


def _to_start(lot: Lot, at: int) -> Move:
    victim, start, packing = lot.victims[at], lot.tenants[at].start, lot.packing
    migrate_s, pause_s = victim.times[kind_of(start.node)]
    return Move(
        instance=victim.instance.id,
        node=start.node.id,
        devices=tuple(sorted(packing.places[at])),
        working_bytes=packing.working_bytes[at],
        source=start.source,
        peer=start.peer,
        drops=() if at else packing.drops,
        ready_s=packing.ready_s[at],
        migrate_s=migrate_s,
        pause_s=pause_s,
    )


def kind_of(node: Node) -> str:
    """The kind of a node's devices."""
    assert node.inventory is not None
    return node.inventory.devices[0].kind
