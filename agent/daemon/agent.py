"""The agent as a whole: makes its parts, passes what each hears to those whom it concerns, and ends them all."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.config import NodeConfig
from agent.daemon.adoption import Adoption
from agent.daemon.attempts import Journal
from agent.daemon.catalog import Checkpoints
from agent.daemon.connection import Connection
from agent.daemon.diskspeed import DiskSpeed
from agent.daemon.identity import IdentityFile
from agent.daemon.ingest import IngestCommand, ingest_command
from agent.daemon.instances import Instances
from agent.daemon.inventory import devices, inventory
from agent.daemon.life import Life
from agent.daemon.logs import NodeLogs
from agent.daemon.managerlink import ManagerLink
from agent.daemon.operations import Operations
from agent.daemon.roster import Roster, RosterEntry
from agent.daemon.server import Server, common_version
from agent.daemon.storelink import StoreLink
from agent.daemon.supervisor import KILL_S, TERM_S, Kin, Spawn, spawn_kin
from agent.daemon.workers import Relay
from agent.daemon.zygote import ZygoteLink
from agent.store.temporary import sweep_left
from schema.errors import Conflict, Fault, InvalidCheckpoint, InvalidInput, LinkError, SllmError, Unauthorised, Unreachable
from schema.link import (
    Acked,
    Cancel,
    CancelOperation,
    DropCheckpoint,
    Fetch,
    Hello,
    Ingest,
    InstanceLoad,
    InstanceTruth,
    InstanceUpdate,
    Inventory,
    InventoryUpdate,
    LoadCheckpoint,
    Message,
    NodeEvent,
    NodeTruth,
    OperationsAcked,
    PlacementUpdate,
    Progress,
    Publish,
    ReadFile,
    ReadLog,
    Role,
    SetPins,
    Shutdown,
    StartInstance,
    StopInstance,
    Submit,
    VerifyCheckpoint,
    Welcome,
)
from schema.states import InstanceState, Tier
from schema.version import VERSION

__all__ = ["SOFTWARE", "Agent"]

SOFTWARE: Final = f"sllmctl-agent {VERSION}"
_FAREWELL_S: Final = 1.0
_log = logging.getLogger(__name__)


class Agent:
    """One node. ``token`` is what its kin know it by; ``spawn`` and ``ingest`` say how its processes are started."""

    def __init__(
        self, config: NodeConfig, token: str, *, spawn: Spawn = spawn_kin, ingest: IngestCommand = ingest_command
    ) -> None:
        self._config = config
        self._token = token
        self._identity = IdentityFile(Path(config.data_dir) / "identity.json")
        self._roster = Roster(Path(config.run_dir) / "roster.json")
        self._journal = Journal()
        self._adoption = Adoption()
        self._store_kin = Kin("store", config, self._roster, spawn)
        self._zygote_kin = Kin("zygote", config, self._roster, spawn)
        self._store = StoreLink(self._store_kin, self)
        found = devices(config)
        cuda = frozenset(device.index for device in found if device.kind == "cuda")
        self._zygote = ZygoteLink(self._zygote_kin, self._means_changed, tuple(sorted(cuda)))
        self._instances = Instances(config, self._roster, self._store, self._journal, self, self._zygote.ask, cuda)
        self._zygote.instances = self._instances
        self._relay = Relay(self._journal, self._instances, self, config.hang_s)
        self._checkpoints = Checkpoints(config.checkpoints_path, self._store)
        fork_ingest = self._zygote.fork_ingest
        self._operations = Operations(config, self._roster, self._store, self._checkpoints, self, fork_ingest, ingest)
        self._manager = ManagerLink(self._journal, self._truth, self._command, self._manager_changed)
        self._server = Server(config.socket_path, self._admit)
        self._inventory = inventory(config, None)
        self._disk = DiskSpeed(config, self._busy, self._has_huge_pages, self._means_changed)
        self._logs = NodeLogs(config)
        self._devices = {device.index for device in found}
        self._software: dict[str, str] = {"agent": SOFTWARE}
        self._admission = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._measuring = asyncio.Lock()
        self._tidying = asyncio.Lock()
        self._ended: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._shutdown = asyncio.Event()
        self._grace_s = 0.0
        self._deserted = False
        self._grace_timer: asyncio.TimerHandle | None = None

    # --- life

    async def run(self) -> None:
        """Serve until `shut_down` is called, then end everything. Raises SllmError when it cannot begin or a part fails."""
        left = self._roster.load()
        self._roster.begin()
        await self._end_ingests(left.values())  # before the look at the disk: one may be committing
        await self._checkpoints.scan()
        self._checkpoints.pins.load()
        self._store.pin(self._checkpoints.pins.on(Tier.DRAM))
        await self._measure()
        self._adopt(left.values())
        await self._tidy_logs()
        self._server.listen()
        self._manager_changed(False)
        watched: list[asyncio.Task[Any]] = [self._store_kin.start(), self._zygote_kin.start()]
        self._own(self._allow_truth(), "adoption")
        self._own(self._disk.run(), "measure the disk's speed")
        self._own(self._sweep(), "delete what was left")
        ending = asyncio.create_task(self._shutdown.wait())
        try:
            await asyncio.wait([ending, *watched], return_when=asyncio.FIRST_COMPLETED)
            for task in watched:
                if task.done() and (error := task.exception()) is not None:
                    raise SllmError(f"{task.get_name()}: {error}") from error
        finally:
            ending.cancel()
            await self._end()

    def shut_down(self, grace_s: float = 0.0) -> None:
        """End the agent and all its processes; attempts have ``grace_s`` seconds to finish. Again: with the new grace."""
        self._grace_s = grace_s
        if self._shutdown.is_set():
            self._instances.stop_all(grace_s)
        self._shutdown.set()

    async def _end(self) -> None:
        self._shutdown.set()
        self._disk.close()
        await self._operations.stop()
        self._instances.stop_all(self._grace_s)
        if not await self._instances.ended(self._grace_s + 2 * (TERM_S + KILL_S)):
            _log.error("some workers could not be ended")
        await asyncio.gather(self._zygote_kin.stop(), self._store_kin.stop())
        self._store.close()
        await self._manager.finish(_FAREWELL_S)
        self._server.close()
        if self._grace_timer is not None:
            self._grace_timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._roster.unlink()

    async def _end_ingests(self, left: Iterable[RosterEntry]) -> None:
        """What an earlier life was ingesting is ended, for nobody reads its answer."""
        for entry in left:
            if entry.role == "ingest":
                process = entry.open()
                if process is not None:
                    await process.end(TERM_S, KILL_S)
                self._roster.remove(entry)

    def _adopt(self, left: Iterable[RosterEntry]) -> None:
        """Take over what an earlier life left running."""
        by_role: dict[str, list[RosterEntry]] = {}
        for entry in left:
            by_role.setdefault(entry.role, []).append(entry)
        for entry in by_role.get("worker", []):
            if entry.start is None:
                self._roster.remove(entry)
            elif (process := self._instances.adopt(entry)) is not None:
                self._adoption.expect((entry.instance, entry.epoch), process)
        self._adoption.expect("store")
        self._store_kin.adopt(next(iter(by_role.get("store", [])), None))
        # What a zygote knows follows the truth: one that still imports takes seconds to dial.
        self._zygote_kin.adopt(next(iter(by_role.get("zygote", [])), None))

    async def _allow_truth(self) -> None:
        await self._adoption.wait(self._config.adopt_s)
        self._manager.allow_truth()

    def _own(self, coroutine: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s failed", task.get_name(), exc_info=error)

    # --- who dials

    def _admit(self, connection: Connection, hello: Hello) -> None:
        if hello.role is Role.MANAGER:
            self._own(self._admit_manager(connection, hello), f"admit manager {hello.pid}")
            return
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            raise Unauthorised(f"the {hello.role} (pid {hello.pid}) does not know this agent's token")

        def welcome(descriptors: int) -> Welcome:
            return self._welcome(hello, descriptors)

        if hello.role is Role.STORE:
            self._store.welcome(connection, hello, welcome)
        elif hello.role is Role.ZYGOTE:
            self._zygote.welcome(connection, hello, welcome)
        else:
            self._relay.welcome(connection, hello, welcome)
        self._software[hello.instance or hello.role] = hello.software

    async def _admit_manager(self, connection: Connection, hello: Hello) -> None:
        try:
            async with self._admission:
                if self._shutdown.is_set():
                    raise Unreachable("this agent is shutting down; dial the one that follows it")
                identity = self._identity.judge(hello)
                await asyncio.to_thread(self._identity.write, identity)
                if connection.closed:
                    return
                _log.info("manager %d of cluster %s, generation %d", hello.pid, hello.cluster, hello.generation)
                name = f"manager (pid {hello.pid})"
                self._manager.welcome(connection, name, self._welcome(hello, 0))
        except SllmError as error:
            self._server.refuse(connection, error)
        except OSError as error:
            self._server.refuse(connection, SllmError(f"cannot keep this node's identity: {error}"))

    def _welcome(self, hello: Hello, descriptors: int) -> Welcome:
        return Welcome(
            protocol=common_version(hello),
            software=SOFTWARE,
            node=self._identity.identity.node,
            pid=os.getpid(),
            descriptors=descriptors,
        )

    # --- the manager

    def _means(self) -> Inventory:
        return msgspec.structs.replace(
            self._inventory,
            arena=self._store.arena or self._inventory.arena,
            disk_read_bps=self._disk.read_bps,
            software=dict(self._software),
            numerics=self._zygote.numerics,
        )

    def _means_changed(self) -> None:
        if not self._shutdown.is_set():
            self._manager.tell(InventoryUpdate(inventory=self._means()))

    def _truth(self) -> NodeTruth:
        return NodeTruth(
            node=self._identity.identity.node,
            inventory=self._means(),
            checkpoints=self._checkpoints.truths(),
            instances=self._instances.truths(),
            ops=self._operations.running,
            done=self._operations.done,
        )

    def _busy(self) -> bool:
        """Something starts, loads or is ingested, or the node's own processes have yet to begin."""
        if not (self._store.ready and self._zygote.ready):
            return True
        return self._store.loading or self._instances.starting or bool(self._operations.running)

    def _has_huge_pages(self) -> bool:
        return self._store.arena is not None and self._store.arena.pages != "small"

    def _command(self, message: Any) -> None:
        if isinstance(message, StartInstance | Ingest | LoadCheckpoint | VerifyCheckpoint | Publish | Fetch):
            self._disk.give_way()
        match message:
            case Submit():
                self._relay.submit(message)
            case Acked():
                self._relay.acked(message.ends)
            case Cancel():
                self._relay.cancel(message)
            case StartInstance():
                self._instances.start(message)
            case StopInstance():
                self._instances.stop(message)
            case Ingest() | LoadCheckpoint() | DropCheckpoint() | VerifyCheckpoint() | Publish() | Fetch():
                self._operations.begin(message)
            case SetPins():
                self._pin(message)
            case CancelOperation():
                self._operations.cancel(message.op)
            case OperationsAcked():
                self._operations.acked(message.ops)
            case ReadFile():
                self._operations.read_file(message)
            case ReadLog():
                self._own(self._read_log(message), f"read a log for {message.op}")
            case Shutdown():
                _log.info("the manager tells this agent to shut down")
                self.shut_down(message.grace_s)
            case _:
                raise LinkError(f"a manager has no {type(message).__name__} to say")

    async def _read_log(self, message: ReadLog) -> None:
        self._manager.tell(await asyncio.to_thread(self._logs.read, message))

    def _pin(self, message: SetPins) -> None:
        self._checkpoints.pins.set(message.pins)
        self._store.pin(self._checkpoints.pins.on(Tier.DRAM))
        self._own(self._save_pins(), "write the pins")

    async def _save_pins(self) -> None:
        async with self._saving:  # so that an earlier word never replaces a later one
            try:
                await asyncio.to_thread(self._checkpoints.pins.save)
            except OSError as error:
                _log.error("cannot write down what is pinned: %s", error)

    def _manager_changed(self, present: bool) -> None:
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None
        self._deserted = False
        if not present and not self._shutdown.is_set():
            grace_s = self._config.manager_grace_s
            self._grace_timer = asyncio.get_running_loop().call_later(grace_s, self._desert)

    def _desert(self) -> None:
        """No manager has come for too long: what is idle is ended, what is busy once it is idle."""
        self._deserted = True
        why = Fault.of(Unreachable(f"no manager came for {self._config.manager_grace_s:g} s"))
        self._instances.stop_idle(why)

    # --- what the parts tell

    @property
    def spoken(self) -> bool:
        return self._manager.spoken

    def tell(self, message: Message) -> None:
        self._manager.tell(message)

    def attempts_changed(self) -> None:
        self._manager.pump()
        if self._deserted:
            self._desert()

    def load_changed(self, load: InstanceLoad) -> None:
        self._manager.tell_load(load)

    def instance_changed(self, truth: InstanceTruth) -> None:
        if truth.state is InstanceState.STOPPED:
            self._software.pop(truth.instance, None)
            self._ended.add(truth.instance)
            self._own(self._tidy_logs(), "tidy the logs")
        wrong = truth.fault is not None and truth.fault.code == InvalidCheckpoint.code
        if wrong and not truth.kv_capacity_tokens:  # it never served, so nothing of anybody's has ended with it
            self._own(self._look_and_tell(truth), f"look again at {truth.digest}")
            return
        self._manager.tell(InstanceUpdate(truth=truth))
        if wrong:
            self._own(self._look_again(truth.digest), f"look again at {truth.digest}")

    def instance_progress(self, progress: Progress) -> None:
        self._manager.tell(progress)

    def directory_of(self, start: StartInstance) -> tuple[str, str]:
        if self._shutdown.is_set():
            raise Conflict("this agent is shutting down")
        unknown = [str(device) for device in start.devices if device not in self._devices]
        if unknown or not start.devices:
            raise InvalidInput(f"this node has no device {', '.join(unknown) or '(none was given)'}")
        if len(start.devices) > 1:
            raise InvalidInput("the engine runs an instance on one device; start one instance per device")
        return self._checkpoints.source(start.digest, start.devices)

    def worker_dialled(self, life: Life) -> None:
        self._adoption.arrived(life.key)

    def placement_changed(self, digest: str) -> None:
        known = self._checkpoints.knows(digest)
        if known:
            self._manager.tell(PlacementUpdate(truth=self._checkpoints.truth(digest)))
        if not known or self._checkpoints.stale(digest):  # it came with a fetch just now, or is of no use: the disk says
            self._own(self._look_anew(digest), f"look for {digest}")

    async def _tidy_logs(self) -> None:
        async with self._tidying:  # so that none is taken for old before it is noted that it has just ended
            running = {truth.instance for truth in self._instances.truths() if truth.state is not InstanceState.STOPPED}
            ended, self._ended = self._ended, set()
            await asyncio.to_thread(self._logs.tidy, running, ended)

    async def _sweep(self) -> None:
        await asyncio.to_thread(sweep_left, Path(self._config.data_dir), self._config.remote.keep_partial_s)
        await self._measure()

    async def _look_anew(self, digest: str) -> None:
        await self._checkpoints.scan()
        self._manager.tell(PlacementUpdate(truth=self._checkpoints.truth(digest)))

    def happened(self, event: NodeEvent) -> None:
        if not self._shutdown.is_set():  # then the store is ended on purpose
            self._manager.tell_event(event)

    def loaded(self, digest: str) -> None:
        if not self._checkpoints.all_verified(digest):
            self._own(self._look_at_marks(digest), f"look at the marks of {digest}")

    async def _look_at_marks(self, digest: str) -> None:
        if await self._checkpoints.look_at_marks(digest):
            self.placement_changed(digest)

    def load_failed(self, digest: str, fault: Fault) -> None:
        if fault.code == InvalidCheckpoint.code:
            self._own(self._look_again(digest), f"look again at {digest}")
        else:  # what could not be read is not known to be right any more
            self._own(self._look_at_marks(digest), f"look at the marks of {digest}")

    async def _look_again(self, digest: str) -> None:
        """The store or a worker could not use a copy: see whether its small files are why."""
        await self._checkpoints.check_assets(digest)
        self.placement_changed(digest)

    async def _look_and_tell(self, truth: InstanceTruth) -> None:
        """What a copy is found to be comes before the end of the life that could not use it: the manager then plans anew with
        another copy, where it would refuse who waits."""
        try:
            async with asyncio.timeout(self._config.hang_s):
                await self._look_again(truth.digest)
        except TimeoutError:
            _log.warning("the disk does not say in %g s whether %s is sound", self._config.hang_s, truth.digest)
        finally:
            self._manager.tell(InstanceUpdate(truth=truth))

    def checkpoint_came(self, digest: str, then: Callable[[], None]) -> None:
        self._own(self._look_then(digest, then), f"look for {digest}")

    async def _look_then(self, digest: str, then: Callable[[], None]) -> None:
        try:
            await self._checkpoints.scan()
        finally:  # a disk that cannot be read now keeps nobody waiting: what is known of it has to do
            self.placement_changed(digest)
            self.disk_changed()
            then()

    def arena_changed(self) -> None:
        self._means_changed()

    def store_ready(self) -> None:
        self._means_changed()
        self._adoption.arrived("store")
        self._instances.store_ready()

    def store_lost(self) -> None:
        self._instances.store_lost()

    def disk_changed(self) -> None:
        self._own(self._measure(), "measure the disk")

    async def _measure(self) -> None:
        async with self._measuring:  # so that an earlier look never replaces a later one
            self._inventory = await asyncio.to_thread(inventory, self._config, None)
        self._means_changed()
