"""A simulated node's store: where checkpoints lie, how loads come through its channels, and what is dropped.

* A load runs through all channels of its path at once (see `channels`); one that began goes through even if nobody waits for
  its end any more, but weights that nobody waits for do not stay on a device.
* A checkpoint that is read from the disk or fetched stays in the arena; if the arena is full of what is in use, it only passes
  through. A fetched one is also written to the disk, behind the reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from schema.errors import Conflict, NotFound
from schema.link import CheckpointTruth, Placement
from schema.states import Tier, TierState
from sllmctl.simulate.channels import Channel, transfer
from sllmctl.simulate.kernel import Kernel
from sllmctl.simulate.memory import Arena, Device, Resident, Weights
from sllmctl.simulate.scenario import ModelGroup, NodeGroup

__all__ = ["Load", "SimModel", "Store"]


class SimModel:
    """A model as a node must know it. ``index`` counts over all groups."""

    __slots__ = ("digest", "group", "index", "name", "share_bytes", "truth")

    def __init__(self, index: int, name: str, digest: str, group: ModelGroup) -> None:
        self.index = index
        self.name = name
        self.digest = digest
        self.group = group
        self.share_bytes = -(-group.weights_bytes // group.devices)
        self.truth = CheckpointTruth(
            digest=digest,
            architecture=group.name,
            image_bytes=group.weights_bytes,
            kv_token_bytes=group.kv_token_bytes,
            max_context_tokens=group.max_context_tokens,
        )


@dataclass(slots=True)
class Load:
    """When it is through, from which tier it comes, and whether that is another node's."""

    end: float
    tier: Tier
    peer: bool


class Store:
    """``disk`` holds the digests of checkpoints that lie there. ``changed`` hears of each whose placements changed, ``peer``
    finds another node's store."""

    def __init__(
        self,
        kernel: Kernel,
        group: NodeGroup,
        models: dict[str, SimModel],
        changed: Callable[[str], None],
        peer: Callable[[str], Store],
    ) -> None:
        self.kernel = kernel
        self.cpu = group.device_kind == "cpu"
        self.arena = Arena(group.dram_bytes)
        self.disk: dict[str, None] = {}
        self.disk_channel = Channel(group.disk_bps)
        self.ingress = Channel(group.network_bps)
        self.egress = Channel(group.network_bps)
        self.devices = [Device(kernel, index, int(group.device_bytes), group.device_bps) for index in range(group.devices)]
        self._models = models
        """By digest."""
        self._changed = changed
        self._peer = peer

    # --- where what lies ---

    def place(self, digest: str, tier: Tier) -> None:
        """Before the beginning: a checkpoint lies here."""
        if tier is Tier.DISK:
            self.disk[digest] = None
        else:
            resident = Resident(self._models[digest].group.weights_bytes, (Tier.DRAM, False), 0.0)
            resident.whole = True
            self.arena.put(digest, resident)

    def digests(self) -> list[str]:
        """Every checkpoint on the disk or in the arena."""
        return list(dict.fromkeys((*self.disk, *self.arena.residents)))

    def placed(self, digest: str) -> CheckpointTruth:
        """Where a checkpoint lies here now."""
        facts = self._models[digest].truth
        size = facts.image_bytes
        placements: list[Placement] = []
        if digest in self.disk:
            placements.append(Placement(tier=Tier.DISK, state=TierState.RESIDENT, size_bytes=size))
        resident = self.arena.residents.get(digest)
        if resident is not None:
            state = TierState.RESIDENT if resident.whole else TierState.FILLING
            placements.append(Placement(tier=Tier.DRAM, state=state, size_bytes=size, users=resident.users))
        for device in self.devices:
            parts = [weights for _, weights in device.parts_of(digest)]
            if parts:
                placements.append(
                    Placement(
                        tier=Tier.DEVICE,
                        state=TierState.RESIDENT if all(one.whole for one in parts) else TierState.FILLING,
                        size_bytes=sum(one.size for one in parts),
                        users=sum(one.users for one in parts),
                        device=device.index,
                    )
                )
        return CheckpointTruth(
            digest=digest,
            architecture=facts.architecture,
            image_bytes=size,
            kv_token_bytes=facts.kv_token_bytes,
            max_context_tokens=facts.max_context_tokens,
            placements=tuple(placements),
        )

    # --- loads ---

    def load(self, model: SimModel, devices: list[Device], wanted: tuple[Tier, str] | None) -> Load | None:
        """Bring a checkpoint's parts to the devices of a life, which uses them from now on, from ``wanted`` if there. None
        if the arena must hold them and cannot."""
        digest, now = model.digest, self.kernel.now
        if self.cpu:
            load = self.read(model, wanted, [])
            if load is not None:
                self.arena.use(digest, 1)
            return load
        missing: list[tuple[Device, int]] = []
        there_at = now
        for part, device in enumerate(devices):
            for other, stale in device.parts_of(digest):
                if other != part and not stale.users:
                    device.drop(digest, other)
            weights = device.weights.get((digest, part))
            if weights is None:
                missing.append((device, part))
            else:
                weights.users += 1
                there_at = max(there_at, weights.whole_at)
        if not missing:
            self._changed(digest)
            return Load(there_at, Tier.DEVICE, False)
        load = self.read(model, wanted, missing)
        assert load is not None
        load.end = max(load.end, there_at)
        return load

    def let_go(self, digest: str, devices: list[Device]) -> None:
        """A life that used a checkpoint is over."""
        if self.cpu:
            self.arena.use(digest, -1)
        for part, device in enumerate(devices):
            weights = device.weights.get((digest, part))
            if weights is not None:
                weights.users -= 1
                # A manager counts a checkpoint once on a device: what idles beside a part in use is room that it does not see.
                beside = any(other != part and one.users for other, one in device.parts_of(digest))
                if not weights.users and (beside or not weights.whole):
                    device.drop(digest, part)
        self._changed(digest)

    def read(self, model: SimModel, wanted: tuple[Tier, str] | None, missing: list[tuple[Device, int]]) -> Load | None:
        """Bring a checkpoint into the arena, and from there to these devices; None if it has no other place than the arena and
        that has no room."""
        digest, size, now = model.digest, model.group.weights_bytes, self.kernel.now
        links = [(device.link, float(model.share_bytes)) for device, _ in missing]
        resident = self.arena.residents.get(digest)
        fetched = False
        if resident is not None:
            end = max(transfer(links, now), resident.whole_at)
            tier, peer = (Tier.DRAM, False) if resident.whole else resident.source
        else:
            victims = self.arena.make_room(size)
            if victims is None and not missing:
                return None
            path, tier, peer = self._path(digest, size, wanted)
            fetched = tier is Tier.REMOTE
            end = transfer([*path, *links], now)
            for victim in victims or ():
                self._changed(victim)
            if victims is not None:
                resident = Resident(size, (tier, peer), end)
                self.arena.put(digest, resident)
        if resident is not None:
            self.arena.use(digest, 1)
        parts: list[tuple[Device, int, Weights]] = []
        for device, part in missing:
            weights = Weights(model.share_bytes, end)
            weights.users = 1
            device.put(digest, part, weights)
            parts.append((device, part, weights))
        self.kernel.at(end, partial(self._arrived, digest, resident, parts, fetched))
        return Load(end, tier, peer)

    def _path(self, digest: str, size: int, wanted: tuple[Tier, str] | None) -> tuple[list[tuple[Channel, float]], Tier, bool]:
        """The channels to the arena from where the checkpoint is to come, or, if it is not there any more, from where it is."""
        tier, name = wanted or (Tier.DISK, "")
        if tier is not Tier.REMOTE and digest in self.disk:
            return [(self.disk_channel, size)], Tier.DISK, False
        path: list[tuple[Channel, float]] = [(self.ingress, size)]
        if name:
            peer = self._peer(name)
            resident = peer.arena.residents.get(digest)
            if resident is not None and resident.whole:
                return [(peer.egress, size), *path], Tier.REMOTE, True
            if digest in peer.disk:
                return [(peer.disk_channel, size), (peer.egress, size), *path], Tier.REMOTE, True
        return path, Tier.REMOTE, False

    def _arrived(self, digest: str, resident: Resident | None, parts: list[tuple[Device, int, Weights]], fetched: bool) -> None:
        """A load is through."""
        if resident is not None:
            resident.whole = True
            self.arena.use(digest, -1)
        for device, part, weights in parts:
            if device.weights.get((digest, part)) is weights:
                weights.whole = True
        self._changed(digest)
        if fetched and digest not in self.disk:
            size = self._models[digest].group.weights_bytes
            self.kernel.at(transfer([(self.disk_channel, size)], self.kernel.now), partial(self._written, digest))

    def _written(self, digest: str) -> None:
        if digest not in self.disk:
            self.disk[digest] = None
            self._changed(digest)

    # --- drops ---

    def drop(self, digest: str, tier: Tier) -> None:
        """Raises NotFound, or Conflict for what is in use."""
        match tier:
            case Tier.DEVICE:
                self._drop_weights(digest)
            case Tier.DRAM:
                self._drop_resident(digest)
            case _:
                if digest not in self.disk:
                    raise NotFound(f"checkpoint {digest} is not on this node's disk")
                del self.disk[digest]
        self._changed(digest)

    def _drop_weights(self, digest: str) -> None:
        """From every device on which nobody uses them: that is what counts as idle, device by device."""
        found = [(device, part, weights) for device in self.devices for part, weights in device.parts_of(digest)]
        if not found:
            raise NotFound(f"checkpoint {digest} is on no device of this node")
        idle = [(device, part) for device, part, weights in found if not weights.users]
        if not idle:
            raise Conflict(f"checkpoint {digest} is in use on every device where it lies; stop its instances first")
        for device, part in idle:
            device.drop(digest, part)

    def _drop_resident(self, digest: str) -> None:
        resident = self.arena.residents.get(digest)
        if resident is None:
            raise NotFound(f"checkpoint {digest} is not in this node's memory")
        if resident.users:
            raise Conflict(f"checkpoint {digest} has {resident.users} users; stop its instances first")
        self.arena.drop(digest)
