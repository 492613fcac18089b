"""Room on a node that the busy make: those who drain, and those whose sequences go elsewhere (see `moves`)."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from math import comb

from schema.states import InstanceState
from sllmctl.cluster.plans import Move
from sllmctl.cluster.records import Instance, Node
from sllmctl.planner.cover import choose, pick
from sllmctl.planner.inquiry import Inquiry
from sllmctl.planner.moves import Movers
from sllmctl.planner.rooms import Ground
from sllmctl.planner.victims import Exit, Exits

__all__ = ["Working"]

_SOLVED = 4
"""Migrations are worked out for so many nodes of one plan."""
_DEVICE_SETS = 6
"""So many sets of devices are tried on each."""

_Room = tuple[list[int], list[Exit], tuple[Move, ...]]
"""Devices, who leaves them, and where the busy of them go."""


class Working:
    """The busy of one inquiry. ``bounded``: only so many nodes' migrations are worked out."""

    def __init__(self, inquiry: Inquiry, *, bounded: bool) -> None:
        self._inquiry = inquiry
        self._bounded = bounded
        self._solved = 0
        self._movers: Movers | None = None

    def with_busy(
        self,
        here: Ground,
        allowed: list[int],
        chosen: tuple[float, list[int], list[Exit]] | None,
        limit_s: float,
        deficit: int,
    ) -> _Room | None:
        """The best devices and who leaves them for less than ``limit_s``, the busy counted in; ``chosen`` is the best without
        them."""
        inquiry, asked = self._inquiry, self._inquiry.asked
        best: _Room | None = None
        if chosen is not None and chosen[0] <= limit_s:
            limit_s, best = chosen[0], (chosen[1], chosen[2], ())
        if not self.any_under(here.node, limit_s):
            return best
        drains = Exits(inquiry.view, here.node, asked, inquiry.prices, inquiry.journals, inquiry.settings, busy=True)
        found = pick(here.rooms, allowed, here.lodgers, drains.on, asked.count, asked.least)
        if found is not None and (best is None or found[0] < limit_s):
            limit_s, best = min(limit_s, found[0]), (found[1], found[2], ())
        if deficit or not inquiry.abilities.migrate or (self._bounded and self._solved >= _SOLVED):
            return best
        movers = self._find_movers()
        if not any(
            _is_working(one) and movers.least_s(one) < limit_s for one in inquiry.view.instances_on(here.node.id).values()
        ):
            return best
        self._solved += 1
        moves = Exits(
            inquiry.view, here.node, asked, inquiry.prices, inquiry.journals, inquiry.settings, busy=True,
            moving=partial(movers.exit_of, limit_s=limit_s),
        )  # fmt: skip
        found = pick(here.rooms, allowed, here.lodgers, moves.on, asked.count, asked.least)
        if found is None or not any(one.victim for one in moves.all()):
            return best
        return self._solve(here, allowed, found[1], moves.all(), limit_s) or best

    def any_under(self, node: Node, limit_s: float) -> bool:
        """True if a busy instance of a node might leave for less than ``limit_s``."""
        if limit_s <= 0.0:
            return False
        inquiry, asked = self._inquiry, self._inquiry.asked
        settings, journals, instances_of = inquiry.settings, inquiry.journals, inquiry.view.instances_of
        movers = self._find_movers() if inquiry.abilities.migrate else None
        base_s, long_ago = inquiry.prices.least_s, asked.now - settings.age_s
        for instance in inquiry.view.instances_on(node.id).values():
            if not _is_working(instance):
                continue
            if movers is not None and movers.least_s(instance) < limit_s:
                return True
            if asked.aged or (instance.ready_at is not None and instance.ready_at <= long_ago):
                copies = len(instances_of(instance.model))
                if base_s >= limit_s * copies:
                    continue
                known_s = journals.remaining_s(instance.id)
                if (known_s > 0.0 or asked.aged) and base_s / copies + min(known_s, settings.drain_longest_s) < limit_s:
                    return True
        return False

    def _find_movers(self) -> Movers:
        if self._movers is None:
            one = self._inquiry
            self._movers = Movers(
                one.view, one.estimates, one.journals, one.settings, one.abilities, one.fleet, one.asked, one.prices,
                sharing=one.options.sharing,
            )  # fmt: skip
        return self._movers

    def _solve(
        self, here: Ground, allowed: list[int], first: list[int], exits: list[Exit], limit_s: float
    ) -> tuple[list[int], list[Exit], tuple[Move, ...]] | None:
        """The best devices, who leaves them, and where the busy go: all sets of devices where those are few, or else the
        cheapest single ones, or the set that is cheapest before targets are assigned."""
        asked = self._inquiry.asked
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


def _is_working(instance: Instance) -> bool:
    return bool(instance.running and instance.served and instance.state is InstanceState.READY and not instance.moving)
