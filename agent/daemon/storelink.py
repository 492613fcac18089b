"""The agent's side of the store's link: the arena it keeps, what lies in it, and the fills and drops not yet answered."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from agent.daemon.connection import Connection
from agent.daemon.devicetier import DeviceTier
from agent.daemon.holds import Holds
from agent.daemon.losses import Place, StoreLosses, given_up
from agent.daemon.supervisor import Kin
from agent.native.jobs import Priority
from agent.native.mapping import read_only
from schema.errors import Fault, LinkError, SllmError, Unreachable
from schema.link import (
    ArenaInfo,
    ArenaState,
    Arriving,
    CancelFetch,
    CancelVerify,
    Descriptors,
    DeviceWeights,
    DropResident,
    Evicted,
    EvictedDevice,
    Fetching,
    FetchStored,
    FillArena,
    Hello,
    HoldCheckpoint,
    LayersArrived,
    Message,
    NodeEvent,
    OnDevice,
    OperationDone,
    PinResidents,
    Progress,
    Resident,
    StoreMessage,
    StoreTruth,
    VerifyStored,
    Welcome,
)

__all__ = ["Lying", "StoreLink", "StoreOwner"]

_log = logging.getLogger(__name__)


class StoreOwner(Protocol):
    """Who hears of changes in the arena."""

    def placement_changed(self, digest: str) -> None: ...

    def happened(self, event: NodeEvent) -> None:
        """Something to be remembered, that no placement tells."""

    def loaded(self, digest: str) -> None:
        """The store has read a checkpoint; it may have found that the copy on the disk is right."""

    def load_failed(self, digest: str, fault: Fault) -> None:
        """The store could not load a checkpoint; it may have put the copy on the disk in quarantine."""

    def checkpoint_came(self, digest: str, then: Callable[[], None]) -> None:
        """A checkpoint has come to the disk: ``then`` is called once its directory is known."""

    def arena_changed(self) -> None:
        """More of the arena is there."""

    def store_ready(self) -> None:
        """The store has stated its truth; the arena can be attached."""

    def store_lost(self) -> None:
        """Extents heard over the connection that broke are not to be attached any more."""


@dataclass(frozen=True, slots=True)
class Lying:
    """An image of a checkpoint that lies in memory or, as ``weights``, on a device; ``wrong``: its bytes are not right."""

    digest: str
    image_id: str
    weights: DeviceWeights | None = None
    wrong: bool = False


@dataclass(slots=True)
class _Fill:
    message: FillArena
    answered: Callable[[Resident | Fault], None]
    progress: Callable[[Progress], None]
    arriving: Callable[[Arriving | LayersArrived], None]
    instead: str = ""
    """The image that lay there, used by nobody, when it was asked for: it makes way, and nobody else gets it meanwhile."""
    losses: int = 0


@dataclass(slots=True)
class _Drop:
    message: DropResident
    answered: Callable[[Fault | None], None]


@dataclass(slots=True)
class _Task:
    """What the store does beside fills: answered by one `OperationDone`, asked again of the next store."""

    message: VerifyStored | FetchStored
    answered: Callable[[OperationDone], None]
    progress: Callable[[Progress], None]
    coming: Callable[[Fetching], None]
    losses: int = 0
    arrives: Fetching | None = None
    """Of a fetch whose image comes to memory: what was last said of it."""


class StoreLink:
    """Speaks to the store over its lives. ``arena`` and ``residents`` are as last heard."""

    def __init__(self, kin: Kin, owner: StoreOwner) -> None:
        self.arena: ArenaInfo | None = None
        self.residents: dict[str, Resident] = {}
        self.holds = Holds(self._users_changed)
        self.devices = DeviceTier(self._say, owner.placement_changed, owner.happened)
        self._losses = StoreLosses(owner.happened)
        self._kin = kin
        self._owner = owner
        self._descriptor: int | None = None
        self._stated = False
        self._fills: dict[str, _Fill] = {}
        self._drops: dict[str, _Drop] = {}
        self._tasks: dict[str, _Task] = {}
        self._pinned: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """True when the present store has stated its truth and its arena is held."""
        return self._stated and self._descriptor is not None

    @property
    def loading(self) -> bool:
        """True while a fill is not answered yet."""
        return bool(self._fills) or self.devices.loading

    def filling(self) -> dict[str, int]:
        """What comes to memory, by a fill or with a fetch; and the bytes of its image, 0 where only the disk's copy tells."""
        fills = {fill.message.digest: 0 for fill in self._fills.values()}
        fetched = [task.arrives for task in self._tasks.values() if task.arrives is not None]
        return fills | {fetching.digest: fetching.image_bytes for fetching in fetched}

    def images(self, digest: str) -> list[tuple[str, bool]]:
        """Which image of a checkpoint lies in memory, or comes there: its id, and whether it lies there and is right."""
        resident = self.residents.get(digest)
        lying = [(resident.image_id, not resident.condemned)] if resident is not None else []
        return lying + [(fill.message.image_id, False) for fill in self._fills.values() if fill.message.digest == digest]

    def welcome(self, connection: Connection, hello: Hello, welcome: Callable[[int], Welcome]) -> None:
        """A store has dialled: it gets its arena back if one is held. Raises Conflict for another than ours."""
        self._kin.claim(connection, hello.pid)
        self._stated = False
        connection.begin(StoreMessage, self, f"store (pid {hello.pid})")
        weights = self.devices.given_back()
        connection.send(welcome((self._descriptor is not None) + len(weights)))
        if self._descriptor is not None:
            connection.send(Descriptors(what="arena"), [self._descriptor])
        for message, descriptor in weights:
            connection.send(message, [descriptor])

    def fill(
        self,
        digest: str,
        directory: str,
        answered: Callable[[Resident | Fault], None],
        progress: Callable[[Progress], None],
        *,
        user: str,
        priority: Priority = Priority.REQUEST,
        arriving: Callable[[Arriving | LayersArrived], None] = lambda _: None,
        image_id: str = "",
    ) -> str:
        """Ask for a checkpoint in the arena; answered once, now or later, unless it is withdrawn. What lies there of another
        image, or is wrong, gives way if nobody uses it. Returns its op.

        ``user`` holds it from now on. ``arriving`` hears where it comes to lie and which layers have come, until it is answered
        or the store is lost.
        """
        resident = self.residents.get(digest)
        instead = resident.image_id if resident is not None and self.holds.idle(digest) else ""
        self._make_way(digest, image_id, instead)
        self.holds.add(digest, user)
        op = f"fill {secrets.token_hex(8)}"  # a store may still have one that an earlier agent has asked for
        users = self.holds.count(digest)
        message = FillArena(op=op, digest=digest, directory=directory, image_id=image_id, users=users, priority=priority)
        fill = self._fills[op] = _Fill(message, answered, progress, arriving, instead)
        if self._stated:
            self._kin.send(fill.message)
        self._owner.placement_changed(digest)
        return op

    def withdraw(self, op: str) -> None:
        """Nobody waits for this fill any more; without a user the store gives it up."""
        fill = self._fills.pop(op, None)
        if fill is not None:
            self._owner.placement_changed(fill.message.digest)

    def drop(self, op: str, digest: str, answered: Callable[[Fault | None], None], image_id: str = "") -> None:
        """Free a checkpoint's chunks, or those of this one image though it is pinned; answered once."""
        self._drops[op] = _Drop(DropResident(op=op, digest=digest, image_id=image_id), answered)
        if self._stated:
            self._kin.send(self._drops[op].message)

    def idle(self) -> set[Lying]:
        """What lies in memory and on devices, is used by nobody there and not asked to go yet. What is being fetched is left
        out: it is not known what becomes of its copy."""
        fetched = {task.message.digest for task in self._tasks.values() if isinstance(task.message, FetchStored)}
        memory = [lying for digest in self.residents if (lying := self._lying(digest)) is not None]
        devices = [Lying(weights.digest, weights.image_id, weights) for weights in self.devices.idle()]
        return {lying for lying in memory + devices if lying.digest not in fetched}

    def _make_way(self, digest: str, image_id: str, instead: str) -> None:
        """Let the image go that lies there unused, if it is wrong or another than the one that comes."""
        resident = self.residents.get(digest)
        if resident is None or resident.image_id != instead or _drop_op(resident) in self._drops:
            return
        if resident.condemned or image_id not in ("", instead):
            self.let_go(Lying(digest, instead, wrong=bool(resident.condemned)))

    def _lying(self, digest: str) -> Lying | None:
        """What lies of it in memory, is used by nobody and not asked to go yet."""
        resident = self.residents.get(digest)
        if resident is None or not self.holds.idle(digest) or _drop_op(resident) in self._drops:
            return None
        return Lying(digest, resident.image_id, wrong=bool(resident.condemned))

    def let_go(self, lying: Lying) -> None:
        """Free what is `idle`; nothing is answered."""
        if lying.weights is not None:
            self.devices.let_go(lying.weights)
        else:
            self.drop(_drop_op(lying), lying.digest, _ignore, lying.image_id)

    def verify(
        self,
        op: str,
        digest: str,
        directory: str,
        answered: Callable[[OperationDone], None],
        progress: Callable[[Progress], None],
    ) -> None:
        """Compare a copy on disk and what lies of it in the arena with its checksums; answered once, unless it is cancelled."""
        self._tasks[op] = _Task(VerifyStored(op=op, digest=digest, directory=directory), answered, progress, _ignore)
        if self._stated:
            self._kin.send(self._tasks[op].message)

    def cancel_verify(self, op: str) -> None:
        """Nobody waits for a verification any more; it is not answered."""
        if self._tasks.pop(op, None) is not None and self._stated:
            self._kin.send(CancelVerify(op=op))

    def pin(self, digests: tuple[str, ...]) -> None:
        """All that is kept in the arena from now on, once it is there."""
        self._pinned = digests
        if self._stated:
            self._kin.send(PinResidents(digests=digests))

    def fetch(
        self,
        message: FetchStored,
        answered: Callable[[OperationDone], None],
        progress: Callable[[Progress], None],
        coming: Callable[[Fetching], None] | None = None,
    ) -> None:
        """Bring a checkpoint from a remote to the disk; answered once, unless it is cancelled. The answer has a layout if it
        came from that very remote. ``coming`` hears where it comes to lie, of each store anew."""
        self._tasks[message.op] = _Task(message, answered, progress, coming or _ignore)
        if self._stated:
            self._kin.send(message)

    def cancel_fetch(self, op: str, *, keep: bool = False) -> None:
        """Nobody waits for a fetch any more; it is not answered. With ``keep`` what has come stays for whoever asks next."""
        if (task := self._tasks.pop(op, None)) is None:
            return
        if self._stated:
            self._kin.send(CancelFetch(op=op, keep=keep))
        if task.arrives is not None:
            self._owner.placement_changed(task.arrives.digest)

    def reopen(self) -> int:
        """A new descriptor of the arena that can only be read. The caller owns it. Raises Unreachable, OSError."""
        if self._descriptor is None:
            raise Unreachable("there is no arena yet")
        return read_only(self._descriptor)

    def close(self) -> None:
        """Let go of arena and device memory, which are free when the store has gone too."""
        self.devices.close()
        self._close_arena()

    def _close_arena(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    # --- Handler

    def received(self, connection: Connection, message: Any) -> None:
        match message:
            case Descriptors():
                self._take_descriptors(connection, message)
            case StoreTruth():
                self._truth(message)
            case ArenaState():
                self.arena = message.arena
                self._owner.arena_changed()
            case _ if not self._stated:
                raise LinkError(f"the store said {type(message).__name__} before its truth")
            case Arriving() | LayersArrived():
                if (fill := self._fills.get(message.op)) is not None:
                    fill.arriving(message)
            case Fetching():
                if (task := self._tasks.get(message.op)) is not None:
                    self._coming(task, message)
            case Resident():
                self._resident(message)
            case OperationDone():
                self._done(message)
            case OnDevice():
                self.devices.on_device(message)
                self._owner.loaded(message.digest)
            case EvictedDevice():
                self.devices.evicted(message)
            case Evicted():
                self._evicted(message)
            case Progress():
                asked = self._fills.get(message.op) or self._tasks.get(message.op)
                if not self.devices.progress(message) and asked is not None:
                    asked.progress(message)
            case _:
                raise LinkError(f"the store has no {type(message).__name__} to say")

    def drained(self, connection: Connection) -> None:
        pass

    def lost(self, connection: Connection, why: str) -> None:
        if not self._kin.disclaim(connection):
            return
        _log.warning("the link to the store is lost: %s", why)
        if self._stated:
            self._losses.lost(why, self._lies(), {*self.filling(), *self.devices.filling})
        self._stated = False
        for op, fill in list(self._fills.items()):
            fill.losses += 1
            if (fault := given_up(fill.losses, "loading")) is not None:
                del self._fills[op]
                fill.answered(fault)
        for op, task in list(self._tasks.items()):
            task.losses += 1
            doing = "verifying" if isinstance(task.message, VerifyStored) else "fetching"
            if (fault := given_up(task.losses, doing)) is not None:
                del self._tasks[op]
                task.answered(OperationDone(op=op, fault=fault))
        self.devices.lost()
        self._owner.store_lost()

    # --- what the store says

    def _say(self, message: Message) -> None:
        if self._stated:
            self._kin.send(message)

    def _take_descriptors(self, connection: Connection, message: Descriptors) -> None:
        descriptors = connection.take_descriptors(message.count)
        if message.what == "device" and message.weights is not None and len(descriptors) == 1:
            self.devices.keep(message.weights, descriptors[0])
            return
        if message.what != "arena" or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            raise LinkError(f"the store sent {len(descriptors)} descriptors as {message.what!r}")
        self._close_arena()
        self._descriptor = descriptors[0]
        if self._stated:
            self._owner.store_ready()

    def _truth(self, message: StoreTruth) -> None:
        earlier = self.residents
        same = self.arena is not None and self.arena.id == message.arena.id
        if self.arena is not None and not same:
            _log.warning("the arena is a new one; what lay in the old one stays only where a worker maps it")
        self.arena = message.arena
        self.residents = {resident.digest: resident for resident in message.residents}
        if same:  # what an earlier store found wrong, this one does not know
            for digest, resident in self.residents.items():
                if (before := earlier.get(digest)) is not None and before.condemned:
                    self.residents[digest] = msgspec.structs.replace(resident, condemned=before.condemned)
        for fill in self._fills.values():
            if fill.message.op not in message.filling:  # what an earlier store was to free as soon as it could
                self._make_way(fill.message.digest, fill.message.image_id, fill.instead)
        self._stated = True
        self._kin.send(PinResidents(digests=self._pinned))
        for digest in {*self.holds.counts(), *self.residents}:
            why = self.residents[digest].condemned if digest in self.residents else ""
            self._kin.send(HoldCheckpoint(digest=digest, users=self.holds.count(digest), condemned=why))
        for drop in self._drops.values():  # before the fills: what one brings may take the place of what leaves
            self._kin.send(drop.message)
        for fill in self._fills.values():
            if fill.message.op not in message.filling:
                self._kin.send(self._counted(fill.message))
        self.devices.truth(message)
        for op in message.fetching:  # whoever asked died with an earlier agent; a manager may ask again
            if op not in self._tasks:
                self._kin.send(CancelFetch(op=op, keep=True))
        for task in self._tasks.values():
            self._kin.send(task.message)
        for digest in earlier.keys() | self.residents.keys():
            self._owner.placement_changed(digest)
        self._losses.back(self._lies())
        if self._descriptor is not None:
            self._owner.store_ready()

    def _lies(self) -> set[Place]:
        """What lies in memory and on devices, whole."""
        memory = {Place(each.digest, "memory", each.image_bytes) for each in self.residents.values()}
        return memory | {Place(each.digest, f"device {each.device}", each.size_bytes) for each in self.devices.lying}

    def _counted(self, message: FillArena) -> FillArena:
        return msgspec.structs.replace(message, users=self.holds.count(message.digest))

    def _resident(self, message: Resident) -> None:
        self.residents[message.digest] = message
        fill = self._fills.pop(message.op, None)
        if message.users != (users := self.holds.count(message.digest)):
            # Who it was loaded for has gone meanwhile, or was never counted here.
            self._kin.send(HoldCheckpoint(digest=message.digest, users=users))
        self._owner.placement_changed(message.digest)
        self._owner.loaded(message.digest)
        if fill is not None:
            fill.answered(message)

    def _evicted(self, message: Evicted) -> None:
        if (resident := self.residents.pop(message.digest, None)) is None:
            return
        self._owner.placement_changed(message.digest)
        told = f"from memory, {resident.image_bytes} bytes: {message.why}"
        event = NodeEvent(reason="Evicted", message=told, digest=message.digest, for_digest=message.for_digest)
        self._owner.happened(event)

    def _coming(self, task: _Task, message: Fetching) -> None:
        before, task.arrives = task.arrives, message if message.in_memory else None
        if before != task.arrives:  # its room in the arena is taken from now on, or is not any more
            self._owner.placement_changed(message.digest)
        task.coming(message)

    def _done(self, message: OperationDone) -> None:
        if failed := self.devices.done(message):
            self._owner.load_failed(failed, message.fault or Fault.of(SllmError("the load failed")))
        fill = self._fills.pop(message.op, None)
        if fill is not None:
            fault = message.fault or Fault.of(SllmError("the store ended a load without saying where the weights lie"))
            self._owner.placement_changed(fill.message.digest)
            self._owner.load_failed(fill.message.digest, fault)
            fill.answered(fault)
        drop = self._drops.pop(message.op, None)
        if drop is not None:
            if message.fault is None and self.residents.pop(drop.message.digest, None) is not None:
                self._owner.placement_changed(drop.message.digest)
            drop.answered(message.fault)
        task = self._tasks.pop(message.op, None)
        if task is not None:
            task.answered(message)
        elif message.layout and message.fault is None:  # a fetch had ended before the store heard that nobody waits
            self._owner.checkpoint_came(message.digest, lambda: None)

    def _users_changed(self, digest: str, users: int) -> None:
        if self._stated:
            self._kin.send(HoldCheckpoint(digest=digest, users=users))
        self._owner.placement_changed(digest)


def _drop_op(image: Lying | Resident) -> str:
    return f"drop {image.image_id} of {image.digest}"


def _ignore(_: object) -> None:
    """Nobody waits for this."""
