"""The device tier: which weights lie on which device, who uses them, what is loaded, what goes when memory is needed.

Weights are one allocation per checkpoint and device. The store holds them by descriptor, not by mapping: a worker maps them,
the agent keeps duplicates, and whoever dies takes nothing with it. So memory that is evicted is free only when the agent has
let go of it too, which it is asked to and says; until then what needs the room waits.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from agent.native.copier import Copier, Slice, Target
from agent.native.device import DeviceMemory, Driver
from agent.native.pinned import HostMemory
from agent.native.reader import Priority
from agent.store.cache import ArenaStore
from agent.store.catalog import CatalogEntry
from agent.store.device_load import DeviceLoad
from agent.store.fills import clash, read_copy
from agent.store.residency import OF_NO_USE
from agent.store.streaming import Streams
from schema.errors import Cancelled, Conflict, Fault, InvalidCheckpoint, InvalidInput, NotFound, OutOfSpace, SllmError
from schema.link import DeviceWeights
from schema.states import Tier

__all__ = ["DeviceListener", "DeviceStore"]

_PROGRESS_S: Final = 0.1
_GRANULARITY: Final = 2 << 20
_MAKE_ROOM: Final = "to make room"
_log = logging.getLogger(__name__)


class DeviceListener(Protocol):
    """Who hears of the device tier. Every op hears how far it is and then exactly one `on_device` or `failed`."""

    def copying(self, op: str, done_bytes: int, total_bytes: int, source: Tier) -> None:
        """So much has reached its devices; ``source`` is the tier that it comes from."""

    def failed(self, op: str, digest: str, fault: Fault) -> None: ...

    def loaded(self, weights: DeviceWeights, descriptor: int) -> None:
        """These weights lie whole on their device. The descriptor stays the store's; said before any `on_device` of them."""

    def on_device(self, op: str, digest: str, weights: tuple[DeviceWeights, ...], source: Tier, read_bytes: int) -> None: ...

    def evicting(self, weights: DeviceWeights, why: str, for_digest: str) -> None:
        """To be answered by `DeviceStore.released`, when no descriptor of these is held any more. ``why`` they go, "" if their
        checkpoint was asked to, and for which other checkpoint if it is for one."""

    def layers_usable(self, digest: str, count: int) -> None:
        """The first ``count`` layers of weights that are being loaded are there. Said on the copying thread."""


@dataclass(eq=False, slots=True)
class _Weights:
    id: str
    digest: str
    device: int
    image_id: str
    size_bytes: int
    image_bytes: int
    descriptor: int
    users: int = 0
    stamp: int = 0

    def told(self) -> DeviceWeights:
        return DeviceWeights(
            id=self.id,
            digest=self.digest,
            device=self.device,
            image_id=self.image_id,
            size_bytes=self.size_bytes,
            image_bytes=self.image_bytes,
            users=self.users,
        )


@dataclass(eq=False, slots=True)
class _Load:
    """Weights on their way to devices; without a ``load`` it waits for room. ``memory`` is allocated once there is room."""

    entry: CatalogEntry
    devices: tuple[int, ...]
    priority: Priority
    memory: dict[int, DeviceMemory] = field(default_factory=dict)
    load: DeviceLoad | None = None
    given_up: bool = False
    told_at: float = 0.0
    told_bytes: int = -1

    @property
    def digest(self) -> str:
        return self.entry.digest

    def raise_to(self, priority: Priority) -> None:
        self.priority = min(self.priority, priority)
        if self.load is not None:
            self.load.raise_to(priority)

    @property
    def size_bytes(self) -> int:
        return -(-self.entry.manifest.image_bytes // _GRANULARITY) * _GRANULARITY


@dataclass(slots=True)
class _Asked:
    digest: str
    image_id: str
    directory: Path
    devices: tuple[int, ...]
    priority: Priority
    source: Tier = Tier.DEVICE
    read_bytes: int = 0


class DeviceStore:
    """The device tier over a driver, above the DRAM tier. One thread calls it; ``wake`` says that `pump` has something to do.

    ``budgets`` are the bytes that weights and KV caches may take of each device.
    """

    def __init__(
        self,
        driver: Driver,
        budgets: dict[int, int],
        arena: ArenaStore,
        host: tuple[tuple[int, int], ...],
        listener: DeviceListener,
        wake: Callable[[], None],
    ) -> None:
        self._driver = driver
        self._budgets = budgets
        self._arena = arena
        self._listener = listener
        self._wake = wake
        self._woken_at = 0.0
        memory = HostMemory(driver)
        for address, size_bytes in host:
            memory.add(address, size_bytes)
        self._copier = Copier(driver, memory)
        self._streams = Streams(arena.pool, self._copier, memory)
        self._weights: dict[tuple[str, int], _Weights] = {}
        self._evicting: dict[str, _Weights] = {}
        self._loads: list[_Load] = []
        self._asked: dict[str, _Asked] = {}
        self._reserved: dict[int, int] = {}
        self._users: dict[tuple[str, int], int] = {}
        self._stamp = 0

    @property
    def weights(self) -> tuple[DeviceWeights, ...]:
        return tuple(weights.told() for weights in self._weights.values())

    @property
    def evicting(self) -> tuple[str, ...]:
        """What the agent still has to let go of."""
        return tuple(self._evicting)

    @property
    def filling(self) -> tuple[str, ...]:
        """The ops that wait for an answer."""
        return tuple(self._asked)

    def descriptor(self, id: str) -> int | None:  # noqa: A002 - the message's word
        """The descriptor of weights that are resident or being evicted."""
        every = (*self._weights.values(), *self._evicting.values())
        return next((weights.descriptor for weights in every if weights.id == id), None)

    def adopt(self, told: DeviceWeights, descriptor: int) -> bool:
        """Take back what an earlier store left; True if it is resident here now. Takes the descriptor over."""
        key = told.digest, told.device
        known = self._weights.get(key)
        if known is not None or told.device not in self._budgets:
            os.close(descriptor)
            return known is not None and known.id == told.id
        self._weights[key] = _Weights(told.id, *key, told.image_id, told.size_bytes, told.image_bytes, descriptor)
        self._use(self._weights[key])
        return True

    def reserve(self, device: int, size_bytes: int) -> None:
        """Say how much of a device's memory KV caches may take now; idle weights make room for it."""
        if device not in self._budgets:
            return  # what is asked of such a device fails by its own answer
        self._reserved[device] = size_bytes
        self._evict(device, self._over(device, 0), "to make room for KV caches")
        self._settle()

    def fill(
        self,
        op: str,
        digest: str,
        directory: Path,
        devices: tuple[int, ...],
        users: int,
        priority: Priority,
        image_id: str = "",
    ) -> None:
        """Bring weights onto devices, each held by ``users`` from now on; those that are there, or under way, are not loaded
        again, and every ``op`` is answered."""
        if unknown := [device for device in devices if device not in self._budgets]:
            fault = Fault.of(InvalidInput(f"this store has no device {unknown[0]}"))
            self._listener.failed(op, digest, fault)
            return
        self._asked[op] = _Asked(digest, image_id, directory, devices, priority)
        for device in devices:
            self.hold(digest, device, users)
        for load in self._loads:
            if load.digest == digest and set(devices) & set(load.devices):
                load.raise_to(priority)
        self._settle()

    def follow(self, entry: CatalogEntry, devices: tuple[int, ...]) -> None:
        """Take a checkpoint that is coming into the arena from elsewhere to devices as it comes, where somebody uses it and
        nothing else brings it; whoever asks for it later finds it there, or under way."""
        wanted = [device for device in devices if (entry.digest, device) in self._users and device in self._budgets]
        missing = [
            each for each in wanted if (entry.digest, each) not in self._weights and not self._underway(entry.digest, each)
        ]
        if missing:
            self._loads.append(_Load(entry, tuple(missing), Priority.REQUEST))
            self._settle()

    def hold(self, digest: str, device: int, users: int) -> None:
        """Say how many use weights; they may be evicted only at 0, and a load that nobody waits for is given up."""
        self._users[digest, device] = users
        if not users:
            del self._users[digest, device]
        if (weights := self._weights.get((digest, device))) is not None:
            self._use(weights)
        for load in list(self._loads):
            wanted = any((digest, each) in self._users for each in load.devices)
            if load.digest == digest and not wanted and not load.given_up:
                self._give_up(load)

    def let_go(self, digest: str, image_id: str, device: int) -> None:
        """Free weights that are of no use any more: who is counted there waits for others. Raises NotFound."""
        weights = self._weights.get((digest, device))
        if weights is None or weights.image_id != image_id:
            raise NotFound(f"image {image_id} of checkpoint {digest} is not on device {device}")
        self._drop(weights, OF_NO_USE)

    def drop(self, digest: str) -> None:
        """Free weights on the devices where nobody uses them. Raises Conflict where all are used, NotFound."""
        lying = [each for each in self._weights.values() if each.digest == digest]
        if not lying and any(load.digest == digest for load in self._loads):
            raise Conflict(f"checkpoint {digest} is just being loaded; stop what waits for it, then drop it")
        if not lying:
            raise NotFound(f"checkpoint {digest} is on no device of this node")
        idle = [weights for weights in lying if not weights.users]
        if not idle:
            raise Conflict(f"checkpoint {digest} has users on every device that it lies on; stop its instances first")
        for weights in idle:
            self._drop(weights)

    def released(self, id: str) -> None:  # noqa: A002 - the message's word
        """The agent holds these no more: their memory is free."""
        if (weights := self._evicting.pop(id, None)) is not None:
            os.close(weights.descriptor)
            self._settle()

    def pump(self) -> None:
        """Tell the listener what the background has done since the last call. After `ArenaStore.pump`."""
        now = time.monotonic()
        for load in list(self._loads):
            if load.load is None:
                continue
            if load.load.pump():
                self._end(load, load.load)
            elif now - load.told_at >= _PROGRESS_S and load.told_bytes != load.load.done_bytes:
                self._tell(load, now, load.load.done_bytes)
        self._settle()

    def close(self) -> None:
        """Stop the background work; what lies on devices stays for the next life, by the agent's descriptors."""
        for load in self._loads:
            if load.load is not None:
                load.load.cancel()
        self._copier.close()
        for load in self._loads:
            self._free(load)
        self._loads.clear()
        for weights in (*self._weights.values(), *self._evicting.values()):
            os.close(weights.descriptor)
        self._weights.clear()
        self._evicting.clear()

    # --- what was asked

    def _settle(self) -> None:
        """Answer what can be answered, begin what can begin."""
        for op, asked in list(self._asked.items()):
            if op not in self._asked:
                continue
            if (fault := self._clash(asked)) is not None:
                del self._asked[op]
                self._listener.failed(op, asked.digest, Fault.of(fault))
                continue
            missing = [device for device in asked.devices if (asked.digest, device) not in self._weights]
            if missing:
                self._ensure(asked, [device for device in missing if not self._underway(asked.digest, device)])
            elif not any(weights.device in asked.devices for weights in self._evicting.values()):
                self._answer(op, asked)
        for load in list(self._loads):
            if load.load is None and not load.given_up and load in self._loads:
                self._try(load)

    def _clash(self, asked: _Asked) -> SllmError | None:
        coming = [
            (load.entry.manifest.image_id, load.devices)
            for load in self._loads
            if load.digest == asked.digest and not load.given_up
        ]
        lying = [(each.image_id, (each.device,)) for each in self._weights.values() if each.digest == asked.digest]
        found = [clash(asked.digest, here, asked.image_id) for here, devices in coming + lying if {*devices} & {*asked.devices}]
        return next((fault for fault in found if fault is not None), None)

    def _underway(self, digest: str, device: int) -> bool:
        return any(load.digest == digest and device in load.devices for load in self._loads)

    def _ensure(self, asked: _Asked, devices: list[int]) -> None:
        if not devices:
            return
        try:
            entry = read_copy(asked.directory, asked.digest, asked.image_id)
            if entry.quarantined is not None and not self._arena.has_sound(asked.digest, entry.manifest.image_id):
                raise InvalidCheckpoint(f"{asked.directory} is quarantined: {entry.quarantined}")
        except SllmError as error:
            self._fail(asked.digest, tuple(devices), error)
            return
        self._loads.append(_Load(entry, tuple(devices), asked.priority))

    def _answer(self, op: str, asked: _Asked) -> None:
        del self._asked[op]
        lying = tuple(self._weights[asked.digest, device].told() for device in asked.devices)
        over = [device for device in asked.devices if self._over(device, 0) > 0]
        if over:
            error = OutOfSpace(f"device {over[0]} has no room for the KV caches beside the weights in use there")
            self._listener.failed(op, asked.digest, Fault.of(error))
        else:
            self._listener.on_device(op, asked.digest, lying, asked.source, asked.read_bytes)

    # --- loads

    def _try(self, load: _Load) -> None:
        """Begin a load if there is room on all its devices; make room if that is possible; else it fails."""
        try:
            short = {device: self._over(device, load.size_bytes) for device in load.devices}
            waits = False
            for device, missing in short.items():
                coming = self._coming(device)
                if missing > coming + self._idle(device):
                    raise OutOfSpace(self._full(device, load))
                self._evict(device, missing - coming, _MAKE_ROOM, load.digest)
                waits = waits or missing > 0
            if not waits:
                waits = not self._allocate(load)
            if waits:
                return
            targets = tuple(Target(memory, (Slice(0, load.entry.manifest.image_bytes, 0),)) for memory in load.memory.values())
            load.load = DeviceLoad(
                load.entry, targets, self._arena, self._copier, self._streams, load.priority, self._woken,
                lambda count: self._listener.layers_usable(load.digest, count),
            )  # fmt: skip
            self._tell(load, time.monotonic(), 0)
        except SllmError as error:
            self._loads.remove(load)
            self._free(load)
            self._fail(load.digest, load.devices, error)

    def _allocate(self, load: _Load) -> bool:
        """Memory on every device, or none: False when some must become free first, of that which others have taken unseen."""
        for device in load.devices:
            try:
                load.memory[device] = self._driver.allocate(device, load.entry.manifest.image_bytes)
            except OutOfSpace:
                self._free(load)
                if not self._coming(device) and not self._evict(device, load.size_bytes, _MAKE_ROOM, load.digest):
                    raise
                return False
            except SllmError:
                self._free(load)
                raise
        return True

    def _end(self, load: _Load, done: DeviceLoad) -> None:
        self._loads.remove(load)
        error = done.error
        if error is None:
            try:
                self._keep(load)
            except SllmError as refused:
                error = refused
        self._free(load)
        if error is not None:
            if not load.given_up:
                self._fail(load.digest, load.devices, error)
            return
        self._tell(load, time.monotonic(), done.image_bytes)
        for asked in self._asked.values():
            if asked.digest == load.digest and set(asked.devices) & set(load.devices):
                asked.source = done.source
                asked.read_bytes = done.read_bytes

    def _keep(self, load: _Load) -> None:
        """From mappings to descriptors: what is loaded is held for whoever comes."""
        exported: dict[int, int] = {}
        try:
            for device, memory in load.memory.items():
                exported[device] = self._driver.export(memory)
        except SllmError:
            for descriptor in exported.values():
                os.close(descriptor)
            raise
        for device, descriptor in exported.items():
            memory = load.memory[device]
            image_bytes = load.entry.manifest.image_bytes
            name = secrets.token_hex(16)
            image_id = load.entry.manifest.image_id
            weights = _Weights(name, load.digest, device, image_id, memory.size_bytes, image_bytes, descriptor)
            self._weights[load.digest, device] = weights
            self._use(weights)
            self._listener.loaded(weights.told(), descriptor)

    def _give_up(self, load: _Load) -> None:
        load.given_up = True
        if load.load is None:
            self._loads.remove(load)
        else:
            load.load.cancel()
        self._fail(load.digest, load.devices, Cancelled(f"nobody waits for checkpoint {load.digest} any more"))

    def _free(self, load: _Load) -> None:
        for memory in load.memory.values():
            self._driver.free(memory)
        load.memory.clear()

    def _fail(self, digest: str, devices: tuple[int, ...], error: SllmError) -> None:
        for op, asked in list(self._asked.items()):
            if asked.digest == digest and set(asked.devices) & set(devices):
                del self._asked[op]
                self._listener.failed(op, digest, Fault.of(error))

    def _tell(self, load: _Load, now: float, done_bytes: int) -> None:
        load.told_at, load.told_bytes = now, done_bytes
        for op, asked in self._asked.items():
            if asked.digest == load.digest and set(asked.devices) & set(load.devices):
                source = load.load.source if load.load is not None else Tier.DISK
                self._listener.copying(op, done_bytes, load.entry.manifest.image_bytes, source)

    # --- room

    def _over(self, device: int, size_bytes: int) -> int:
        """By how much the device is short when so much more is put there; what is being evicted still counts."""
        lying = sum(each.size_bytes for each in (*self._weights.values(), *self._evicting.values()) if each.device == device)
        loading = sum(load.size_bytes for load in self._loads if device in load.memory)
        return lying + loading + self._reserved.get(device, 0) + size_bytes - self._budgets[device]

    def _coming(self, device: int) -> int:
        """What will be free in a moment: evicted weights that the agent still holds, loads that were given up."""
        evicted = sum(each.size_bytes for each in self._evicting.values() if each.device == device)
        return evicted + sum(load.size_bytes for load in self._loads if load.given_up and device in load.memory)

    def _idle(self, device: int) -> int:
        return sum(each.size_bytes for each in self._weights.values() if each.device == device and not each.users)

    def _evict(self, device: int, size_bytes: int, why: str, for_digest: str = "") -> int:
        """Let idle weights go, those first that were used longest ago, until so much will be free. Returns how much will."""
        freed = 0
        idle = [each for each in self._weights.values() if each.device == device and not each.users]
        for weights in sorted(idle, key=lambda each: each.stamp):
            if freed >= size_bytes:
                break
            freed += weights.size_bytes
            self._drop(weights, why, for_digest)
        return freed

    def _drop(self, weights: _Weights, why: str = "", for_digest: str = "") -> None:
        del self._weights[weights.digest, weights.device]
        self._evicting[weights.id] = weights
        self._listener.evicting(weights.told(), why, for_digest)

    def _full(self, device: int, load: _Load) -> str:
        budget = self._budgets[device]
        room = -self._over(device, 0) + self._idle(device) + self._coming(device)
        return (
            f"device {device} has no room for {load.size_bytes} bytes of weights: of {budget} bytes {max(0, room)} are free or "
            f"idle, {self._reserved.get(device, 0)} are set aside for KV caches; stop an instance there"
        )

    def _use(self, weights: _Weights) -> None:
        self._stamp += 1
        weights.users, weights.stamp = self._users.get((weights.digest, weights.device), 0), self._stamp

    def _woken(self, finished: bool) -> None:
        """On other threads: wakes the owner at the end of something, and now and then before it."""
        now = time.monotonic()
        if finished or now - self._woken_at >= _PROGRESS_S:
            self._woken_at = now
            self._wake()
