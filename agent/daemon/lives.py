"""The steps of a life: weights and worker made side by side, joined, drained, ended, and proven dead.

Everything here runs on the agent's loop and nothing waits inside: what a step begins is answered by a call later.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from agent.config import NodeConfig
from agent.daemon.attempts import Journal
from agent.daemon.life import Life
from agent.daemon.logs import NodeLogs
from agent.daemon.process import Process, describe_status
from agent.daemon.roster import Roster
from agent.daemon.storelink import StoreLink
from agent.daemon.supervisor import KILL_S, TERM_S
from schema.errors import Fault, InvalidCheckpoint, InvalidInput, NotFound, SllmError, TimedOut, Unreachable
from schema.link import (
    Arriving,
    Attach,
    Descriptors,
    DeviceWeights,
    Fetching,
    FetchStored,
    Fork,
    InstanceTruth,
    LayersArrived,
    Message,
    OnDevice,
    OperationDone,
    Progress,
    Resident,
    StartInstance,
    StartWorker,
    StopInstance,
)
from schema.states import InstanceState, Tier

__all__ = ["InstanceOwner", "Lives"]

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

    def checkpoint_came(self, digest: str, then: Callable[[], None]) -> None:
        """A checkpoint has come to the disk: ``then`` is called once its directory is known."""

    def directory_of(self, start: StartInstance) -> tuple[str, str]:
        """The checkpoint's directory, relative to the node's, and its image's id. Raises SllmError for what this node cannot
        start."""


class Lives:
    """The lives that have a worker, or will, and what is done to one of them; `Instances` decides when.

    ``fork`` hands a `Fork` to the zygote if it is there, and says whether it was. ``cuda`` are the devices whose memory the
    store owns.
    """

    def __init__(
        self,
        config: NodeConfig,
        roster: Roster,
        store: StoreLink,
        journal: Journal,
        owner: InstanceOwner,
        fork: Callable[[Message], bool],
        cuda: frozenset[int] = frozenset(),
    ) -> None:
        self._cuda = cuda
        self._config = config
        self._roster = roster
        self._store = store
        self._journal = journal
        self._owner = owner
        self._fork_door = fork
        self._current: dict[str, Life] = {}
        self._lives: set[Life] = set()
        self._exits: dict[int, int] = {}
        self._logs = NodeLogs(config)
        self._finished = asyncio.Event()

    def _begin(self, life: Life) -> None:
        try:
            life.directory, life.image_id = self._owner.directory_of(life.start)
        except SllmError as error:
            if life.start.remote is None or not isinstance(error, NotFound | InvalidCheckpoint):
                life.fault = Fault.of(error)
                self._finish(life)
                return
        self._lives.add(life)
        life.begun = time.monotonic()
        self._hold(life, waits=True)
        if life.directory:
            self._fill(life)
        else:
            self._fetch(life)
        if life in self._lives and life.ending is None:
            self._fork(life)
            self._expect(life, self._config.spawn_s, "its worker did not come up")
            self._tell(life)

    def _set_directory(self, life: Life) -> None:
        try:
            life.directory, life.image_id = self._owner.directory_of(life.start)
        except SllmError as error:
            _log.warning("instance %s: %s", life.start.instance, error)

    def _on_device(self, life: Life) -> bool:
        """True when its weights are to lie on devices, which the store owns; else they stay in DRAM."""
        return bool(self._cuda.intersection(life.start.devices))

    def _hold(self, life: Life, *, waits: bool = False) -> None:
        start = life.start
        if self._on_device(life):
            engine_bytes = start.options.kv_bytes + start.options.step_bytes
            self._store.devices.hold(start.digest, start.devices, life.user, engine_bytes, waits=waits)
        else:
            self._store.holds.add(start.digest, life.user, waits=waits)

    def _release(self, life: Life) -> None:
        if self._on_device(life):
            self._store.devices.release(life.start.digest, life.start.devices, life.user)
        else:
            self._store.holds.release(life.start.digest, life.user)

    def _withdraw(self, life: Life) -> None:
        """Nobody waits for its weights any more."""
        if life.fill:
            self._store.devices.withdraw(life.fill)
            self._store.withdraw(life.fill)
        if life.fetch:
            self._store.cancel_fetch(life.fetch, keep=_is_usable(life))
        life.fill = life.fetch = ""

    def _fill(self, life: Life) -> None:
        def answered(answer: Resident | OnDevice | Fault) -> None:
            life.fill, life.arriving = "", None
            if isinstance(answer, Fault):
                self._not_loaded(life, answer)
                return
            if isinstance(answer, OnDevice):
                image: DeviceWeights | Resident = answer.weights[0]
                life.weights, source = answer.weights[0], answer.source
            else:
                image = life.resident = answer
                source = Tier.DISK if answer.read_bytes else Tier.DRAM
            if life.fetch:
                self._fetched(life)
            elif not life.phases.load_s:
                life.phases = msgspec.structs.replace(
                    life.phases,
                    load_s=time.monotonic() - life.begun,
                    loaded_from=source,
                    loaded_bytes=answer.read_bytes,
                )
            if life.phases.loaded_from is Tier.REMOTE:
                came = 0 if life.lay_there == image.image_id else image.image_bytes
                life.phases = msgspec.structs.replace(life.phases, loaded_bytes=came)
            self._expect_attach(life)

        def progressed(progress: Progress) -> None:
            if life.fetch:  # which tells its own
                return
            self._owner.instance_progress(msgspec.structs.replace(progress, op=life.start.instance))

        def arriving(message: Arriving | LayersArrived) -> None:
            if isinstance(message, Arriving):
                life.arriving = message
            elif life.arriving is not None:
                life.arriving = msgspec.structs.replace(life.arriving, layers=message.layers)
            self._offer(life)

        digest, directory, image_id = life.start.digest, life.directory, life.image_id
        if self._on_device(life):
            tier, devices = self._store.devices, life.start.devices
            life.fill = tier.fill(digest, directory, devices, answered, progressed, user=life.user, image_id=image_id)
        else:
            life.fill = self._store.fill(
                digest, directory, answered, progressed, user=life.user, arriving=arriving, image_id=image_id
            )

    def _fetch(self, life: Life) -> None:
        """Its weights come from a remote, to the disk and into the arena at once. The worker builds its model beside that, and
        serves once they are in the arena; what the disk makes of them then is heard later, and ends the life if it is a fault.
        """
        remote, digest = life.start.remote, life.start.digest
        assert remote is not None

        def coming(message: Fetching) -> None:
            life.directory, life.partial = f"{digest}/{message.layout}", message.directory
            life.image_id = message.image_id
            self._go_on(life, fill=message.in_memory and not self._on_device(life))

        def answered(done: OperationDone) -> None:
            if done.fault is not None:
                self._not_loaded(life, done.fault)
            else:
                self._owner.checkpoint_came(digest, committed)

        def committed() -> None:
            if life not in self._lives or life.ending is not None:
                return
            said = life.directory, life.image_id
            life.fetch = life.directory = life.partial = ""
            self._set_directory(life)
            if not life.directory:
                self._fail(life, Fault.of(NotFound(f"checkpoint {digest} was fetched and is gone again")))
                return
            if said[0]:  # the worker is built over this one, though another that came meanwhile may be as good
                life.directory, life.image_id = said
            self._roster.put(life.entry())
            self._fetched(life)
            self._go_on(life, fill=True)

        def progressed(progress: Progress) -> None:
            self._owner.instance_progress(msgspec.structs.replace(progress, op=life.start.instance))

        life.fetch = f"fetch {life.user}"
        resident = self._store.residents.get(digest)
        life.lay_there = resident.image_id if resident is not None else None
        users = self._store.holds.count(digest)
        devices = life.start.devices if self._on_device(life) else ()
        asked = FetchStored(
            op=life.fetch, digest=digest, url=remote.url, layout=remote.layout, in_memory=True, users=users, devices=devices
        )
        self._store.fetch(asked, answered, progressed, coming)

    def _go_on(self, life: Life, *, fill: bool) -> None:
        """Where the files lie is known; ``fill``: the weights can be had too."""
        if life.attached:
            return
        if fill and not (life.resident or life.weights or life.fill):
            self._fill(life)
        self._ask_worker(life)

    def _not_loaded(self, life: Life, fault: Fault) -> None:
        """The store cannot give it its weights; while they are being fetched that is the remote's fault, or the network's."""
        if life.fetch and life.start.remote is not None:
            life.remote = life.remote or life.start.remote.url
        self._fail(life, fault)

    def _fetched(self, life: Life) -> None:
        if not life.phases.load_s:
            load_s = time.monotonic() - life.begun
            life.phases = msgspec.structs.replace(life.phases, load_s=load_s, loaded_from=Tier.REMOTE)

    def _ask_worker(self, life: Life) -> None:
        """Let the worker, if it is there, build its model; and give it its weights, if those are."""
        if life.worker is None:
            return
        if not life.asked:
            life.asked = True
            committed = self._config.checkpoints_path / life.directory
            fetched = (str(Path(self._config.data_dir) / life.partial),) if life.partial else ()
            life.worker.send(StartWorker(start=life.start, directories=(*fetched, str(committed))))
        if life.attached:
            self._expect(life, self._config.start_s, "its worker did not become ready")
        elif life.resident is None and life.weights is None and not life.fill and not life.fetch:
            self._fill(life)
        self._expect_attach(life)
        self._offer(life)

    def _fork(self, life: Life) -> None:
        life.nonce = secrets.randbits(52) + 1
        self._roster.put(life.entry())
        log = str(self._logs.of_instance(life.start))
        cuda = tuple(sorted(self._cuda.intersection(life.start.devices)))
        self._fork_door(Fork(instance=life.start.instance, epoch=life.start.epoch, nonce=life.nonce, log=log, cuda=cuda))

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
        if life.state is _State.STARTING:
            life.cancel_timer()
        if life.weights is not None:
            self._attach_device(life, life.weights)
            return
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
        place = Attach(
            arena=self._store.arena.id,
            extents=resident.extents,
            image_id=resident.image_id,
            image_bytes=resident.image_bytes,
        )
        life.worker.send(place)
        if life.state is _State.STARTING:
            self._expect(life, self._config.start_s, "its worker did not become ready")

    def _offer(self, life: Life) -> None:
        """Tell the worker where its weights come to lie and which layers have come: it may be ready before the last has."""
        arriving, arena = life.arriving, self._store.arena
        if life.worker is None or not life.asked or life.attached or life.ending is not None:
            return
        if arriving is None or arena is None or not self._store.ready:
            return
        place = arena.id, arriving.extents
        if life.offered == place:
            life.worker.send(LayersArrived(op=arriving.op, layers=arriving.layers))
            return
        try:
            descriptor = self._store.reopen()
        except (SllmError, OSError):
            return  # `_expect_attach` says what that means, when all has come
        try:
            life.worker.send(Descriptors(what="arena-ro"), (descriptor,))
        finally:
            os.close(descriptor)
        life.offered = place
        life.worker.send(msgspec.structs.replace(arriving, arena=arena.id))

    def _attach_device(self, life: Life, weights: DeviceWeights) -> None:
        assert life.worker is not None
        try:
            descriptor = self._store.devices.descriptor(weights)
        except SllmError as error:
            self._fail(life, Fault.of(error))
            return
        life.attached = True
        life.worker.send(Descriptors(what="device", weights=weights), (descriptor,))
        life.worker.send(Attach(image_id=weights.image_id, image_bytes=weights.image_bytes, weights=weights))
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
        self._withdraw(life)
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
        if life.worker is not None:
            life.worker.drain()  # its last tokens, and perhaps why it ended
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
        self._withdraw(life)
        if life.fault is not None:
            _log.warning("instance %s, epoch %d: %s", life.start.instance, life.start.epoch, life.fault.message)
        if self._current.get(life.start.instance) is life:
            if life.stop_grace_s is not None:
                del self._current[life.start.instance]
            self._tell(life)
        why = life.fault.message if life.fault is not None else f"instance {life.start.instance} was stopped"
        self._journal.lose(life.key, why)
        self._owner.attempts_changed()
        self._roster.remove(life.entry())
        if began:
            self._release(life)
            self._finished.set()
        if (following := life.before) is not None:
            life.before = following.after = None
            self._begin(following)

    def _tell(self, life: Life) -> None:
        self._owner.instance_changed(life.truth())


def _is_usable(life: Life) -> bool:
    """True when what was fetched for this life is of use to the next one: its checkpoint is not at fault."""
    return life.fault is None or life.fault.code not in (InvalidCheckpoint.code, InvalidInput.code)
