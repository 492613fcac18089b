"""The store process: one arena and its checkpoints, served to the node's agent over all of the agent's lives.

The main thread owns everything; reader threads only read. It ends on `Shutdown`, on SIGTERM, and when there was no agent for
``agent_grace_s``. It may be killed at any time: the agent holds the arena's descriptor, the arena its own table.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from agent.channel import Channel
from agent.config import NodeConfig, load_config
from agent.logs import begin_log
from agent.native.address import address_of
from agent.native.arena import Arena
from agent.native.device import budget_bytes, find_devices
from agent.native.disk_record import record_path, remembered
from agent.native.files import allow_open_files
from agent.native.reader import Priority
from agent.store.cache import ArenaStore
from agent.store.catalog import CatalogEntry
from agent.store.devices import DeviceStore
from agent.store.remote.fetches import Fetches
from schema.errors import Fault, InvalidInput, LinkError, SllmError
from schema.link import (
    ArenaState,
    Arriving,
    CancelFetch,
    CancelVerify,
    Descriptors,
    DeviceWeights,
    DropDevice,
    DropResident,
    Evicted,
    EvictedDevice,
    Fetching,
    FetchStored,
    FillArena,
    FillDevice,
    Hello,
    HoldCheckpoint,
    HoldDevice,
    LayersArrived,
    OnDevice,
    OperationDone,
    Ping,
    PinResidents,
    Pong,
    Progress,
    Refused,
    ReleasedDevice,
    ReserveDevice,
    Resident,
    Role,
    Shutdown,
    StoreMessage,
    StoreTruth,
    ToStore,
    VerifyStored,
    Welcome,
)
from schema.states import Tier
from schema.version import VERSION

__all__ = ["StoreProcess", "main"]

_SOFTWARE: Final = f"sllmctl-store {VERSION}"
_FAULT_THREADS: Final = max(1, min(4, (os.cpu_count() or 1) // 2))
_FAULTED_EVERY: Final = 256
"""Chunks."""
_SWITCH_S: Final = 0.0005
"""How soon a thread that reads gets the interpreter back from one that computes; each block costs one such wait."""
_ToDevices = FillDevice | HoldDevice | ReserveDevice | DropDevice | ReleasedDevice
_log = logging.getLogger(__name__)


def main(run_dir: str | Path) -> int:
    """Run the store of the node whose run directory this is, to its end. Returns the exit code."""
    try:
        config = load_config(Path(run_dir))
    except SllmError as error:
        sys.stderr.write(f"store: {error}\n")
        return 2
    sys.setswitchinterval(_SWITCH_S)
    allow_open_files()
    begin_log("store", config.log_path / "store.log", config)
    lock = os.open(config.lock_path("store"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.error("another store holds %s; it serves this run directory", config.lock_path("store"))
        return 6
    try:
        return StoreProcess(config).run()
    except SllmError as error:
        _log.error("%s", error)
        return 1
    finally:
        os.close(lock)


class StoreProcess:
    """The main loop. Speaks first only after a `Welcome` and the descriptors that it announced."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        hello = Hello(role=Role.STORE, software=_SOFTWARE, pid=os.getpid(), token=_token(config))
        self._channel: Channel[ToStore] = Channel(config.socket_path, hello, ToStore)
        self._arena: Arena | None = None
        self._store: ArenaStore | None = None
        self._fetches: Fetches | None = None
        self._devices: DeviceStore | None = None
        self._given: list[tuple[DeviceWeights, int]] = []
        self._announced = 0
        self._offer = True
        self._stopping = False
        self._faulted = False
        self._tuned_at = 0

    def run(self) -> int:
        """Serve until told to stop, or until the agent was away too long. Returns the exit code."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the manager, which tells the agent
        grace_s = self._config.agent_grace_s
        try:
            while not self._stopping:
                # While connected the loop only wakes to notice a broken link; messages and reads wake it at once.
                left_s = max(0.0, grace_s - self._channel.lost_for_s)
                for message in self._channel.poll(min(max(left_s, 0.01), 1.0), (self._wake_read,)):
                    self._take(message)
                self._drain()
                if self._store is not None:
                    self._store.pump()
                if self._fetches is not None:
                    self._fetches.pump()
                if self._devices is not None:
                    self._devices.pump()
                if self._faulted:
                    self._tell_arena()
                if self._channel.refused:
                    _log.error("the agent refuses this store: %s", self._channel.last_refusal)
                    return 1
                if not self._channel.connected and self._channel.lost_for_s >= grace_s:
                    _log.warning("no agent for %.1f s; ending. %s", grace_s, self._channel.last_refusal or "")
                    break
        finally:
            self._close()
        return 0

    # What the store says of its background work: the StoreListener.

    def progress(self, op: str, done_bytes: int, total_bytes: int) -> None:
        self._say(Progress(op=op, stage="load", done_bytes=done_bytes, total_bytes=total_bytes, source=Tier.DISK))

    def _arena_faulted(self, chunks: int) -> None:
        """On a thread: now and then, and at the end, the agent hears how much of the arena is there."""
        assert self._arena is not None
        if chunks == self._arena.chunks or not chunks % _FAULTED_EVERY:
            self._faulted = True
            self._wake()

    def _tell_arena(self) -> None:
        self._faulted = False
        if self._store is not None:
            self._say(ArenaState(arena=self._store.arena))

    def arriving(self, message: Arriving | LayersArrived) -> None:
        self._say(message)

    def filled(self, op: str, resident: Resident) -> None:
        self._say(resident)

    def failed(self, op: str, digest: str, fault: Fault) -> None:
        _log.warning("loading %s failed: %s", digest, fault.message)
        self._say(OperationDone(op=op, digest=digest, fault=fault))

    def verifying(self, op: str, stage: str, done_bytes: int, total_bytes: int) -> None:
        source = Tier.DRAM if stage.endswith(Tier.DRAM) else Tier.DISK
        self._say(Progress(op=op, stage="verify", done_bytes=done_bytes, total_bytes=total_bytes, source=source))

    def verified(self, op: str, digest: str, fault: Fault | None) -> None:
        self._say(OperationDone(op=op, digest=digest, fault=fault))

    def coming(self, message: Fetching) -> None:
        self._say(message)

    def fetching(self, op: str, done_bytes: int, total_bytes: int) -> None:
        self._say(Progress(op=op, stage="fetch", done_bytes=done_bytes, total_bytes=total_bytes, source=Tier.REMOTE))

    def fetched(self, op: str, digest: str, layout: str, fault: Fault | None, came_bytes: int) -> None:
        if fault is not None:
            _log.warning("fetching %s failed: %s", digest, fault.message)
        self._say(OperationDone(op=op, digest=digest, layout=layout, fault=fault, read_bytes=came_bytes))

    def condemned(self, resident: Resident) -> None:
        _log.error("checkpoint %s is wrong in memory: %s", resident.digest, resident.condemned)
        self._say(resident)

    def evicted(self, digest: str, why: str, for_digest: str) -> None:
        self._say(Evicted(digest=digest, why=why, for_digest=for_digest))

    # What it says of devices: the DeviceListener.

    def copying(self, op: str, done_bytes: int, total_bytes: int, source: Tier) -> None:
        self._say(Progress(op=op, stage="load", done_bytes=done_bytes, total_bytes=total_bytes, source=source))

    def loaded(self, weights: DeviceWeights, descriptor: int) -> None:
        if not self._announced:
            self._channel.send(Descriptors(what="device", weights=weights), [descriptor])

    def on_device(self, op: str, digest: str, weights: tuple[DeviceWeights, ...], source: Tier, read_bytes: int) -> None:
        self._say(OnDevice(op=op, digest=digest, weights=weights, source=source, read_bytes=read_bytes))

    def evicting(self, weights: DeviceWeights, why: str, for_digest: str) -> None:
        self._say(EvictedDevice(id=weights.id, why=why, for_digest=for_digest))

    def layers_usable(self, digest: str, count: int) -> None:
        _log.debug("%d layers of %s are usable", count, digest)

    def _say(self, message: StoreMessage) -> None:
        if not self._announced:  # until then the truth, which comes first, says it all
            self._channel.send(message)

    def _take(self, message: ToStore) -> None:
        try:
            if isinstance(message, Welcome):
                self._announced, self._offer = message.descriptors, True
                if not self._announced:
                    self._state_truth()
            elif isinstance(message, Descriptors):
                self._take_descriptors(message)
            elif isinstance(message, Ping):
                self._channel.send(Pong(nonce=message.nonce))
            elif isinstance(message, Shutdown):
                self._stopping = True
            elif not isinstance(message, Refused | Pong):
                self._command(message)
        except LinkError as error:
            _log.error("%s; dialling again", error)
            self._channel.close(0.0)

    def _command(
        self,
        message: FillArena
        | HoldCheckpoint
        | DropResident
        | VerifyStored
        | CancelVerify
        | PinResidents
        | FetchStored
        | CancelFetch
        | _ToDevices,
    ) -> None:
        if self._store is None or self._fetches is None or self._announced:
            raise LinkError(f"the agent sent {type(message).__name__} before the store had an arena")
        if isinstance(message, FillArena):
            try:
                directory = self._directory(message.directory)
            except InvalidInput as error:
                self.failed(message.op, message.digest, Fault.of(error))
                return
            self._look_up_tuning()
            priority = Priority(message.priority)
            self._store.fill(message.op, message.digest, directory, message.users, priority, message.image_id)
        elif isinstance(message, HoldCheckpoint):
            self._store.hold(message.digest, message.users, message.condemned)
        elif isinstance(message, PinResidents):
            self._store.pin(message.digests)
        elif isinstance(message, VerifyStored):
            try:
                directory = self._directory(message.directory)
            except InvalidInput as error:
                self.verified(message.op, message.digest, Fault.of(error))
                return
            self._store.verify(message.op, message.digest, directory)
        elif isinstance(message, _ToDevices):
            self._command_devices(message)
        elif isinstance(message, CancelVerify):
            self._store.cancel_verify(message.op)
        elif isinstance(message, FetchStored):
            self._fetches.begin(
                message.op,
                message.digest,
                message.url,
                message.layout,
                in_memory=message.in_memory,
                users=message.users,
                devices=message.devices,
            )
        elif isinstance(message, CancelFetch):
            self._fetches.cancel(message.op, keep=message.keep)
        else:
            fault = None
            try:
                self._store.drop(message.digest, message.image_id)
            except SllmError as error:
                fault = Fault.of(error)
            self._say(OperationDone(op=message.op, digest=message.digest, fault=fault))

    def _look_up_tuning(self) -> None:
        """Read the disk as the agent has found out that it is read best, once it has."""
        assert self._store is not None
        place = record_path(self._config.data_dir)
        try:
            at = place.stat().st_mtime_ns
        except OSError:
            return
        if at != self._tuned_at:
            self._tuned_at = at
            record = remembered(place, self._config.checkpoints_path.absolute())
            if record is not None and record.tuning is not None:
                self._store.tune(record.tuning)
                _log.info("reading %d blocks of %d bytes at a time", record.tuning.depth, record.tuning.block_bytes)

    def _command_devices(self, message: _ToDevices) -> None:
        devices = self._devices
        if devices is None:
            if isinstance(message, FillDevice | DropDevice):
                self.failed(message.op, message.digest, Fault.of(InvalidInput("this store has no devices")))
            return
        match message:
            case FillDevice():
                try:
                    directory = self._directory(message.directory)
                except InvalidInput as error:
                    self.failed(message.op, message.digest, Fault.of(error))
                    return
                self._look_up_tuning()
                priority = Priority(message.priority)
                devices.fill(message.op, message.digest, directory, message.devices, message.users, priority, message.image_id)
            case HoldDevice():
                devices.hold(message.digest, message.device, message.users)
            case ReserveDevice():
                devices.reserve(message.device, message.size_bytes)
            case ReleasedDevice():
                devices.released(message.id)
            case DropDevice():
                fault = None
                try:
                    if message.device is not None:
                        devices.let_go(message.digest, message.image_id, message.device)
                    else:
                        devices.drop(message.digest)
                except SllmError as error:
                    fault = Fault.of(error)
                self._say(OperationDone(op=message.op, digest=message.digest, fault=fault))

    def _follow_to_devices(self, entry: CatalogEntry, devices: tuple[int, ...]) -> None:
        if self._devices is not None:
            self._devices.follow(entry, devices)

    def _directory(self, relative: str) -> Path:
        path = PurePosixPath(relative)
        if path.is_absolute() or ".." in path.parts:
            raise InvalidInput(f"the directory {relative!r} is not one within the node's checkpoints")
        return self._config.checkpoints_path / path

    def _take_descriptors(self, message: Descriptors) -> None:
        descriptors = self._channel.take_descriptors(message.count)
        if self._announced and message.what == "device" and message.weights is not None and len(descriptors) == 1:
            self._given.append((message.weights, descriptors[0]))
        else:
            self._take_arena(message, descriptors)
        self._announced -= 1
        if not self._announced:
            self._state_truth()

    def _take_arena(self, message: Descriptors, descriptors: list[int]) -> None:
        if not self._announced or message.what != "arena":
            _close_all(descriptors)
            raise LinkError(f"the agent sent descriptors ({message.what!r}) that it had not announced")
        for descriptor in descriptors:
            if self._arena is None and self._adopt(descriptor):
                self._offer = False
                continue
            if self._arena is not None and os.path.sameopenfile(descriptor, self._arena.descriptor):
                self._offer = False
            os.close(descriptor)

    def _adopt(self, descriptor: int) -> bool:
        try:
            self._arena = Arena.adopt(descriptor, self._config.arena_bytes, self._config.chunk_bytes)
        except InvalidInput as error:
            _log.warning("%s; making a fresh arena", error)
            return False
        _log.info("took back the arena with %d checkpoints", len(self._arena.occupants))
        return True

    def _state_truth(self) -> None:
        arena = self._arena = self._arena or Arena.create(self._config.arena_bytes, self._config.chunk_bytes)
        if self._store is None:
            self._store = ArenaStore(arena, self, reader_threads=self._config.reader_threads, wake=self._wake)
            _log.info("reading by %s into an arena of %s pages", self._store.backend, arena.pages)
            data, remote = Path(self._config.data_dir), self._config.remote
            root, limit = self._config.checkpoints_path, self._config.disk_bytes
            self._fetches = Fetches(
                data, root, remote, self._store, self, self._wake, disk_bytes=limit, follow=self._follow_to_devices
            )
        if self._offer:
            self._channel.send(Descriptors(what="arena", count=1), [arena.descriptor])
        store = self._store
        assert self._fetches is not None
        fetching = self._fetches.ops()
        truth = StoreTruth(arena=store.arena, residents=store.residents(), filling=store.filling(), fetching=fetching)
        store.new_agent()
        self._channel.send(self._with_devices(truth, arena))
        arena.prefault(_FAULT_THREADS, self._arena_faulted)

    def _with_devices(self, truth: StoreTruth, arena: Arena) -> StoreTruth:
        """What lies on devices: taken back from the agent, offered to it where it lacks it, and stated."""
        if self._devices is None:
            self._devices = self._open_devices(arena)
        given, self._given = self._given, []
        if self._devices is None:
            _close_all([descriptor for _, descriptor in given])
            return truth
        kept = {weights.id for weights, descriptor in given if self._devices.adopt(weights, descriptor)}
        evicting = {*self._devices.evicting, *(weights.id for weights, _ in given if weights.id not in kept)}
        for weights in self._devices.weights:
            descriptor = self._devices.descriptor(weights.id)
            if weights.id not in kept and descriptor is not None:
                self._channel.send(Descriptors(what="device", weights=weights), [descriptor])
        filling = truth.filling + self._devices.filling
        return msgspec.structs.replace(truth, filling=filling, weights=self._devices.weights, evicting=tuple(sorted(evicting)))

    def _open_devices(self, arena: Arena) -> DeviceStore | None:
        assert self._store is not None
        driver, found = find_devices(self._config.devices)
        if driver is None:
            return None
        budgets = {device.index: budget_bytes(self._config.device_bytes, device) for device in found}
        host = ((address_of(arena.memory), arena.memory.nbytes),)
        return DeviceStore(driver, budgets, self._store, host, self, self._wake)

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            return  # full of wakes that the main thread has yet to see

    def _drain(self) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            return

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _close(self) -> None:
        if self._devices is not None:
            self._devices.close()
        _close_all([descriptor for _, descriptor in self._given])
        if self._fetches is not None:
            self._fetches.close()
        if self._store is not None:
            self._store.close()
        self._channel.close()
        if self._arena is not None:
            self._arena.close()
        signal.set_wakeup_fd(-1)
        _close_all([self._wake_read, self._wake_write])


def _token(config: NodeConfig) -> str:
    try:
        return config.token_path.read_text().strip()
    except OSError as error:
        raise InvalidInput(f"cannot read the agent's token {config.token_path}: {error.strerror}") from error


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
