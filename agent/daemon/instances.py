"""The state machine of instances: weights and worker made side by side, joined, served, drained, ended, and proven dead.

Everything here runs on the agent's loop and is called by what it hears: the manager's commands, the zygote's answers, the
worker's truth, the store's, a dead process, a timer. Nothing waits inside.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from agent.config import NodeConfig
from agent.daemon.attempts import Journal
from agent.daemon.life import Life, WorkerDoor
from agent.daemon.process import Process, describe_status
from agent.daemon.roster import Roster, RosterEntry
from agent.daemon.storelink import StoreLink
from agent.daemon.supervisor import KILL_S, TERM_S
from schema.errors import Conflict, Fault, NotFound, SllmError, TimedOut, Unreachable
from schema.link import (
    Attach,
    Descriptors,
    Fork,
    Forked,
    Hello,
    InstanceTruth,
    Message,
    Progress,
    Resident,
    StartInstance,
    StartPhases,
    StartWorker,
    StopInstance,
    WorkerTruth,
)
from schema.states import InstanceState, Tier

__all__ = ["InstanceOwner", "Instances"]

_STOP_S: Final = 2.0
"""From `StopInstance` to a worker to SIGTERM."""
_STATUS_S: Final = 0.2
"""How long the zygote may take to say how a worker ended, when the system does not."""
_State = InstanceState
_log = logging.getLogger(__name__)


class InstanceOwner(Protocol):
    """Who hears of instances, and knows where checkpoints lie."""

    def instance_changed(self, truth: InstanceTruth) -> None: ...

    def instance_progress(self, progress: Progress) -> None: ...

    def attempts_changed(self) -> None:
        """The journal has something new for the manager."""

    def directory_of(self, start: StartInstance) -> str:
        """The checkpoint's directory, relative to the node's. Raises SllmError for what this node cannot start."""


class Instances:
    """All lives on this node. ``fork`` hands a `Fork` to the zygote if it is there, and says whether it was."""

    def __init__(
        self,
        config: NodeConfig,
        roster: Roster,
        store: StoreLink,
        journal: Journal,
        owner: InstanceOwner,
        fork: Callable[[Message], bool],
    ) -> None:
        self._config = config
        self._roster = roster
        self._store = store
        self._journal = journal
        self._owner = owner
        self._fork_door = fork
        self._current: dict[str, Life] = {}
        self._lives: set[Life] = set()
        self._exits: dict[int, int] = {}
        self._finished = asyncio.Event()

    # --- what the manager commands

    def truths(self) -> tuple[InstanceTruth, ...]:
        return tuple(life.truth() for life in self._current.values())

    def get(self, instance: str, epoch: int) -> Life | None:
        life = self._current.get(instance)
        return life if life is not None and life.start.epoch == epoch else None

    def start(self, message: StartInstance) -> None:
        """Begin a life; a known one is stated again, an older one than known is dropped, an older known one ends first."""
        known = self._current.get(message.instance)
        if known is not None and message.epoch <= known.start.epoch:
            if message.epoch == known.start.epoch:
                self._tell(known)
            return
        life = self._current[message.instance] = Life(message)
        if known is not None and not known.stopped:
            life.after = known if known in self._lives else known.after
            if life.after is not None:
                life.after.before = life
            if known in self._lives:
                self._end(known, quiet=True)
            self._tell(life)
            return
        self._begin(life)

    def stop(self, message: StopInstance) -> None:
        """Drain and end a life; what is not known, or ended, is answered as stopped and then forgotten."""
        life = self._current.get(message.instance)
        if life is None or message.epoch > life.start.epoch:
            digest = ""
            if life is not None:
                digest = life.start.digest
                self.stop(StopInstance(instance=message.instance, epoch=life.start.epoch))
            self._owner.instance_changed(
                InstanceTruth(instance=message.instance, epoch=message.epoch, digest=digest, state=_State.STOPPED)
            )
            return
        if message.epoch < life.start.epoch:
            return
        if life.stopped:
            del self._current[message.instance]
            self._tell(life)
            return
        life.stop_grace_s = message.grace_s
        if life not in self._lives:  # it waits for an older one and was never begun
            if life.after is not None:
                life.after.before = None
            self._finish(life)
            return
        self._roster.put(life.entry())
        self._drain(life)

    def stop_all(self, grace_s: float) -> None:
        """Drain and end every life."""
        for life in list(self._current.values()):
            if not life.stopped:
                self.stop(StopInstance(instance=life.start.instance, epoch=life.start.epoch, grace_s=grace_s))

    def stop_idle(self, why: Fault) -> bool:
        """End what serves nothing now; True when nothing is left running."""
        for life in list(self._current.values()):
            if life in self._lives and life.ending is None and not self._journal.busy(life.key):
                life.fault = life.fault or why
                self._end(life, quiet=True)
        return not self._lives

    async def ended(self, timeout_s: float) -> bool:
        """Wait until every worker is proven dead; False when one is not within ``timeout_s`` seconds."""
        deadline = time.monotonic() + timeout_s
        while self._lives:
            self._finished.clear()
            try:
                await asyncio.wait_for(self._finished.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                return False
        return True

    def check_idle(self, life: Life) -> None:
        """An attempt has ended: what drains and has nothing left is ended."""
        if life.state is _State.DRAINING and not self._journal.busy(life.key):
            self._end(life)

    # --- adoption of what an earlier life of the agent left

    def adopt(self, entry: RosterEntry) -> Process | None:
        """Take a worker of the roster over; returns its process when it is alive and must dial before truth is spoken."""
        assert entry.start is not None
        life = Life(entry.start, nonce=entry.nonce, stop_grace_s=entry.stop_grace_s)
        life.phases = entry.phases or StartPhases()
        self._current[entry.start.instance] = life
        if entry.pid == 0:
            if entry.stop_grace_s is None:
                self._begin(life)
            else:
                self._finish(life)
            return None
        process = entry.open()
        if process is None:
            life.fault = Fault.of(Unreachable("the worker ended while its agent was away"))
            self._finish(life)
            return None
        self._lives.add(life)
        self._set_directory(life)
        self._store.holds.add(life.start.digest, life.user)
        self._own(life, process)
        self._expect(life, self._config.spawn_s, "its worker did not dial the agent again")
        return process

    # --- what the zygote says

    def zygote_ready(self) -> None:
        """A zygote can fork: whatever has no worker yet asks again, so that what an earlier one made late is refused."""
        for life in self._lives:
            if life.process is None and life.ending is None:
                self._fork(life)

    def forked(self, message: Forked) -> None:
        life = next((life for life in self._lives if life.nonce == message.nonce), None)
        if life is None or life.ending is not None:
            if message.pid and (process := Process.open(message.pid)) is not None:
                process.signal(signal.SIGKILL)
            return
        if message.fault is not None:
            self._fail(life, message.fault)
        elif life.process is None:
            self._own_pid(life, message.pid)

    def child_exited(self, pid: int, status: int) -> None:
        for life in self._lives:
            if life.process is not None and life.process.pid == pid:
                self._exits[pid] = status
                if not life.process.alive:
                    self._dead(life)
                return

    # --- what the worker says

    def expected(self, hello: Hello) -> Life:
        """The life that this dialler is the worker of. Raises NotFound for any but the latest one asked for."""
        life = self.get(hello.instance, hello.epoch)
        if life is None or life.nonce != hello.nonce or life not in self._lives:
            raise NotFound(f"no worker is expected for instance {hello.instance}, epoch {hello.epoch}, with this nonce")
        if life.process is None:
            self._own_pid(life, hello.pid)
        if life.process is None or life.process.pid != hello.pid:
            raise Conflict(f"the worker of instance {hello.instance} is another process than {hello.pid}")
        return life

    def worker_stated(self, life: Life, door: WorkerDoor, truth: WorkerTruth) -> None:
        """The worker's truth is complete: go on from where it stands."""
        life.worker = door
        life.asked = truth.start is not None
        life.attached = bool(truth.arena)
        if truth.truth is not None:
            self.worker_changed(life, truth.truth)
        if life.stop_grace_s is not None or life.ending is not None:
            if life.ending is None:
                self._drain(life)
            else:
                door.send(StopInstance(instance=life.start.instance, epoch=life.start.epoch))
            return
        if life.state is not _State.STARTING:
            return
        if not life.directory:
            self._fail(life, Fault.of(NotFound(f"checkpoint {life.start.digest} is no longer on this node's disk")))
            return
        if not life.asked:
            life.asked = True
            door.send(StartWorker(start=life.start, directory=str(self._config.checkpoints_path / life.directory)))
        if life.attached:
            self._expect(life, self._config.start_s, "its worker did not become ready")
        elif life.resident is None and not life.fill:
            self._fill(life)
        self._expect_attach(life)

    def worker_lost(self, life: Life, door: WorkerDoor) -> None:
        """The worker's link broke; it dials again, or its process is found dead."""
        if life.worker is door:
            life.worker = None

    def worker_changed(self, life: Life, truth: InstanceTruth) -> None:
        """The worker says how far it is."""
        if truth.state is _State.STOPPED:
            self._fail(life, truth.fault or Fault.of(SllmError("the worker stopped without saying why")))
        elif truth.state is _State.READY and life.state is _State.STARTING and life.ending is None:
            life.cancel_timer()
            life.state = _State.READY
            life.kv_capacity_tokens = truth.kv_capacity_tokens
            life.max_context_tokens = truth.max_context_tokens
            if not life.phases.total_s:
                told = truth.phases or StartPhases()
                total_s = time.monotonic() - life.begun
                life.phases = msgspec.structs.replace(
                    life.phases, build_s=told.build_s, attach_s=told.attach_s, warm_s=told.warm_s, total_s=total_s
                )
            self._roster.put(life.entry())
            self._tell(life)

    # --- what the store says

    def store_ready(self) -> None:
        for life in self._lives:
            self._expect_attach(life)

    def store_lost(self) -> None:
        """Extents that no worker was told yet are void; they are asked for again."""
        for life in list(self._lives):
            if not life.attached and life.resident is not None and life.ending is None:
                life.resident = None
                self._fill(life)

    # --- steps

    def _begin(self, life: Life) -> None:
        try:
            life.directory = self._owner.directory_of(life.start)
        except SllmError as error:
            life.fault = Fault.of(error)
            self._finish(life)
            return
        self._lives.add(life)
        life.begun = time.monotonic()
        self._store.holds.add(life.start.digest, life.user)
        self._fill(life)
        if life in self._lives and life.ending is None:
            self._fork(life)
            self._expect(life, self._config.spawn_s, "its worker did not come up")
            self._tell(life)

    def _set_directory(self, life: Life) -> None:
        try:
            life.directory = self._owner.directory_of(life.start)
        except SllmError as error:
            _log.warning("instance %s: %s", life.start.instance, error)

    def _fill(self, life: Life) -> None:
        def answered(answer: Resident | Fault) -> None:
            life.fill = ""
            if isinstance(answer, Fault):
                self._fail(life, answer)
                return
            life.resident = answer
            if not life.phases.load_s:
                life.phases = msgspec.structs.replace(
                    life.phases,
                    load_s=time.monotonic() - life.begun,
                    loaded_from=Tier.DISK if answer.read_bytes else Tier.DRAM,
                    loaded_bytes=answer.read_bytes,
                )
            self._expect_attach(life)

        def progressed(progress: Progress) -> None:
            self._owner.instance_progress(msgspec.structs.replace(progress, op=life.start.instance))

        life.fill = self._store.fill(life.start.digest, life.directory, answered, progressed)

    def _fork(self, life: Life) -> None:
        life.nonce = secrets.randbits(52) + 1
        self._roster.put(life.entry())
        self._fork_door(Fork(instance=life.start.instance, epoch=life.start.epoch, nonce=life.nonce))

    def _own_pid(self, life: Life, pid: int) -> None:
        process = Process.open(pid)
        if process is None:
            status = describe_status(self._exits.pop(pid, None))
            self._fail(life, Fault.of(SllmError(f"the worker (pid {pid}) {status} at once")))
            return
        life.phases = msgspec.structs.replace(life.phases, fork_s=time.monotonic() - life.begun)
        self._own(life, process)

    def _own(self, life: Life, process: Process) -> None:
        life.process = process
        self._roster.put(life.entry())
        process.when_dead(lambda: self._process_died(life))

    def _expect(self, life: Life, limit_s: float, what: str) -> None:
        life.cancel_timer()
        fault = Fault.of(TimedOut(f"{what} within {limit_s:g} s"))
        life.timer = asyncio.get_running_loop().call_later(limit_s, lambda: self._fail(life, fault))

    def _expect_attach(self, life: Life) -> None:
        """Give the worker its weights, as soon as both are there."""
        if life.worker is None or not life.asked or life.attached or life.ending is not None:
            return
        life.cancel_timer()
        if life.resident is None or not self._store.ready or self._store.arena is None:
            return
        try:
            descriptor = self._store.reopen()
        except (SllmError, OSError) as error:
            self._fail(life, Fault.of(error))
            return
        try:
            life.worker.send(Descriptors(what="arena-ro"), (descriptor,))
        finally:
            os.close(descriptor)
        resident = life.resident
        life.attached = True
        life.worker.send(Attach(arena=self._store.arena.id, extents=resident.extents, image_bytes=resident.image_bytes))
        self._expect(life, self._config.start_s, "its worker did not become ready")

    def _drain(self, life: Life) -> None:
        grace_s = life.stop_grace_s or 0.0
        if life.state in (_State.READY, _State.DRAINING) and grace_s > 0 and self._journal.busy(life.key):
            life.state = _State.DRAINING
            life.cancel_timer()
            life.timer = asyncio.get_running_loop().call_later(grace_s, lambda: self._end(life))
            self._tell(life)
        else:
            self._end(life)

    def _fail(self, life: Life, fault: Fault) -> None:
        if life in self._lives:
            life.fault = life.fault or fault
            self._end(life, quiet=True)

    def _end(self, life: Life, *, quiet: bool = False) -> None:
        """End the worker, by word, then by signal. ``quiet``: nobody asked for it, so only the end is told."""
        if life.ending is not None or life not in self._lives:
            return
        life.cancel_timer()
        if not quiet:
            life.state = _State.STOPPING
            self._tell(life)
        if life.fill:
            self._store.withdraw(life.fill)
            life.fill = ""
        if life.process is None:
            self._finish(life)
        elif life.process.alive:
            told = life.worker is not None
            if life.worker is not None:
                life.worker.send(StopInstance(instance=life.start.instance, epoch=life.start.epoch))
            loop = asyncio.get_running_loop()
            life.ending = loop.create_task(self._ensure_dead(life, life.process, told), name=f"end {life.user}")

    async def _ensure_dead(self, life: Life, process: Process, told: bool) -> None:
        if told and await process.wait(_STOP_S):
            return
        if not await process.end(TERM_S, KILL_S):
            _log.error("worker %d of instance %s could not be killed", process.pid, life.start.instance)

    def _process_died(self, life: Life) -> None:
        process = life.process
        assert process is not None
        if process.status is None and process.pid not in self._exits:
            asyncio.get_running_loop().call_later(_STATUS_S, self._dead, life)
        else:
            self._dead(life)

    def _dead(self, life: Life) -> None:
        """The worker is proven dead, and how it ended is known as well as it will be."""
        if life not in self._lives or life.process is None:
            return
        told = self._exits.pop(life.process.pid, None)
        status = life.process.status if life.process.status is not None else told
        if life.stop_grace_s is None and life.fault is None:
            life.fault = Fault.of(Unreachable(f"the worker (pid {life.process.pid}) {describe_status(status)}"))
        self._finish(life)

    def _finish(self, life: Life) -> None:
        """The life is over and nothing of it runs."""
        began = life in self._lives
        self._lives.discard(life)
        life.cancel_timer()
        life.state = _State.STOPPED
        life.nonce = 0
        if life.worker is not None:
            life.worker.close("its process is dead")
        if life.fill:
            self._store.withdraw(life.fill)
            life.fill = ""
        if life.fault is not None:
            _log.warning("instance %s, epoch %d: %s", life.start.instance, life.start.epoch, life.fault.message)
        current = self._current.get(life.start.instance) is life
        if current:
            if life.stop_grace_s is not None:
                del self._current[life.start.instance]
            self._tell(life)
        why = life.fault.message if life.fault is not None else f"instance {life.start.instance} was stopped"
        self._journal.lose(life.key, why)
        self._owner.attempts_changed()
        self._roster.remove(life.entry())
        if began:
            self._store.holds.release(life.start.digest, life.user)
            self._finished.set()
        if (following := life.before) is not None:
            life.before = following.after = None
            self._begin(following)

    def _tell(self, life: Life) -> None:
        self._owner.instance_changed(life.truth())
