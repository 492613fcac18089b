"""The agent's side of the device tier: the descriptors it keeps, who uses which weights, what the store has yet to answer."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from agent.daemon.losses import given_up
from agent.native.jobs import Priority
from schema.errors import Fault, NotFound, SllmError
from schema.link import (
    Descriptors,
    DeviceWeights,
    DropDevice,
    EvictedDevice,
    FillDevice,
    HoldDevice,
    Message,
    NodeEvent,
    OnDevice,
    OperationDone,
    Placement,
    Progress,
    ReleasedDevice,
    ReserveDevice,
    StoreTruth,
)
from schema.states import Tier, TierState

__all__ = ["DeviceTier"]


@dataclass(slots=True)
class _Fill:
    message: FillDevice
    answered: Callable[[OnDevice | Fault], None]
    progress: Callable[[Progress], None]
    losses: int = 0


@dataclass(slots=True)
class _Drop:
    message: DropDevice
    answered: Callable[[Fault | None], None]


class DeviceTier:
    """What lies on devices, as last heard. ``say`` reaches the store if it has stated its truth, else does nothing; ``changed``
    hears of every checkpoint whose placements changed, ``happened`` of evictions."""

    def __init__(
        self, say: Callable[[Message], None], changed: Callable[[str], None], happened: Callable[[NodeEvent], None]
    ) -> None:
        self._say = say
        self._changed = changed
        self._happened = happened
        self._kept: dict[str, tuple[DeviceWeights, int]] = {}
        self._users: dict[tuple[str, int], set[str]] = {}
        self._waiting: set[str] = set()
        self._kv: dict[int, dict[str, int]] = {}
        self._fills: dict[str, _Fill] = {}
        self._drops: dict[str, _Drop] = {}

    @property
    def loading(self) -> bool:
        """True while a fill is not answered yet."""
        return bool(self._fills)

    @property
    def digests(self) -> set[str]:
        """Checkpoints that lie on a device."""
        return {weights.digest for weights, _ in self._kept.values()}

    @property
    def lying(self) -> list[DeviceWeights]:
        return [weights for weights, _ in self._kept.values()]

    @property
    def filling(self) -> set[str]:
        """Checkpoints that are being loaded onto a device."""
        return {fill.message.digest for fill in self._fills.values()}

    def images(self, digest: str, devices: tuple[int, ...]) -> list[tuple[str, bool]]:
        """Which images of a checkpoint lie on these devices, or come there: the id, and whether it lies there."""
        kept = [weights for weights, _ in self._kept.values() if weights.digest == digest and weights.device in devices]
        fills = [fill.message for fill in self._fills.values() if fill.message.digest == digest]
        coming = [message.image_id for message in fills if {*message.devices}.intersection(devices)]
        return [*((weights.image_id, True) for weights in kept), *((image_id, False) for image_id in coming)]

    def idle(self) -> list[DeviceWeights]:
        """What nobody uses, though some may wait, and is not asked to go yet."""
        leaving = {(drop.message.digest, drop.message.image_id, drop.message.device) for drop in self._drops.values()}
        return [
            each
            for each, _ in self._kept.values()
            if self._users.get((each.digest, each.device), set()) <= self._waiting
            and (each.digest, each.image_id, each.device) not in leaving
        ]

    def given_back(self) -> list[tuple[Descriptors, int]]:
        """What a new store gets: one message, and its descriptor, per weights."""
        return [(Descriptors(what="device", weights=weights), fd) for weights, fd in self._kept.values()]

    def users(self, digest: str) -> tuple[str, ...]:
        return tuple(sorted({user for (held, _), users in self._users.items() if held == digest for user in users}))

    def hold(self, digest: str, devices: Iterable[int], user: str, engine_bytes: int, *, waits: bool = False) -> None:
        """Count a user of weights, whose KV cache and steps take so much of each device beside them. One that ``waits`` does
        not use what lies there until it asks for a `fill`."""
        if waits:
            self._waiting.add(user)
        for device in devices:
            self._kv.setdefault(device, {})[user] = engine_bytes
            self._say(self._reserved(device))
            self._users.setdefault((digest, device), set()).add(user)
            self._say(self._held(digest, device))
        self._changed(digest)

    def release(self, digest: str, devices: Iterable[int], user: str) -> None:
        """The user is gone; its weights stay until the memory is needed."""
        self._waiting.discard(user)
        for device in devices:
            self._users.get((digest, device), set()).discard(user)
            self._say(self._held(digest, device))
            if not self._users.get((digest, device)):
                self._users.pop((digest, device), None)
            self._kv.get(device, {}).pop(user, None)
            self._say(self._reserved(device))
        self._changed(digest)

    def fill(
        self,
        digest: str,
        directory: str,
        devices: tuple[int, ...],
        answered: Callable[[OnDevice | Fault], None],
        progress: Callable[[Progress], None],
        *,
        user: str,
        priority: Priority = Priority.REQUEST,
        image_id: str = "",
    ) -> str:
        """Ask for weights on devices, after `hold`; answered once, now or later, unless it is withdrawn. Those of another image
        that lie there give way, if nobody uses them. Returns its op."""
        for weights in self.idle():
            here = weights.digest == digest and weights.device in devices
            if here and image_id and weights.image_id != image_id:
                self.let_go(weights)
        self._waiting.discard(user)
        op = f"device {secrets.token_hex(8)}"
        users = self._most(digest, devices)
        message = FillDevice(
            op=op, digest=digest, directory=directory, image_id=image_id, devices=devices, users=users, priority=priority
        )
        self._fills[op] = _Fill(message, answered, progress)
        self._say(message)
        self._changed(digest)
        return op

    def withdraw(self, op: str) -> None:
        """Nobody waits for this fill any more; without a user the store gives it up."""
        if (fill := self._fills.pop(op, None)) is not None:
            self._changed(fill.message.digest)

    def drop(self, op: str, digest: str, answered: Callable[[Fault | None], None]) -> None:
        """Free weights where nobody uses them; answered once."""
        self._drop(DropDevice(op=op, digest=digest), answered)

    def let_go(self, weights: DeviceWeights) -> None:
        """Free weights that are `idle`; nothing is answered."""
        digest, image_id, device = weights.digest, weights.image_id, weights.device
        op = f"drop {image_id} of {digest} on {device}"
        self._drop(DropDevice(op=op, digest=digest, image_id=image_id, device=device), lambda fault: None)

    def _drop(self, message: DropDevice, answered: Callable[[Fault | None], None]) -> None:
        self._drops[message.op] = _Drop(message, answered)
        self._say(message)

    def descriptor(self, weights: DeviceWeights) -> int:
        """The descriptor of weights, which stays here. Raises NotFound when they have gone."""
        kept = self._kept.get(weights.id)
        if kept is None:
            raise NotFound(f"the weights of {weights.digest} have left device {weights.device}")
        return kept[1]

    def placements(self, digest: str, image_bytes: int) -> list[Placement]:
        """Where a checkpoint lies, or is being loaded, among the devices."""
        found = {
            weights.device: Placement(
                tier=Tier.DEVICE,
                state=TierState.RESIDENT,
                size_bytes=weights.image_bytes,
                users=len(self._users.get((digest, weights.device), ())),
                device=weights.device,
            )
            for weights, _ in self._kept.values()
            if weights.digest == digest
        }
        for fill in self._fills.values():
            for device in fill.message.devices:
                if fill.message.digest == digest and device not in found:
                    users = len(self._users.get((digest, device), ()))
                    found[device] = Placement(
                        tier=Tier.DEVICE, state=TierState.FILLING, size_bytes=image_bytes, users=users, device=device
                    )
        return [found[device] for device in sorted(found)]

    def close(self) -> None:
        """Let go of everything; a device's memory is free when the store and the workers have gone too."""
        for _, descriptor in self._kept.values():
            os.close(descriptor)
        self._kept.clear()

    # --- what the store says

    def keep(self, weights: DeviceWeights, descriptor: int) -> None:
        """Weights were loaded, or are offered to an agent that lacks them; the descriptor is this side's now."""
        if (known := self._kept.pop(weights.id, None)) is not None:
            os.close(known[1])
        self._kept[weights.id] = weights, descriptor
        self._changed(weights.digest)

    def truth(self, message: StoreTruth) -> None:
        """Agree with a store that has stated all that it holds: let go of the rest, say who uses what and what is wanted."""
        stated = {weights.id for weights in message.weights}
        for name in [name for name in self._kept if name not in stated]:
            self._let_go(name)
        for name in message.evicting:
            self._say(ReleasedDevice(id=name))
        for device in self._kv:
            self._say(self._reserved(device))
        lying = {(weights.digest, weights.device) for weights in message.weights}
        for digest, device in sorted({*self._users, *lying}):
            self._say(self._held(digest, device))
        for drop in self._drops.values():  # before the fills: what one brings may take the place of what leaves
            self._say(drop.message)
        for fill in self._fills.values():
            if fill.message.op not in message.filling:
                users = self._most(fill.message.digest, fill.message.devices)
                self._say(msgspec.structs.replace(fill.message, users=users))

    def evicted(self, message: EvictedDevice) -> None:
        kept = self._kept.get(message.id)
        self._let_go(message.id)
        self._say(ReleasedDevice(id=message.id))
        if kept is not None and message.why:
            weights = kept[0]
            told = f"from device {weights.device}, {weights.size_bytes} bytes: {message.why}"
            self._happened(NodeEvent(reason="Evicted", message=told, digest=weights.digest, for_digest=message.for_digest))

    def on_device(self, message: OnDevice) -> None:
        if (fill := self._fills.pop(message.op, None)) is not None:
            self._changed(message.digest)
            fill.answered(message)

    def progress(self, message: Progress) -> bool:
        """True if it was of a fill here."""
        fill = self._fills.get(message.op)
        if fill is not None:
            fill.progress(message)
        return fill is not None

    def done(self, message: OperationDone) -> str:
        """A fill has failed or a drop has ended; the digest of a failed fill, else ""."""
        if (drop := self._drops.pop(message.op, None)) is not None:
            drop.answered(message.fault)
        fill = self._fills.pop(message.op, None)
        if fill is None:
            return ""
        self._changed(fill.message.digest)
        fill.answered(message.fault or Fault.of(SllmError("the store ended a load without saying where the weights lie")))
        return fill.message.digest

    def lost(self) -> None:
        """The store's link broke: fills are asked for again, unless they may be what kills it."""
        for op, fill in list(self._fills.items()):
            fill.losses += 1
            if (fault := given_up(fill.losses, "loading")) is not None:
                del self._fills[op]
                fill.answered(fault)

    def _let_go(self, name: str) -> None:
        kept = self._kept.pop(name, None)
        if kept is not None:
            os.close(kept[1])
            self._changed(kept[0].digest)

    def _held(self, digest: str, device: int) -> HoldDevice:
        return HoldDevice(digest=digest, device=device, users=len(self._users.get((digest, device), ())))

    def _reserved(self, device: int) -> ReserveDevice:
        return ReserveDevice(device=device, size_bytes=sum(self._kv.get(device, {}).values()))

    def _most(self, digest: str, devices: tuple[int, ...]) -> int:
        return max(len(self._users.get((digest, device), ())) for device in devices)
