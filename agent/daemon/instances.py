"""What becomes of an instance by what is heard: from the manager, the zygote, its worker, the store."""

from __future__ import annotations

import asyncio
import logging
import signal
import time

import msgspec

from agent.daemon.life import Life, WorkerDoor
from agent.daemon.lives import Lives
from agent.daemon.process import Process
from agent.daemon.roster import RosterEntry
from schema.errors import Conflict, Fault, NotFound, SllmError, TimedOut, Unreachable
from schema.link import (
    Forked,
    Hello,
    InstanceTruth,
    StartInstance,
    StartPhases,
    StopInstance,
    WorkerTruth,
)
from schema.states import InstanceState

__all__ = ["Instances"]

_State = InstanceState
_log = logging.getLogger(__name__)


class Instances(Lives):
    """All instances on this node: the one known life of each, and what becomes of it by what is heard."""

    # --- what the manager commands

    def truths(self) -> tuple[InstanceTruth, ...]:
        return tuple(life.truth() for life in self._current.values())

    @property
    def starting(self) -> bool:
        """True while a life is on its way to ready, or waits for an older one to end."""
        return any(life.state is _State.STARTING for life in self._current.values())

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
        if life.directory and entry.directory and not entry.fetching:  # the worker may be built over it
            life.directory, life.image_id = entry.directory, entry.image_id
        self._hold(life)
        if entry.fetching and not life.directory and entry.stop_grace_s is None:
            self._fetch(life)  # the store goes on with it under the same name
        self._own(life, process)
        self._expect(life, self._config.spawn_s, "its worker did not dial the agent again")
        return process

    # --- what the zygote says

    def zygote_ready(self) -> None:
        """A zygote can fork: whatever has no worker yet asks again, so that what an earlier one made late is refused."""
        for life in self._lives:
            if life.process is None and life.ending is None:
                life.phases = msgspec.structs.replace(life.phases, zygote_s=time.monotonic() - life.begun)
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
        life.worker, life.offered = door, None
        life.asked = truth.start is not None
        life.attached = bool(truth.arena) or truth.weights is not None
        if truth.truth is not None:
            self.worker_changed(life, truth.truth)
        if life.stop_grace_s is not None or life.ending is not None:
            if life.ending is None:
                self._drain(life)
            else:
                door.send(StopInstance(instance=life.start.instance, epoch=life.start.epoch))
            return
        if life.state is not _State.STARTING:
            life.cancel_timer()
            if life.attached:
                return
        if life.fetch and not life.directory:
            life.cancel_timer()  # it is there, and waits
            return
        if not life.directory:
            self._fail(life, Fault.of(NotFound(f"checkpoint {life.start.digest} is no longer on this node's disk")))
            return
        self._ask_worker(life)

    def worker_lost(self, life: Life, door: WorkerDoor) -> None:
        """The worker's link broke; it dials again, or its process is found dead, or it is ended."""
        if life.worker is not door:
            return
        life.worker = None
        if life.state is _State.READY and life.ending is None:
            self._expect(life, self._config.spawn_s, "its worker did not dial the agent again")

    def worker_hung(self, life: Life, silent_s: float) -> None:
        """A worker leaves questions unanswered. One that still starts has a time of its own for that."""
        if life.state is not _State.STARTING and life.worker is not None:
            life.worker.close("it does not answer")
            self._fail(life, Fault.of(TimedOut(f"its worker has not answered for {silent_s:.0f} s (hang_s)")))

    def worker_changed(self, life: Life, truth: InstanceTruth) -> None:
        """The worker says how far it is."""
        if truth.state is _State.STOPPED:
            self._fail(life, truth.fault or Fault.of(SllmError("the worker stopped without saying why")))
        elif truth.state is _State.READY and life.ending is None and (life.state is _State.STARTING or not life.whole):
            if life.state is _State.STARTING:
                life.cancel_timer()
                life.state = _State.READY
            life.kv_capacity_tokens = truth.kv_capacity_tokens
            life.max_context_tokens = truth.max_context_tokens
            life.activation_bytes, life.logits_bytes = truth.activation_bytes, truth.logits_bytes
            if (told := truth.phases) is not None and not life.whole:
                total_s = time.monotonic() - life.begun
                life.phases = msgspec.structs.replace(
                    life.phases, build_s=told.build_s, attach_s=told.attach_s, warm_s=told.warm_s, total_s=total_s
                )
            self._roster.put(life.entry())
            self._tell(life)

    # --- what the store says

    def store_ready(self) -> None:
        for life in list(self._lives):
            self._expect_attach(life)

    def store_lost(self) -> None:
        """Extents that no worker was told yet are void; they are asked for again."""
        for life in list(self._lives):
            life.arriving = None
            if life.attached or life.ending is not None:
                continue
            if life.fetch:  # the next store says anew whether the weights come to its arena
                self._store.withdraw(life.fill)
                life.fill, life.resident = "", None
            elif life.resident or life.weights:
                life.resident = life.weights = None
                self._fill(life)
