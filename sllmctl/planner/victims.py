"""Who may leave a node for a newcomer, and what that costs the others (see `prices`).

* Idle weights (an ``idle`` digest on its devices) may always go.
* A resting instance may go if it is above its model's minimum, idle for ``evict_idle_s``, and has served or is idle for
  ``unserved_s``: so none is taken from the request that it was started for.
* A busy one may drain if it is above its model's minimum and has served; and either the newcomer's requests have waited for
  ``age_s``, or it is known how long it would go on and it has been ready for ``age_s``: each start serves at least so long.
* None whose sequences are to go elsewhere already: its room is spoken for.
* Those who drain or stop already leave anyway, and cost only the time until they are gone. What is reserved behind them
  by others is in the promised bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from schema.states import InstanceState, Tier
from sllmctl.cluster.records import HOLDING, LEAVING, Instance, Node
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.interface import Journals
from sllmctl.planner.prices import Prices
from sllmctl.planner.rooms import Ask

__all__ = ["Exit", "Exits", "exits_on", "remaining_s"]


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


Moving = Callable[[Instance], Exit | None]
"""A busy instance as one that migrates; None if it has nowhere to go."""


class Exits:
    """All that may leave a node, found device by device as they are asked for: most plans need few of them.

    Without ``busy``, none that has sequences; without ``moving``, none migrates.
    """

    def __init__(
        self,
        view: ClusterView,
        node: Node,
        asked: Ask,
        prices: Prices,
        journals: Journals,
        settings: ControlSettings,
        *,
        busy: bool = True,
        moving: Moving | None = None,
    ) -> None:
        assert node.inventory is not None
        self._view = view
        self._node = node
        self._asked = asked
        self._prices = prices
        self._journals = journals
        self._settings = settings
        self._busy = busy
        self._moving = moving
        self._by_device: dict[int, list[Exit]] = {}
        self._by_digest: dict[str, list[Exit]] = {}
        self._spare: dict[str, int] = {}
        self._cpus = [device.index for device in node.inventory.devices if device.kind == "cpu"]
        self._there = [one for one in view.instances_on(node.id).values() if one.state in HOLDING]

    def on(self, device: int) -> list[Exit]:
        """Those that give room on a device."""
        found = self._by_device.get(device)
        if found is not None:
            return found
        found = self._by_device[device] = []
        by_digest = self._by_digest
        for instance in self._there:
            if device in instance.devices:
                digest = instance.digest
                exits = by_digest.get(digest)
                if exits is None:
                    exits = by_digest[digest] = self._of_group(digest)
                for one in exits:
                    if device in one.frees and one not in found:
                        found.append(one)
        idle = self._view.memory.idle_weights.get((self._node.id, device))
        if idle:
            for digest, size in idle.items():
                exits = by_digest.get(digest)
                if exits is None:
                    exits = by_digest[digest] = self._of_idle(digest, device, size)
                for one in exits:
                    if device in one.frees and one not in found:
                        found.append(one)
        return found

    def all(self) -> list[Exit]:
        assert self._node.inventory is not None
        return list(dict.fromkeys(one for device in self._node.inventory.devices for one in self.on(device.index)))

    def _of_idle(self, digest: str, device: int, size: int) -> list[Exit]:
        """A checkpoint that is idle on a device: with its instances elsewhere on the node, or alone, if nothing uses it."""
        view, node = self._view, self._node
        for instance in self._there:
            if instance.digest == digest:
                return self._of_group(digest)
        if digest == self._asked.digest or view.memory.holds_arena(node.id, digest):
            return []
        frees = {device: size} if view.nodes_with(digest, Tier.DEVICE).get(node.id) == 1 else self._lying(digest)
        one = Exit(frees, self._prices.weights_s(node, digest, size))
        one.drops = (digest,)
        return [one]

    def _lying(self, digest: str) -> dict[int, int]:
        """Where a checkpoint's weights are idle on the node, and their bytes."""
        view, node = self._view, self._node.id
        frees: dict[int, int] = {}
        for record in view.placements_at(digest, node).values():
            if record.tier is Tier.DEVICE:
                idle = view.memory.idle_weights.get((node, record.device))
                if idle and digest in idle:
                    frees[record.device] = idle[digest]
        return frees

    def _of_group(self, digest: str) -> list[Exit]:
        """Instances of one checkpoint, with its weights as far as they may go."""
        found: list[Exit] = []
        group = [one for one in self._there if one.digest == digest]
        for instance in group:
            if instance.running and not self._busy and instance.state is InstanceState.READY:
                continue
            one = self._leave(instance)
            if self._moving is not None and instance.running and instance.state is InstanceState.READY:
                stays = instance.moving or instance.model == self._asked.model.name
                one = _sooner(one, None if stays else self._moving(instance))
            if one is not None:
                found.append(one)
        if found:
            self._with_weights(digest, group, found)
            if len(group) > 1 and found[0].drops:
                return _joined(found)
        return found

    def _leave(self, instance: Instance) -> Exit | None:
        """One instance as something that may leave, its weights staying; None if it may not."""
        asked, settings = self._asked, self._settings
        now = asked.now
        if instance.state in LEAVING:
            gone_s = remaining_s(instance, self._journals, settings, now)
            found = Exit(dict.fromkeys(instance.devices, instance.working_bytes), 0.0, gone_s)
        elif instance.state is not InstanceState.READY or instance.moving or instance.model == asked.model.name:
            return None
        elif instance.running:
            if not instance.served:
                return None
            if not asked.aged:
                ready_at = instance.ready_at
                if ready_at is None or now - ready_at < settings.age_s or self._journals.remaining_s(instance.id) <= 0.0:
                    return None
            if not self._is_spare(instance):
                return None
            delay_s = self._prices.instance_s(instance, busy=True)
            gone_s = remaining_s(instance, self._journals, settings, now)
            found = Exit(dict.fromkeys(instance.devices, instance.working_bytes), delay_s, gone_s)
            found.drains = (instance.id,)
        else:
            since = instance.idle_since
            least_s = settings.evict_idle_s if instance.served else max(settings.unserved_s, settings.evict_idle_s)
            if since is None or since + least_s > now or not self._is_spare(instance):
                return None
            delay_s = self._prices.instance_s(instance, busy=False)
            found = Exit(dict.fromkeys(instance.devices, instance.working_bytes), delay_s)
            found.stops = (instance.id,)
        found.ids = (instance.id,)
        return found

    def _is_spare(self, instance: Instance) -> bool:
        """True if the model has one above its minimum that is not spoken for; that one is then."""
        view, spare = self._view, self._spare
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

    def _with_weights(self, digest: str, group: list[Instance], found: list[Exit]) -> None:
        """Let the weights go with their instances, where they can: a node drops a checkpoint from all of its devices at once,
        and only when none of them uses it. Those of one that migrates cost nothing, since it has others by then. The
        newcomer's own stay for it."""
        view, node, cpus = self._view, self._node, self._cpus
        checkpoint = view.checkpoints.get(digest)
        image_bytes = checkpoint.image_bytes if checkpoint is not None else 0
        own = digest == self._asked.digest
        moved = any(one.victim for one in found)
        whole = not own and len(found) == len(group) and (len(group) == 1 or not moved)
        beside: set[int] = set()
        if not whole and not own:
            leaving = {name for one in found for name in one.ids}
            beside = {index for other in group if other.id not in leaving for index in other.devices}
        for at, one in enumerate(found):
            share = -(-image_bytes // len(one.frees))
            shares = {index: share for index in one.frees if index not in cpus}
            if not shares:
                continue
            for index in shares:
                if own or whole or index in beside:
                    one.frees[index] += share
            if not whole:
                continue
            one.weights = shares
            one.drops = (digest,)
            if at == 0:
                if view.nodes_with(digest, Tier.DEVICE).get(node.id, 0) > len(shares):
                    for index, size in self._lying(digest).items():
                        one.frees[index] = one.frees.get(index, 0) + size
                        one.weights[index] = one.weights.get(index, 0) + size
                if not moved:
                    one.weights_s = self._prices.weights_s(node, digest, share, busy=any(other.drains for other in found))
                    one.delay_s += one.weights_s


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
    moving: Moving | None = None,
) -> list[Exit]:
    """All that may leave these devices of a node, in an order that depends on the view alone."""
    assert node.inventory is not None
    exits = Exits(view, node, asked, prices, journals, settings, busy=busy, moving=moving)
    inside = [device.index for device in node.inventory.devices if device.index in devices]
    return list(dict.fromkeys(one for index in inside for one in exits.on(index)))


def _sooner(drain: Exit | None, move: Exit | None) -> Exit | None:
    if drain is None or move is None:
        return drain or move
    return move if move.room_s + move.delay_s <= drain.room_s + drain.delay_s else drain


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
