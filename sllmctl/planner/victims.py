"""Who may leave a node for a newcomer, what that costs the others, and the cheapest who make enough room.

* Idle weights (an ``idle`` digest on its devices) may always go.
* A resting instance may go if it is above its model's minimum, idle for ``evict_idle_s``, and has served or is idle for
  ``unserved_s``: so none is taken from the request that it was started for.
* A busy one may drain if it is above its model's minimum and has served; and either the newcomer's requests have waited for
  ``age_s``, or it is known how long it would go on and it has been ready for ``age_s``: each start serves at least so long.
* None whose sequences are to go elsewhere already: its room is spoken for.
* Those who drain or stop already leave anyway, and cost only the time until they are gone. What is reserved behind them
  by others is in the promised bytes.

What others pay is in seconds. Whoever loses weights or an instance pays the reload, times the probability that it is called
again within ``heat_s``: calls come at ``heat / heat_s`` per second, so that is ``1 - exp(-heat)``. It is shared among its
copies, since any of them may be the one that is called. An instance that drains is in use: its probability is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from math import exp

from schema.states import InstanceState, ModelState, Tier
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import HOLDING, LEAVING, ClusterView, Instance, Node
from sllmctl.planner.estimates import Channel, Estimates
from sllmctl.planner.plans import Journals
from sllmctl.planner.rooms import Ask

__all__ = ["Exit", "Prices", "choose", "cover", "exits_on", "remaining_s", "spared"]


class Exit:
    """What may leave, in one piece: ``frees`` bytes by device, at ``delay_s`` for others, in ``room_s``.

    ``weights`` are those bytes of ``frees`` that are of ``drops``, and ``weights_s`` the part of the delay that is for them:
    both are spared where there is room enough without. ``ids``: the instances of it, those that leave already included.
    ``victim``: the one that migrates; what it costs is then of its soonest target, until it is assigned one (see `moves`).
    """

    __slots__ = ("delay_s", "drains", "drops", "frees", "ids", "room_s", "stops", "victim", "weights", "weights_s")

    def __init__(self, frees: dict[int, int], delay_s: float = 0.0, room_s: float = 0.0) -> None:
        self.frees = frees
        self.delay_s = delay_s
        self.room_s = room_s
        self.weights: dict[int, int] = {}
        self.weights_s = 0.0
        self.drops: tuple[str, ...] = ()
        self.stops: tuple[str, ...] = ()
        self.drains: tuple[str, ...] = ()
        self.ids: tuple[str, ...] = ()
        self.victim = ""


class Prices:
    """What losing something costs, as of one plan; probabilities are worked out once for each model. ``least_s``: ending a busy
    instance that is its model's only one costs no less."""

    def __init__(self, view: ClusterView, estimates: Estimates, settings: ControlSettings, now: float) -> None:
        self._view = view
        self._estimates = estimates
        self._settings = settings
        self._now = now
        self._heats: dict[str, float] = {}
        self._bandwidths: dict[str, tuple[float, float]] = {}
        self.least_s = settings.start_base_s

    def heat(self, digest: str) -> float:
        """Recent calls of the deployed models that use a checkpoint, decayed until now."""
        found = self._heats.get(digest)
        if found is None:
            found = 0.0
            for name in self._view.models_of(digest):
                model = self._view.models[name]
                if model.heat and model.state is ModelState.DEPLOYED:
                    found += model.heat * exp(-max(0.0, self._now - model.heat_at) / self._settings.heat_s)
            self._heats[digest] = found
        return found

    def load_s(self, node: Node, digest: str, part_bytes: int) -> float:
        """Bringing a checkpoint's part back to one device of a node."""
        view, name = self._view, node.id
        found = self._bandwidths.get(name)
        if found is None:
            estimates = self._estimates
            found = (estimates.bandwidth_bps(node, Channel.DISK), estimates.bandwidth_bps(node, Channel.DEVICE))
            self._bandwidths[name] = found
        if name in view.nodes_with(digest, Tier.DRAM):
            return part_bytes / found[1]
        checkpoint = view.checkpoints.get(digest)
        image_bytes = checkpoint.image_bytes if checkpoint is not None else part_bytes
        return max(part_bytes / found[1], image_bytes / found[0])

    def weights_s(self, node: Node, digest: str, part_bytes: int, *, busy: bool = False) -> float:
        """Dropping a checkpoint's weights, so many bytes on each, from a node's devices."""
        called = 1.0
        if not busy:
            heat = self._heats.get(digest)
            if heat is None:
                heat = self.heat(digest)
            if heat <= 0.0:
                return 0.0
            called -= exp(-heat)
        return called * self.load_s(node, digest, part_bytes) / (len(self._view.nodes_with(digest, Tier.DEVICE)) or 1)

    def instance_s(self, instance: Instance, *, busy: bool) -> float:
        """Ending an instance, its weights left where they are."""
        called = 1.0 if busy else 1.0 - exp(-self.heat(instance.digest))
        return called * self._settings.start_base_s / max(1, len(self._view.instances_of(instance.model)))


def remaining_s(instance: Instance, journals: Journals, settings: ControlSettings, now: float) -> float:
    """How long one that drains, or would for a newcomer, goes on: what it is given at most, since then it is stopped."""
    if instance.state is InstanceState.STOPPING or not instance.running:
        return 0.0
    most = settings.drain_longest_s
    if instance.state is InstanceState.DRAINING:
        given_s = settings.drain_s if instance.grace_s is None else instance.grace_s
        most = max(0.0, given_s - (now - instance.life_at))
    known = journals.remaining_s(instance.id)
    return min(known, most) if known > 0.0 else most


def exits_on(
    view: ClusterView,
    node: Node,
    asked: Ask,
    prices: Prices,
    journals: Journals,
    settings: ControlSettings,
    *,
    devices: Container[int],
    busy: bool = True,
    moving: Callable[[Instance], Exit | None] | None = None,
) -> list[Exit]:
    """All that may leave these devices of a node, in an order that depends on the view alone. Without ``busy``, none that has
    sequences. ``moving``: a busy instance as one that migrates, None if it has nowhere to go; without it none does."""
    assert node.inventory is not None
    kinds = {device.index: device.kind for device in node.inventory.devices}
    holders: dict[str, list[Instance]] = {}
    for instance in view.instances_on(node.id).values():
        if instance.state in HOLDING:
            holders.setdefault(instance.digest, []).append(instance)
    idle: dict[str, dict[int, int]] = {}
    for index in kinds:
        if index not in devices:
            continue
        lying = view.idle_weights.get((node.id, index))
        if lying:
            for digest, size in lying.items():
                if digest != asked.digest:
                    idle.setdefault(digest, {})[index] = size
    exits: list[Exit] = []
    for digest, frees in idle.items():
        if digest not in holders and not view.holds_arena(node.id, digest):
            one = Exit(frees, prices.weights_s(node, digest, max(frees.values())))
            one.drops = (digest,)
            exits.append(one)
    spare: dict[str, int] = {}
    for digest, group in holders.items():
        found: list[Exit] = []
        if not any(index in devices for instance in group for index in instance.devices):
            continue
        for instance in group:
            if instance.running and not busy and instance.state is InstanceState.READY:
                continue
            one_exit = _leave(view, instance, asked, prices, journals, settings, spare)
            if moving is not None and instance.running and instance.state is InstanceState.READY:
                stays = instance.moving or instance.model == asked.model.name
                one_exit = _sooner(one_exit, None if stays else moving(instance))
            if one_exit is not None:
                found.append(one_exit)
        if found:
            _with_weights(view, node, digest, group, found, idle.get(digest), kinds, asked, prices)
            exits += _joined(found) if len(group) > 1 and found[0].drops else found
    return exits


def _sooner(drain: Exit | None, move: Exit | None) -> Exit | None:
    if drain is None or move is None:
        return drain or move
    return move if move.room_s + move.delay_s <= drain.room_s + drain.delay_s else drain


def _leave(
    view: ClusterView,
    instance: Instance,
    asked: Ask,
    prices: Prices,
    journals: Journals,
    settings: ControlSettings,
    spare: dict[str, int],
) -> Exit | None:
    """One instance as something that may leave, its weights staying; None if it may not."""
    now = asked.now
    if instance.state in LEAVING:
        found = Exit(dict.fromkeys(instance.devices, instance.kv_bytes), 0.0, remaining_s(instance, journals, settings, now))
    elif instance.state is not InstanceState.READY or instance.moving or instance.model == asked.model.name:
        return None
    elif instance.running:
        if not instance.served:
            return None
        if not asked.aged:
            ready_at = instance.ready_at
            if ready_at is None or now - ready_at < settings.age_s or journals.remaining_s(instance.id) <= 0.0:
                return None
        if not _spare(view, instance, spare):
            return None
        delay_s = prices.instance_s(instance, busy=True)
        gone_s = remaining_s(instance, journals, settings, now)
        found = Exit(dict.fromkeys(instance.devices, instance.kv_bytes), delay_s, gone_s)
        found.drains = (instance.id,)
    else:
        since = instance.idle_since
        if since is None or since + (settings.evict_idle_s if instance.served else _unserved_s(settings)) > now:
            return None
        if not _spare(view, instance, spare):
            return None
        found = Exit(dict.fromkeys(instance.devices, instance.kv_bytes), prices.instance_s(instance, busy=False))
        found.stops = (instance.id,)
    found.ids = (instance.id,)
    return found


def _unserved_s(settings: ControlSettings) -> float:
    return max(settings.unserved_s, settings.evict_idle_s)


def _spare(view: ClusterView, instance: Instance, spare: dict[str, int]) -> bool:
    """True if the model has one above its minimum that is not spoken for; that one is then."""
    owner = view.models.get(instance.model)
    if owner is None or owner.spec.scale.min == 0:
        return True
    left = spare.get(instance.model)
    if left is None:
        there = sum(
            other.state in HOLDING and other.state not in LEAVING and not other.moving
            for other in view.instances_of(instance.model).values()
        )
        left = there - owner.spec.scale.min
    spare[instance.model] = left - 1
    return left > 0


def _with_weights(
    view: ClusterView,
    node: Node,
    digest: str,
    group: list[Instance],
    found: list[Exit],
    idle: dict[int, int] | None,
    kinds: dict[int, str],
    asked: Ask,
    prices: Prices,
) -> None:
    """Let the weights go with their instances, where they can: a node drops a checkpoint from all of its devices at once, and
    only when none of them uses it. Those of one that migrates cost nothing, since it has others by then. The newcomer's own
    stay for it."""
    checkpoint = view.checkpoints.get(digest)
    leaving = {name for one in found for name in one.ids}
    stays = [instance for instance in group if instance.id not in leaving]
    by_id = {instance.id: instance for instance in group}
    moved = any(one.victim for one in found)
    whole = not stays and (len(group) == 1 or not moved)
    busy = any(one.drains for one in found)
    for at, one in enumerate(found):
        instance = by_id[one.ids[0]]
        share = -(-checkpoint.image_bytes // len(instance.devices)) if checkpoint is not None else 0
        shares = {index: share for index in instance.devices if kinds.get(index, "cpu") != "cpu"}
        if not shares:
            continue
        if digest == asked.digest:
            for index, size in shares.items():
                one.frees[index] += size
            continue
        if whole:
            for index, size in shares.items():
                one.frees[index] += size
            one.weights = dict(shares)
            one.drops = (digest,)
            if at == 0:
                for index, size in (idle or {}).items():
                    one.frees[index] = one.frees.get(index, 0) + size
                    one.weights[index] = one.weights.get(index, 0) + size
                if not moved:
                    one.weights_s = prices.weights_s(node, digest, share, busy=busy)
                    one.delay_s += one.weights_s
            continue
        beside = {index for other in stays for index in other.devices}
        for index, size in shares.items():
            if index in beside:
                one.frees[index] += size


def _joined(found: list[Exit]) -> list[Exit]:
    """Several instances of one checkpoint on a node leave together, or its weights could not go."""
    whole = Exit({}, sum(one.delay_s for one in found), max(one.room_s for one in found))
    for one in found:
        for index, size in one.frees.items():
            whole.frees[index] = whole.frees.get(index, 0) + size
        for index, size in one.weights.items():
            whole.weights[index] = whole.weights.get(index, 0) + size
        whole.stops += one.stops
        whole.drains += one.drains
        whole.ids += one.ids
        whole.weights_s += one.weights_s
    whole.drops = found[0].drops
    return [whole]


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
    exits: Sequence[Exit],
    count: int,
    least: int,
) -> tuple[float, list[int], list[Exit]] | None:
    """The ``count`` devices among ``allowed`` that have ``least`` bytes at the least cost once ``exits`` have left: the cost,
    the devices, and who leaves. Devices are taken one by one, each the cheapest beside those taken: the cost is at most
    ``count`` times that of the dearest of the cheapest, and `cover` at most doubles it. With ``lodgers`` all of a device's
    must leave.
    """
    by_device: dict[int, list[Exit]] = {index: [] for index in allowed}
    for one in exits:
        for index in one.frees:
            if index in by_device:
                by_device[index].append(one)
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
            if lodgers.get(index):
                forced = _forced(lodgers[index], by_device[index], taken)
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
                    for one in by_device[index]
                    if one not in taken and one not in extra and one.frees[index] > 0
                ]
                found = cover(least - room, items, until_s)
                if found is None:
                    continue
                added += found[0]
                extra = [*extra, *found[1]]
                room += sum(one.frees[index] for one in found[1])
            if best is None or (added, -room, index) < best[:3]:
                best = (added, -room, index, extra)
        if best is None:
            return None
        cost += best[0]
        chosen.append(best[2])
        taken += best[3]
        time_s = max([time_s, *(one.room_s for one in best[3])])
    return cost, sorted(chosen), taken


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
