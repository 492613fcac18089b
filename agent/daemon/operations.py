"""Operations: ingest, load ahead of need, drop, each with exactly one end that is kept until the manager has it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import PurePath
from typing import Final, Protocol, TypeVar

import msgspec

from agent.config import NodeConfig
from agent.daemon.catalog import Checkpoints
from agent.daemon.ingest import ForkIngestDoor, IngestCommand, run_ingest, run_publish
from agent.daemon.roster import Roster
from agent.daemon.storelink import StoreLink
from agent.native.jobs import Priority
from schema.checkpoint import IN_PLACE, LAYOUT
from schema.errors import Cancelled, Conflict, Fault, InvalidCheckpoint, InvalidInput, NotFound, SllmError
from schema.link import (
    Committing,
    DropCheckpoint,
    Fetch,
    FetchStored,
    FileChunk,
    Ingest,
    LoadCheckpoint,
    Message,
    OnDevice,
    OperationDone,
    Progress,
    Publish,
    ReadFile,
    Resident,
    VerifyCheckpoint,
)
from schema.spec import PathSource
from schema.states import Tier

__all__ = ["OperationOwner", "Operations"]

T = TypeVar("T")
Operation = Ingest | LoadCheckpoint | DropCheckpoint | VerifyCheckpoint | Publish | Fetch

_INGESTS: Final = 2
"""Ingests at once, and as many publishes; more would only share the disk."""
_log = logging.getLogger(__name__)


class OperationOwner(Protocol):
    """Who passes things on to the manager."""

    def tell(self, message: Message) -> None: ...

    def placement_changed(self, digest: str) -> None: ...

    def disk_changed(self) -> None: ...

    def checkpoint_came(self, digest: str, then: Callable[[], None]) -> None:
        """A checkpoint has come to the disk: ``then`` is called once its directory is known."""


class Operations:
    """Every operation by its op, each a task of its own. ``fork`` and ``ingest`` are the two ways to the child of an ingest."""

    def __init__(
        self,
        config: NodeConfig,
        roster: Roster,
        store: StoreLink,
        checkpoints: Checkpoints,
        owner: OperationOwner,
        fork: ForkIngestDoor,
        ingest: IngestCommand,
    ) -> None:
        self._config = config
        self._roster = roster
        self._store = store
        self._checkpoints = checkpoints
        self._owner = owner
        self._fork = fork
        self._ingest = ingest
        self._running: dict[str, asyncio.Task[None]] = {}
        self._done: dict[str, OperationDone] = {}
        self._reads: set[asyncio.Task[None]] = set()
        self._dropping: set[str] = set()
        self._publishing: dict[str, str] = {}
        self._drop_ops: set[str] = set()
        self._ingest_slots = asyncio.Semaphore(_INGESTS)
        self._publish_slots = asyncio.Semaphore(_INGESTS)

    @property
    def running(self) -> tuple[str, ...]:
        return tuple(self._running)

    @property
    def done(self) -> tuple[OperationDone, ...]:
        return tuple(self._done.values())

    def begin(self, message: Operation) -> None:
        """Begin an operation; a known one that has ended is answered again, and one under way will be."""
        if (done := self._done.get(message.op)) is not None:
            self._owner.tell(done)
        elif message.op not in self._running:
            task = asyncio.get_running_loop().create_task(self._run(message), name=f"operation {message.op}")
            if isinstance(message, DropCheckpoint):
                self._drop_ops.add(message.op)
            self._running[message.op] = task

    def cancel(self, op: str) -> None:
        """End an operation early; one that has ended is answered again."""
        if (task := self._running.get(op)) is not None:
            task.cancel()
        elif (done := self._done.get(op)) is not None:
            self._owner.tell(done)
        else:
            self._owner.tell(OperationDone(op=op, fault=Fault.of(Cancelled("the operation is not under way on this node"))))

    def acked(self, ops: tuple[str, ...]) -> None:
        for op in ops:
            self._done.pop(op, None)

    def read_file(self, message: ReadFile) -> None:
        """Answer with a `FileChunk`, from a thread."""
        task = asyncio.get_running_loop().create_task(self._read(message), name=f"read {message.file}")
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)

    async def stop(self) -> None:
        """Cancel everything and wait until it has ended."""
        tasks = [*self._running.values(), *self._reads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, message: Operation) -> None:
        op = message.op
        try:
            if isinstance(message, Ingest):
                done = await self._run_ingest(message)
            elif isinstance(message, LoadCheckpoint):
                done = await self._load(message)
            elif isinstance(message, Publish):
                done = await self._publish(message)
            elif isinstance(message, Fetch):
                done = await self._fetch(message)
            elif isinstance(message, VerifyCheckpoint):
                done = await self._verify(message)
            else:
                done = await self._drop(message)
        except asyncio.CancelledError:
            done = OperationDone(op=op, fault=Fault.of(Cancelled("the operation was cancelled")))
        except SllmError as error:
            done = OperationDone(op=op, fault=Fault.of(error))
        except Exception as error:
            _log.exception("operation %s failed", op)
            done = OperationDone(op=op, fault=Fault.of(error))
        del self._running[op]
        self._drop_ops.discard(op)
        self._done[op] = done
        self._owner.tell(done)

    async def _run_ingest(self, message: Ingest) -> OperationDone:
        await self._drops_over()
        digest = ""
        try:
            async with self._ingest_slots:
                done = await self._ingest_to_disk(message)
            if not (digest := done.digest):
                return done
        finally:
            if not digest:
                await self._checkpoints.scan()
                self._owner.disk_changed()
        told = asyncio.Event()
        self._owner.checkpoint_came(done.digest, told.set)
        with contextlib.suppress(asyncio.CancelledError):  # too late: its end says what it has brought
            await told.wait()
        return done

    async def _ingest_to_disk(self, message: Ingest) -> OperationDone:
        """One that was killed, or cancelled, while it committed, and told no end, has ended well if its checkpoint is there:
        else no model would have that, and another ingest would read, and need room for, all of it again."""
        layout = IN_PLACE if isinstance(message.source, PathSource) and message.source.in_place else LAYOUT
        committing = ""

        def said(message: Progress | Committing) -> None:
            nonlocal committing
            if isinstance(message, Committing):
                committing = message.digest
            else:
                self._owner.tell(message)

        try:
            return await run_ingest(self._config, message, self._fork, self._ingest, self._roster, said)
        except (SllmError, asyncio.CancelledError):
            if not committing or not await self._checkpoints.has_come(committing, layout):
                raise
        return OperationDone(op=message.op, digest=committing)

    async def _publish(self, message: Publish) -> OperationDone:
        digest = message.digest
        directory = self._checkpoints.directory(digest)
        self._publishing[message.op] = digest
        fine = False
        try:
            async with self._publish_slots:
                done = await run_publish(self._config, message, directory, self._roster, self._owner.tell)
            fine = done.fault is None
        finally:
            del self._publishing[message.op]
            if not fine:  # it may have put the copy into quarantine, or found that it cannot be read
                await self._checkpoints.scan()
                self._owner.placement_changed(digest)
        return done

    async def _fetch(self, message: Fetch) -> OperationDone:
        digest, in_memory = message.digest, message.tier is Tier.DRAM
        if message.tier not in (Tier.DRAM, Tier.DISK):
            raise InvalidInput(f"a checkpoint can be fetched to {Tier.DRAM} or {Tier.DISK}, not to {message.tier}")
        await self._drops_over()
        if digest in self._dropping:
            raise Conflict(f"checkpoint {digest} is just being dropped")
        layout = ""  # of what was fetched: of a copy that is here nobody knows whether the remote has it too
        came_bytes = 0
        missing = self._checkpoints.layout(digest) is None
        if in_memory:  # from the first byte on, until this operation ends however it does
            self._store.holds.add(digest, message.op, waits=True)
        try:
            if missing:
                done = await self._fetch_stored(message, in_memory)
                if done.fault is not None:
                    return done
                layout, came_bytes = done.layout, done.read_bytes
            if in_memory:
                loaded = await self._load(LoadCheckpoint(op=message.op, digest=digest))
                return msgspec.structs.replace(loaded, layout=layout, read_bytes=came_bytes or loaded.read_bytes)
            return OperationDone(op=message.op, digest=digest, layout=layout, read_bytes=came_bytes)
        finally:
            self._store.holds.release(digest, message.op)

    async def _fetch_stored(self, message: Fetch, in_memory: bool) -> OperationDone:
        digest = message.digest
        users = self._store.holds.count(digest)
        asked = FetchStored(
            op=message.op, digest=digest, url=message.url, layout=message.layout, in_memory=in_memory, users=users
        )
        answer: asyncio.Future[OperationDone] = asyncio.get_running_loop().create_future()
        told = asyncio.Event()

        def answered(done: OperationDone) -> None:
            self._owner.checkpoint_came(digest, told.set)  # what has become of it is told, also if nobody waits any more
            _answer(answer)(done)

        self._store.fetch(asked, answered, self._owner.tell)
        try:
            done = await answer
        finally:
            self._store.cancel_fetch(message.op)
        await told.wait()
        return msgspec.structs.replace(done, op=message.op, digest=digest)

    async def _load(self, message: LoadCheckpoint) -> OperationDone:
        if message.tier not in (Tier.DRAM, Tier.DEVICE):
            raise InvalidInput(f"a checkpoint can be loaded ahead to {Tier.DRAM} or {Tier.DEVICE}, not to {message.tier}")
        op, digest, tier = message.op, message.digest, self._store.devices
        devices = (message.device,) if message.tier is Tier.DEVICE else ()
        directory, image_id = self._checkpoints.source(digest, devices)
        answer: asyncio.Future[Resident | OnDevice | Fault] = asyncio.get_running_loop().create_future()

        def progressed(progress: Progress) -> None:
            self._owner.tell(msgspec.structs.replace(progress, op=op))

        answered, ahead = _answer(answer), Priority.PREFETCH
        with contextlib.ExitStack() as held:
            if devices:  # weights that nobody uses then, so that they stay until the memory is needed
                tier.hold(digest, devices, op, 0, waits=True)
                held.callback(tier.release, digest, devices, op)
                fill = tier.fill(digest, directory, devices, answered, progressed, user=op, priority=ahead, image_id=image_id)
                held.callback(tier.withdraw, fill)
            else:
                held.callback(self._store.holds.release, digest, op)
                fill = self._store.fill(digest, directory, answered, progressed, user=op, priority=ahead, image_id=image_id)
                held.callback(self._store.withdraw, fill)
            result = await answer
        if isinstance(result, Fault):
            return OperationDone(op=op, digest=digest, fault=result)
        return OperationDone(op=op, digest=digest, read_bytes=result.read_bytes)

    async def _verify(self, message: VerifyCheckpoint) -> OperationDone:
        """Both quarantine and its end are written by the store; what it found is read again before the end is told."""
        digest = message.digest
        await self._checkpoints.scan()
        if not (copies := self._checkpoints.copies(digest)):
            raise NotFound(f"checkpoint {digest} is not on this node's disk")
        bad: dict[str, Fault] = {}
        for directory in copies:
            fault = await self._verify_copy(message.op, digest, directory)
            if fault is None:
                await self._checkpoints.found_right(directory)
            await self._checkpoints.scan()
            self._owner.placement_changed(digest)
            reason = self._checkpoints.copies(digest).get(directory)
            if fault is not None:
                told = "" if reason is None else "; the copy is in quarantine"
                bad[directory] = Fault(fault.code, f"{fault.message}{told}")
            elif reason is not None:
                bad[directory] = Fault.of(SllmError(f"its bytes are right, but it is in quarantine still: {reason}"))
        if bad:
            return OperationDone(op=message.op, digest=digest, fault=_fault_of(bad, len(copies)))
        return OperationDone(op=message.op, digest=digest, read_bytes=self._checkpoints.size(digest))

    async def _verify_copy(self, op: str, digest: str, directory: str) -> Fault | None:
        """Each copy's is one of the store's own: what an earlier agent has asked it is not taken for that of another copy."""

        def progressed(progress: Progress) -> None:
            self._owner.tell(msgspec.structs.replace(progress, op=op))

        answer: asyncio.Future[OperationDone] = asyncio.get_running_loop().create_future()
        asked = f"{op} {directory}"
        self._store.verify(asked, digest, directory, _answer(answer), progressed)
        try:
            return (await answer).fault
        finally:
            self._store.cancel_verify(asked)

    async def _drops_over(self) -> None:
        """What is said after a drop finds its room free."""
        drops = [task for op, task in self._running.items() if op in self._drop_ops]
        if drops:
            await asyncio.wait(drops)  # unlike a gather, it leaves them alone when whoever waits here is cancelled

    async def _drop(self, message: DropCheckpoint) -> OperationDone:
        digest = message.digest
        if message.tier not in (Tier.DEVICE, Tier.DRAM, Tier.DISK):
            tiers = f"{Tier.DEVICE}, {Tier.DRAM} or {Tier.DISK}"
            raise InvalidInput(f"a checkpoint can be dropped from {tiers}, not from {message.tier}")
        if message.tier is Tier.DEVICE:
            freed: asyncio.Future[Fault | None] = asyncio.get_running_loop().create_future()
            self._store.devices.drop(message.op, digest, _answer(freed))
            return OperationDone(op=message.op, digest=digest, fault=await freed)
        users = self._store.holds.users(digest)
        if message.tier is Tier.DISK:
            publishes = [op for op, published in self._publishing.items() if published == digest]
            users = (*users, *self._store.devices.users(digest), *publishes)
        if users:
            raise Conflict(f"checkpoint {digest} is in use by {', '.join(users)}; stop them first")
        if message.tier in self._checkpoints.pins.tiers(digest):
            raise Conflict(f"checkpoint {digest} is pinned on {message.tier.value}; unpin it first")
        if message.tier is Tier.DRAM:
            answer: asyncio.Future[Fault | None] = asyncio.get_running_loop().create_future()
            self._store.drop(message.op, digest, _answer(answer))
            return OperationDone(op=message.op, digest=digest, fault=await answer)
        if digest in self._dropping:
            raise Conflict(f"checkpoint {digest} is being dropped already")
        self._dropping.add(digest)
        try:
            await self._checkpoints.remove(digest)
        finally:
            self._dropping.discard(digest)
            self._owner.disk_changed()
            self._owner.placement_changed(digest)
        return OperationDone(op=message.op, digest=digest)

    async def _read(self, message: ReadFile) -> None:
        try:
            chunk = await self._checkpoints.read(message)
        except SllmError as error:
            chunk = FileChunk(
                op=message.op,
                file=message.file,
                offset_bytes=message.offset_bytes,
                size_bytes=0,
                data=b"",
                fault=Fault.of(error),
            )
        self._owner.tell(chunk)


def _fault_of(bad: dict[str, Fault], copies: int) -> Fault:
    """What was found of some of the copies, by their directories; that one is wrong says more than that one was not read."""
    code = max((fault.code for fault in bad.values()), key=lambda code: code == InvalidCheckpoint.code)
    if copies == 1:
        (message,) = (fault.message for fault in bad.values())
    else:
        told = "; ".join(f"{PurePath(directory).name} ({fault.message})" for directory, fault in bad.items())
        message = f"{len(bad)} of {copies} copies: {told}"
    return Fault(code, message)


def _answer(future: asyncio.Future[T]) -> Callable[[T], None]:
    def answered(answer: T) -> None:
        if not future.done():
            future.set_result(answer)

    return answered
