"""Agents that keep their word: lives by epoch, operations by id, weights that stay, and never more on a device than fits."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from schema.errors import Fault
from schema.ids import Epoch
from schema.link import (
    ArenaInfo,
    CancelOperation,
    CheckpointTruth,
    DeviceInfo,
    DropCheckpoint,
    Fetch,
    Ingest,
    InstanceTruth,
    InstanceUpdate,
    Inventory,
    LoadCheckpoint,
    ManagerMessage,
    NodeTruth,
    OperationDone,
    OperationsAcked,
    Placement,
    PlacementUpdate,
    Publish,
    SetPins,
    StartInstance,
    StartPhases,
    StopInstance,
    VerifyCheckpoint,
)
from schema.states import InstanceState, Tier, TierState

__all__ = ["MIB", "Agent", "digest_of"]

MIB = 1 << 20
_I = InstanceState
Said = InstanceUpdate | PlacementUpdate | OperationDone


def digest_of(name: str) -> str:
    return (name.encode().hex() * 64)[:64]


def name_of(digest: str) -> str:
    """The name that `digest_of` made this of."""
    text = bytes.fromhex(digest).decode()
    return next(text[:size] for size in range(1, 33) if (text[:size] * 32)[:32] == text)


@dataclass
class Agent:
    """A node. Where ``kind`` is not "cpu", weights lie on its devices beside KV caches until they are dropped, and its DRAM
    keeps what was loaded. ``automatic``: starts, drains and operations succeed as soon as they are asked for."""

    name: str
    device_mib: int = 25
    arena_mib: int = 1000
    connected: bool = False
    checkpoints: dict[str, CheckpointTruth] = field(default_factory=dict)
    lives: dict[str, InstanceTruth] = field(default_factory=dict)
    starts: dict[str, StartInstance] = field(default_factory=dict)
    ops: dict[str, Ingest | DropCheckpoint | LoadCheckpoint | VerifyCheckpoint | Publish | Fetch] = field(default_factory=dict)
    done: dict[str, OperationDone] = field(default_factory=dict)
    heard: list[ManagerMessage] = field(default_factory=list)
    automatic: bool = True
    kind: str = "cpu"
    devices: int = 1
    weights: dict[tuple[str, int], int] = field(default_factory=dict)
    """Bytes by checkpoint and device."""
    dram: dict[str, None] = field(default_factory=dict)
    numerics: str = "torch"
    """"" while its zygote imports."""

    phases: StartPhases | None = None
    """What every start states to have measured."""

    pins: set[tuple[str, Tier]] = field(default_factory=set)

    def truth(self) -> NodeTruth:
        devices = range(self.devices)
        inventory = Inventory(
            hostname=self.name,
            cpus=4,
            memory_bytes=1 << 34,
            devices=tuple(DeviceInfo(index=at, kind=self.kind, name="", memory_bytes=self.device_mib * MIB) for at in devices),
            arena=ArenaInfo(id="a", budget_bytes=self.arena_mib * MIB, chunk_bytes=2 * MIB),
            numerics=self.numerics,
        )
        return NodeTruth(
            node=self.name,
            inventory=inventory,
            checkpoints=tuple(self.checkpoints.values()),
            instances=tuple(self.lives.values()),
            ops=tuple(self.ops),
            done=tuple(self.done.values()),
        )

    def hold(self, name: str, *, image_mib: int = 8, dram: bool = False) -> None:
        """Have the checkpoint of a model on disk."""
        digest = digest_of(name)
        disk = Placement(tier=Tier.DISK, state=TierState.RESIDENT, size_bytes=image_mib * MIB)
        self.checkpoints[digest] = CheckpointTruth(
            digest=digest,
            architecture="Tiny",
            image_bytes=image_mib * MIB,
            kv_token_bytes=1024,
            max_context_tokens=512,
            placements=(disk,),
        )
        if dram:
            self.dram[digest] = None
            self._restate(digest)

    def forget(self) -> None:
        """It was restarted: what only processes and memory held is gone."""
        for holding in (self.lives, self.ops, self.weights, self.dram):
            holding.clear()
        for digest in list(self.checkpoints):
            self._restate(digest)

    def used_bytes(self, device: int) -> int:
        """KV caches of its lives, and weights."""
        lives = [self.starts[one] for one, life in self.lives.items() if life.state is not _I.STOPPED]
        kv = sum(start.options.kv_bytes for start in lives if device in start.devices)
        return kv + sum(size for (_, where), size in self.weights.items() if where == device)

    def users(self, digest: str, device: int | None = None) -> int:
        lives = [life for life in self.lives.values() if life.digest == digest and life.state is not _I.STOPPED]
        return sum(device is None or device in life.devices for life in lives)

    def _restate(self, digest: str) -> PlacementUpdate:
        placements = [one for one in self.checkpoints[digest].placements if one.tier is Tier.DISK]
        image_bytes = self.checkpoints[digest].image_bytes
        if digest in self.dram:
            placements.append(
                Placement(tier=Tier.DRAM, state=TierState.RESIDENT, size_bytes=image_bytes, users=self.users(digest))
            )
        ready = {device for life in self.lives.values() if life.state is _I.STARTING for device in life.devices}
        for (other, device), size in self.weights.items():
            if other == digest:
                users = self.users(digest, device)
                state = TierState.FILLING if device in ready and users == 1 else TierState.RESIDENT
                placements.append(Placement(tier=Tier.DEVICE, state=state, size_bytes=size, users=users, device=device))
        truth = msgspec.structs.replace(self.checkpoints[digest], placements=tuple(placements))
        if placements:
            self.checkpoints[digest] = truth
        else:
            del self.checkpoints[digest]
        return PlacementUpdate(truth=truth)

    def hear(self, message: ManagerMessage) -> list[Said]:
        self.heard.append(message)
        match message:
            case StartInstance():
                return self._start(message)
            case StopInstance(instance=instance, epoch=epoch, grace_s=grace_s):
                return self._stop(instance, epoch, grace_s)
            case (
                Ingest(op=op)
                | DropCheckpoint(op=op)
                | LoadCheckpoint(op=op)
                | VerifyCheckpoint(op=op)
                | Publish(op=op)
                | Fetch(op=op)
            ):
                if op in self.done:
                    return [self.done[op]]
                self.ops[op] = message
                return self.finish(op) if self.automatic else []
            case SetPins(pins=pins):
                self.pins = {(pin.digest, pin.tier) for pin in pins}
                return []
            case CancelOperation(op=op):
                return self.finish(op, Fault("cancelled", "it was cancelled")) if op in self.ops else []
            case OperationsAcked(ops=ops):
                for op in ops:
                    self.done.pop(op, None)
                return []
            case _:
                raise AssertionError(f"the loop never says {message}")

    def finish(self, op: str, fault: Fault | None = None) -> list[Said]:
        """End an operation, well or with a fault."""
        asked = self.ops.pop(op)
        update: list[Said] = []
        name = asked.source.path.rsplit("/", 1)[1] if isinstance(asked, Ingest) else ""  # type: ignore[union-attr]
        digest = digest_of(name) if isinstance(asked, Ingest) else asked.digest
        if fault is None and isinstance(asked, LoadCheckpoint) and digest not in self.checkpoints:
            fault = Fault("not_found", "it is not here")
        if fault is None:
            match asked:
                case Ingest():
                    if digest not in self.checkpoints:
                        self.hold(name)
                    update.append(PlacementUpdate(truth=self.checkpoints[digest]))
                case Fetch():
                    if digest not in self.checkpoints:
                        self.hold(name_of(digest))
                    update.append(PlacementUpdate(truth=self.checkpoints[digest]))
                case LoadCheckpoint(tier=Tier.DEVICE, device=device):
                    self.weights[digest, device] = self.checkpoints[digest].image_bytes
                    update.append(self._restate(digest))
                case LoadCheckpoint():
                    self.dram[digest] = None
                    assert self.dram_bytes() <= self.arena_mib * MIB, "a load ahead of need puts nothing out"
                    update.append(self._restate(digest))
                case DropCheckpoint(tier=tier):
                    fault = self._drop(digest, tier)
                    if fault is None:
                        update.append(self._restate(digest))
        layout = "exec1" if fault is None and isinstance(asked, Publish | Fetch) else ""
        self.done[op] = OperationDone(op=op, digest=digest if fault is None else "", fault=fault, layout=layout)
        return [*update, self.done[op]]

    def _drop(self, digest: str, tier: Tier) -> Fault | None:
        """From devices, where nobody uses it; from other tiers, if nobody does."""
        if digest not in self.checkpoints:
            return Fault("not_found", "it is not here")
        match tier:
            case Tier.DEVICE:
                there = [key for key in self.weights if key[0] == digest]
                idle = [key for key in there if not self.users(*key)]
                for key in idle:
                    del self.weights[key]
                return None if idle or not there else Fault("conflict", "it has users")
            case Tier.DRAM:
                self.dram.pop(digest, None)
            case _:
                truth = self.checkpoints[digest]
                left = tuple(one for one in truth.placements if one.tier is not tier)
                self.checkpoints[digest] = msgspec.structs.replace(truth, placements=left)
        return None

    def dram_bytes(self) -> int:
        return sum(self.checkpoints[digest].image_bytes for digest in self.dram)

    def _start(self, message: StartInstance) -> list[Said]:
        known = self.lives.get(message.instance)
        if known is not None and known.epoch >= message.epoch:
            return []
        if message.digest not in self.checkpoints:
            assert message.remote is not None, "nobody starts what is nowhere"
            self.hold(name_of(message.digest))
        self.lives[message.instance] = InstanceTruth(
            instance=message.instance,
            epoch=message.epoch,
            digest=message.digest,
            state=_I.STARTING,
            devices=message.devices,
        )
        self.starts[message.instance] = message
        if self.kind != "cpu":
            self._load(message)
        for device in message.devices:
            used = self.used_bytes(device)
            assert used <= self.device_mib * MIB, f"{self.name}/{device}: asked for {used / MIB:g} of {self.device_mib} MiB"
        if self.automatic:
            return self.become(message.instance, _I.READY)
        return [self._restate(message.digest)] if self.kind != "cpu" else []

    def _load(self, start: StartInstance) -> None:
        share = -(-self.checkpoints[start.digest].image_bytes // len(start.devices))
        if all((start.digest, device) in self.weights for device in start.devices):
            return
        for device in start.devices:
            self.weights[start.digest, device] = share
        self.dram[start.digest] = None
        for digest in [one for one in self.dram if not self.users(one)]:
            if self.dram_bytes() > self.arena_mib * MIB:
                del self.dram[digest]
        assert self.dram_bytes() <= self.arena_mib * MIB

    def _stop(self, instance: str, epoch: Epoch, grace_s: float) -> list[Said]:
        life = self.lives.get(instance)
        if life is None or life.epoch != epoch:
            return [InstanceUpdate(truth=InstanceTruth(instance=instance, epoch=epoch, digest="", state=_I.STOPPED))]
        if grace_s and not self.automatic and life.state is not _I.STOPPED:
            return self.become(instance, _I.DRAINING)
        said = self.become(instance, _I.STOPPED)
        del self.lives[instance]
        return said

    def become(self, instance: str, state: InstanceState, fault: Fault | None = None, remote: str = "") -> list[Said]:
        """A life changes; a stopped one is stated until the manager has heard of it and said so."""
        ready = state is _I.READY
        life = msgspec.structs.replace(
            self.lives[instance],
            state=state,
            fault=fault,
            remote=remote,
            kv_capacity_tokens=4096 if ready else 0,
            max_context_tokens=512,
            pid=77,
            phases=self.phases if ready else self.lives[instance].phases,
        )
        self.lives[instance] = life
        update = InstanceUpdate(truth=life)
        if self.kind != "cpu" and life.digest in self.checkpoints and state in (_I.READY, _I.STOPPED):
            return [self._restate(life.digest), update]
        return [update]
