"""Of those who may leave, the cheapest who make enough room: on one device, on several, and no more of them than it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from sllmctl.planner.victims import Exit

__all__ = ["choose", "cover", "pick", "spared"]


def cover(need: int, items: Sequence[tuple[int, float, float, Exit]], since_s: float) -> tuple[float, list[Exit]] | None:
    """Of (bytes, delay, room time, exit) the cheapest that free ``need`` bytes, and what they cost: their delays, and how much
    later than ``since_s`` the last of them has left. None if all of them are not enough.

    For every time to wait until, those that have left by then are a minimum knapsack: the greedy rule of Csirik, Frenk, Labbe
    and Zhang (Acta Cybernetica 10, 1991) is never over twice the least. So is the result.
    """
    if sum(item[0] for item in items) < need:
        return None
    times = sorted({max(item[2], since_s) for item in items})
    best: tuple[float, list[Exit]] | None = None
    for time_s in times:
        wait_s = time_s - since_s
        if best is not None and wait_s >= best[0]:
            break
        pool = [item for item in items if item[2] <= time_s] if len(times) > 1 else items
        found = _lightest(need, pool)
        if found is not None and (best is None or found[0] + wait_s < best[0]):
            best = (found[0] + wait_s, found[1])
    return best


def _lightest(need: int, pool: Sequence[tuple[int, float, float, Exit]]) -> tuple[float, list[Exit]] | None:
    ordered = sorted(pool, key=lambda item: (item[1] / item[0], -item[0]))
    taken: list[Exit] = []
    freed, cost = 0, 0.0
    best: tuple[float, list[Exit]] | None = None
    for size, delay_s, _, leaving in ordered:
        if freed + size < need:
            taken.append(leaving)
            freed += size
            cost += delay_s
        elif best is None or cost + delay_s < best[0]:
            best = (cost + delay_s, [*taken, leaving])
            if delay_s == 0.0:
                break
    return best


def choose(
    rooms: dict[int, int],
    allowed: Sequence[int],
    lodgers: dict[int, set[str]],
    exits: Iterable[Exit],
    count: int,
    least: int,
) -> tuple[float, list[int], list[Exit]] | None:
    """`pick` among ``exits`` that are known all."""
    by_device: dict[int, list[Exit]] = {index: [] for index in allowed}
    for one in exits:
        for index in one.frees:
            if index in by_device:
                by_device[index].append(one)
    return pick(rooms, allowed, lodgers, by_device.__getitem__, count, least)


def pick(
    rooms: dict[int, int],
    allowed: Sequence[int],
    lodgers: dict[int, set[str]],
    exits_on: Callable[[int], Sequence[Exit]],
    count: int,
    least: int,
    enough_s: float = -1.0,
) -> tuple[float, list[int], list[Exit]] | None:
    """The ``count`` devices among ``allowed`` that have ``least`` bytes at the least cost once some of the exits on them have
    left: the cost, the devices, and who leaves. Devices are taken one by one, each the cheapest beside those taken: the cost
    is at most ``count`` times that of the dearest of the cheapest, and `cover` at most doubles it. The first device that costs
    no more than ``enough_s`` is taken without a look at the next. With ``lodgers`` all of a device's must leave.
    """
    chosen: list[int] = []
    taken: list[Exit] = []
    cost, time_s = 0.0, 0.0
    for _ in range(count):
        best: tuple[float, int, int, list[Exit]] | None = None
        for index in allowed:
            if index in chosen:
                continue
            room = rooms[index]
            for one in taken:
                room += one.frees.get(index, 0)
            extra: list[Exit] = []
            added = 0.0
            until_s = time_s
            if lodgers and lodgers.get(index):
                forced = _forced(lodgers[index], exits_on(index), taken)
                if forced is None:
                    continue
                extra = forced
                for one in extra:
                    room += one.frees[index]
                    added += one.delay_s
                    until_s = max(until_s, one.room_s)
                added += until_s - time_s
            if room < least:
                items = [
                    (one.frees[index], one.delay_s, one.room_s, one)
                    for one in exits_on(index)
                    if one.frees[index] > 0 and one not in taken and one not in extra
                ]
                found = cover(least - room, items, until_s)
                if found is None:
                    continue
                added += found[0]
                extra = [*extra, *found[1]]
                for one in found[1]:
                    room += one.frees[index]
            if best is None or (added, -room, index) < best[:3]:
                best = (added, -room, index, extra)
                if added <= enough_s:
                    break
        if best is None:
            return None
        cost += best[0]
        chosen.append(best[2])
        for one in best[3]:
            taken.append(one)
            if one.room_s > time_s:
                time_s = one.room_s
    chosen.sort()
    return cost, chosen, taken


def _forced(lodgers: set[str], exits: Sequence[Exit], taken: Sequence[Exit]) -> list[Exit] | None:
    gone = {name for one in taken for name in one.ids}
    extra = [one for one in exits if one not in taken and any(name in lodgers for name in one.ids)]
    return extra if lodgers <= gone | {name for one in extra for name in one.ids} else None


def spared(rooms: dict[int, int], devices: Sequence[int], least: int, taken: list[Exit], kept: Iterable[Exit]) -> list[Exit]:
    """Those of ``taken`` without whom there would be too little room, looked at from the costliest; ``kept`` have to go for
    another reason."""
    keep = list(kept)
    left = list(taken)
    for one in sorted(taken, key=lambda one: (-one.delay_s - one.room_s, one.ids, one.drops)):
        if one in keep:
            continue
        fewer = [other for other in left if other is not one]
        if all(rooms[index] + sum(other.frees.get(index, 0) for other in fewer) >= least for index in devices):
            left = fewer
    return left
