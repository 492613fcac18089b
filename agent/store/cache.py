"""The DRAM tier: what is brought into the arena, for whom, and what becomes of it.

A checkpoint is in one of three places here: resident (`Residency`), in `_fills` (a read is under way, wanted or given up), or
in `_waiting` (asked for while chunks that it needs are still under a read that was given up, and will be free in a moment,
while another image of it that is to go is still looked at, or while it is not known yet what becomes of the copy on the disk
that it was fetched with).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from agent.native.arena import Arena
from agent.native.calibration import Tuning
from agent.native.reader import Priority, ReadJob, ReadPool
from agent.store import catalog
from agent.store.api import FillSink, StoreListener
from agent.store.fills import Fill, FillSource, changed_meanwhile, clash, fill_units, read_copy
from agent.store.layers import Layers
from agent.store.residency import Residency
from agent.store.verify import Verdict, Verifier
from schema.checkpoint import IN_PLACE, Manifest
from schema.errors import Cancelled, Conflict, Fault, InvalidCheckpoint, OutOfSpace, SllmError
from schema.link import ArenaInfo, Arriving, LayersArrived, Resident

__all__ = ["ArenaStore"]

_PROGRESS_S: Final = 0.1
_SOON_S: Final = 2.0
"""An image that is whole within so long is offered layer by layer: whoever is sent to it waits that long at most."""
_UNIT_BYTES: Final = 16 << 20
"""What is read as one where no checksum is looked at, so that blocks may be as long as a disk wants them."""
_log = logging.getLogger(__name__)


class ArenaStore:
    """A `Store` over one arena. ``wake`` is called, from any thread, when `pump` has something to do.

    ``pool`` reads, one of ``reader_threads`` if there is none; it is closed with the store.
    """

    def __init__(
        self,
        arena: Arena,
        listener: StoreListener,
        *,
        reader_threads: int,
        wake: Callable[[], None],
        pool: ReadPool | None = None,
    ) -> None:
        self._arena = arena
        self._listener = listener
        self._wake = wake
        self._woken_at = 0.0
        self._pool = pool or ReadPool(reader_threads)
        self._fills: dict[str, Fill] = {}
        self._waiting: dict[str, Fill] = {}
        self._verifier = Verifier(self._pool, self._woken)
        self._unheard: set[str] = set()  # verifications that nobody waits for any more
        self._verify_told_at = 0.0
        self._fetched: set[str] = set()  # came with a fetch that is not over on the disk
        self._residency = Residency(arena, listener.evicted, lambda: self._verifier.asked.values())

    @property
    def arena(self) -> ArenaInfo:
        info = self._arena.info(self._residency.used_chunks)
        return msgspec.structs.replace(info, reader=self._pool.backend)

    @property
    def backend(self) -> str:
        """How the disk is read: "io_uring" or "threads"."""
        return self._pool.backend

    def tune(self, tuning: Tuning) -> None:
        """Read the disk so from now on."""
        self._pool.tune(tuning)

    def residents(self) -> tuple[Resident, ...]:
        return self._residency.told()

    def filling(self) -> tuple[str, ...]:
        """The ops that wait for an answer."""
        return tuple(op for fill in (*self._fills.values(), *self._waiting.values()) for op in fill.ops)

    def fill(
        self,
        op: str,
        digest: str,
        directory: Path,
        users: int = 1,
        priority: Priority = Priority.REQUEST,
        image_id: str = "",
    ) -> None:
        self._residency.count(digest, users)
        known = self._fills.get(digest)
        if known is not None and known.job is not None and known.job.stalled is not None:
            self._listener.failed(op, digest, Fault.of(known.job.stalled))
            return
        if known is not None and known.given_up:
            known = self._waiting.get(digest)
            if known is None:
                self._waiting[digest] = Fill(digest, directory, [op], priority, image_id=image_id)
                return
        known = known or self._waiting.get(digest)
        if known is None:
            self._begin(Fill(digest, directory, [op], priority, image_id=image_id))
            return
        if (fault := clash(digest, known.image_id, image_id)) is not None:
            self._listener.failed(op, digest, Fault.of(fault))
            return
        self.raise_to(digest, priority)
        if op not in known.ops:
            known.ops.append(op)

    def fill_from(self, digest: str, directory: Path, source: FillSource) -> bool:
        """Take in a checkpoint while it is fetched to ``directory``, if there is room now; True if there is. Its owner answers
        who asked, and says what becomes of the copy on the disk: `announce`, `disown`."""
        room = False
        if digest not in self._residency and digest not in self._fills.keys() | self._waiting.keys():
            with contextlib.suppress(OutOfSpace):
                room = self._make_room(digest, source.manifest.image_bytes)
        if room:
            self._start(Fill(digest, directory, [], Priority.REQUEST, source), source.manifest, None)
        else:
            source.do_without()
        return room

    def fills(self, digest: str, image_id: str = "") -> bool:
        """True while this image, or any, comes here and somebody waits for it."""
        fill = self._fills.get(digest)
        return fill is not None and image_id in ("", fill.image_id) and not fill.given_up

    def has_sound(self, digest: str, image_id: str = "") -> bool:
        """True when this image, or any, lies here and nothing speaks against it, whatever has become of the copy."""
        occupant = self._residency.get(digest)
        if occupant is None or image_id not in ("", occupant.image_id):
            return False
        return self._residency.condemned(digest) is None

    def disown(self, digest: str, why: str) -> None:
        """The copy on the disk that an image came with has come to nothing: it goes, with its last user if it has one. Its
        bytes are right, so that only who asks anew hears of it."""
        if digest not in self._fetched:
            return
        self._fetched.discard(digest)
        if (occupant := self._residency.get(digest)) is not None:
            self._residency.condemn(occupant, why)
            self._residency.drop_condemned(occupant)
        elif (waiting := self._waiting.pop(digest, None)) is not None:
            self._fail(waiting, SllmError(why))

    def announce(self, digest: str) -> None:
        """The copy on the disk that an image came with is there too: say that the image is, which nobody asked a fill for."""
        self._fetched.discard(digest)
        if (occupant := self._residency.get(digest)) is not None:
            self._listener.filled("", self._residency.tell(occupant))
        self._begin_waiting()

    def new_agent(self) -> None:
        """An agent has come that will say who uses what; of what lies here nothing is forgotten before it has."""
        self._residency.forget_others()
        for fill in self._fills.values():
            fill.offered.clear()

    @property
    def pool(self) -> ReadPool:
        """The one reader of this store."""
        return self._pool

    def bring(self, sink: FillSink, digest: str, directory: Path, priority: Priority, image_id: str = "") -> None:
        """Bring a checkpoint into the arena for a sink, which borrows it from `FillSink.filled` until `give_back`."""
        known = self._fills.get(digest)
        if known is not None and known.job is not None and known.job.stalled is not None:
            sink.failed(known.job.stalled)
            return
        if known is not None and known.given_up:
            known = None
            if digest not in self._waiting:
                self._waiting[digest] = Fill(digest, directory, [], priority, image_id=image_id, sinks=(sink,))
                return
        known = known or self._waiting.get(digest)
        if known is None:
            self._begin(Fill(digest, directory, [], priority, image_id=image_id, sinks=(sink,)))
            return
        if (fault := clash(digest, known.image_id, image_id)) is not None:
            sink.failed(fault)
            return
        known.sinks += (sink,)
        self.raise_to(digest, priority)

    def raise_to(self, digest: str, priority: Priority) -> None:
        """Somebody more urgent waits for a checkpoint that is on its way; it is never lowered."""
        for fill in (self._fills.get(digest), self._waiting.get(digest)):
            if fill is not None and not fill.given_up:
                fill.priority = min(fill.priority, priority)
                if fill.job is not None:
                    self._pool.raise_priority(fill.job, priority)

    def abandon(self, sink: FillSink, digest: str) -> None:
        """A sink wants a fill no more; it hears nothing of it from now on. What nobody else waits for is given up."""
        for fill in (self._fills.get(digest), self._waiting.get(digest)):
            if fill is not None and sink in fill.sinks:
                fill.sinks = tuple(each for each in fill.sinks if each is not sink)
                if not fill.sinks and not self._residency.has_users(digest) and not fill.given_up and fill.source is None:
                    self._give_up(fill)

    def give_back(self, digest: str) -> None:
        """A sink needs the image no more."""
        self._residency.give_back(digest)
        self._begin_waiting()

    def views(self, digest: str, start_bytes: int, size_bytes: int) -> list[memoryview]:
        """A range of the image of a resident checkpoint."""
        occupant = self._residency.get(digest)
        assert occupant is not None
        return self._arena.views(occupant.chunks, start_bytes, size_bytes)

    def hold(self, digest: str, users: int, condemned: str = "") -> None:
        self._residency.count(digest, users)
        if (occupant := self._residency.get(digest)) is not None:
            self._residency.use(occupant)
            if condemned:
                self._residency.condemn(occupant, condemned)
            self._residency.drop_condemned(occupant)
        for fill in (self._fills.get(digest), self._waiting.get(digest)):
            if fill is not None and not fill.given_up and users == 0 and fill.source is None and not fill.sinks:
                self._give_up(fill)

    def drop(self, digest: str, image_id: str = "") -> None:
        if digest in self._fills or digest in self._waiting:
            raise Conflict(f"checkpoint {digest} is just being loaded; stop what waits for it, then drop it")
        if image_id and digest in self._fetched:
            raise Conflict(f"checkpoint {digest} is just being fetched; whether its image is of use is known after that")
        self._residency.drop(digest, image_id)

    def pin(self, digests: Iterable[str]) -> None:
        self._residency.pin(digests)

    def verify(self, op: str, digest: str, directory: Path) -> None:
        if op in self._verifier.asked:
            self._unheard.discard(op)
            return
        occupant = self._residency.get(digest)
        chunks = list(occupant.chunks) if occupant is not None else []
        image = partial(self._arena.views, chunks) if chunks else None
        self._verifier.begin(op, digest, directory, image, occupant.image_id if occupant is not None else "")

    def cancel_verify(self, op: str) -> None:
        if op in self._verifier.asked:
            self._unheard.add(op)
            self._verifier.cancel(op)

    def pump(self) -> None:
        """Tell the listener what the background has done since the last call. To be called after ``wake``."""
        now = time.monotonic()
        for fill in list(self._fills.values()):
            assert fill.job is not None
            if fill.job.finished:
                self._end(fill, fill.job)
            elif fill.job.stalled is not None:
                self._stall(fill, fill.job.stalled)
            elif now - fill.told_at >= _PROGRESS_S and fill.told_bytes != fill.job.done_bytes:
                self._tell(fill, now, fill.job.done_bytes)
            if fill.digest in self._fills:
                self._offer(fill, now)
        self._pump_verifier(now)

    def close(self) -> None:
        self._verifier.close()
        self._pool.close()
        for fill in self._fills.values():
            # What a read may yet write into stays marked as being filled: the next store must know.
            if fill.occupant is not None and fill.job is not None and fill.job.finished:
                self._residency.release(fill.occupant)
        self._fills.clear()
        self._waiting.clear()

    def _begin(self, fill: Fill) -> None:
        occupant = self._residency.get(fill.digest)
        if occupant is not None and self._residency.leaves(fill.digest):
            if fill.image_id != occupant.image_id or not self.has_sound(fill.digest):
                self._waiting[fill.digest] = fill
                return
            self._residency.stays(fill.digest)
        if occupant is not None and (why := self._residency.condemned(fill.digest)) is not None:
            self._fail(fill, InvalidCheckpoint(f"{why}; {occupant.users} users still have it, stop them first"))
            return
        if occupant is not None and (fault := clash(fill.digest, occupant.image_id, fill.image_id)) is not None:
            self._fail(fill, fault)
            return
        if occupant is not None:
            self._residency.use(occupant)
            for op in fill.ops:
                self._listener.filled(op, self._residency.tell(occupant, op))
            self._lend(fill, 0)
            return
        if fill.digest in self._fetched:  # its image has gone again, and its copy is not there yet
            self._waiting[fill.digest] = fill
            return
        try:
            entry = read_copy(fill.directory, fill.digest, fill.image_id)
            if entry.quarantined is not None:
                raise InvalidCheckpoint(f"{fill.directory} is quarantined: {entry.quarantined}")
            if not self._make_room(fill.digest, entry.manifest.image_bytes):
                self._waiting[fill.digest] = fill
                return
        except SllmError as error:
            self._fail(fill, error)
            return
        self._start(fill, entry.manifest, entry.identity)

    def _start(self, fill: Fill, manifest: Manifest, copy: catalog.Identity | None) -> None:
        fill.image_bytes, fill.manifest, fill.copy = manifest.image_bytes, manifest, copy
        fill.verifying = not catalog.is_verified(fill.directory)
        fill.image_id = manifest.image_id
        fill.occupant = self._residency.begin(fill.digest, fill.image_id, fill.image_bytes)
        chunks = fill.occupant.chunks
        trusted = not fill.verifying and fill.source is None
        units = list(fill_units(self._arena, fill.directory, manifest, chunks, fill.verifying, _UNIT_BYTES if trusted else 0))
        self._fills[fill.digest] = fill
        fill.begun_at = time.monotonic()
        self._tell(fill, fill.begun_at, 0)
        self._arena.hold_prefault(True)
        self._arena.hurry(chunks)
        # A user's own files are not in this order, and are known not to have changed only when all is read.
        fill.layers = Layers(manifest) if manifest.layout != IN_PLACE else None
        if fill.source is not None:
            self._fetched.add(fill.digest)
        submit = self._pool.submit if fill.source is None else fill.source.submit
        fill.job = submit(units, partial(self._layers_changed, fill), priority=fill.priority, unit_done=fill.arrived)

    def _pump_verifier(self, now: float) -> None:
        for verdict in self._verifier.take():
            self._judge(verdict)
        if now - self._verify_told_at >= _PROGRESS_S:
            self._verify_told_at = now
            for op in self._verifier.asked:
                stage, done_bytes, total_bytes = self._verifier.progress(op)
                if stage:
                    self._listener.verifying(op, stage, done_bytes, total_bytes)

    def _judge(self, verdict: Verdict) -> None:
        """Act on how a verification ended, then tell it."""
        error, digest = verdict.error, verdict.digest
        if error is None:
            catalog.mark(catalog.release, verdict.directory, verdict.copy)
        elif isinstance(error, InvalidCheckpoint):
            if not catalog.mark(catalog.quarantine, verdict.directory, verdict.copy, str(error)):
                error = InvalidCheckpoint(f"{error}; its quarantine could not be written down, and ends with the store process")
        elif not isinstance(error, Cancelled):
            catalog.mark(catalog.unmark_verified, verdict.directory, verdict.copy)
        if verdict.copy is not None and catalog.identity(verdict.directory) != verdict.copy:
            error = Conflict(f"another copy lies at {verdict.directory} now, or none: it was replaced while it was verified")
        occupant = self._residency.get(digest)
        if verdict.image_error is not None and occupant is not None:
            self._residency.condemn(occupant, str(verdict.image_error))
        # An earlier verdict may have left it, since it was still being looked at.
        if occupant is not None and not self._residency.drop_condemned(occupant) and verdict.image_error is not None:
            self._listener.condemned(self._residency.tell(occupant))
        self._begin_waiting()
        if verdict.op in self._unheard:
            self._unheard.discard(verdict.op)
            return
        faults = [Fault.of(each) for each in (error, verdict.image_error) if each is not None]
        told = Fault(faults[-1].code, "; ".join(fault.message for fault in faults)) if faults else None
        self._listener.verified(verdict.op, digest, told)

    def _woken(self) -> None:
        """On the verifier's thread."""
        self._wake()

    def _changed(self, job: ReadJob) -> None:
        """On a reader's thread: wakes the owner at a job's end, and now and then before it."""
        now = time.monotonic()
        if job.finished or job.stalled is not None or now - self._woken_at >= _PROGRESS_S:
            self._woken_at = now
            self._wake()

    def _layers_changed(self, fill: Fill, job: ReadJob) -> None:
        """On a reader's thread: the owner hears of each layer of an image that is offered."""
        if fill.offered and fill.usable_layers > fill.told_layers:
            self._wake()
        self._changed(job)

    def _offer(self, fill: Fill, now: float) -> None:
        """Tell who waits where an image comes to lie that soon is whole, and then which of its layers have come."""
        if not fill.layers or fill.given_up or fill.occupant is None:
            return
        before, fill.told_layers = fill.told_layers, fill.usable_layers
        soon = bool(fill.offered) or fill.left_s(now) <= _SOON_S
        for op in fill.ops if soon else ():
            if op not in fill.offered:
                fill.offered.add(op)
                extents = self._arena.extents(fill.occupant.chunks)
                self._listener.arriving(
                    Arriving(
                        op=op,
                        digest=fill.digest,
                        image_id=fill.image_id,
                        extents=extents,
                        image_bytes=fill.image_bytes,
                        layers=fill.told_layers,
                    )
                )
            elif fill.told_layers > before:
                self._listener.arriving(LayersArrived(op=op, layers=fill.told_layers))

    def _tell(self, fill: Fill, now: float, done_bytes: int) -> None:
        fill.told_at, fill.told_bytes = now, done_bytes
        for op in fill.ops:
            self._listener.progress(op, done_bytes, fill.image_bytes)

    def _end(self, fill: Fill, job: ReadJob) -> None:
        assert fill.occupant is not None
        del self._fills[fill.digest]
        self._arena.hold_prefault(any(not other.stalled for other in self._fills.values()))
        error = job.error or changed_meanwhile(fill)
        if error is None:
            self._residency.commit(fill.occupant)
            if fill.verifying and fill.source is None:
                catalog.mark(catalog.mark_verified, fill.directory, fill.copy)
            self._tell(fill, time.monotonic(), fill.image_bytes)
            for op in fill.ops:
                self._listener.filled(op, self._residency.tell(fill.occupant, op, fill.image_bytes))
            if not fill.ops and fill.source is None:
                self._listener.filled("", self._residency.tell(fill.occupant))
            self._lend(fill, fill.image_bytes)
        else:
            self._residency.release(fill.occupant)
            if job.corrupt:
                catalog.mark(catalog.quarantine, fill.directory, fill.copy, str(job.error))
            elif fill.source is None and not isinstance(error, Cancelled):
                catalog.mark(catalog.unmark_verified, fill.directory, fill.copy)
            self._fail(fill, error)
        self._begin_waiting()

    def _stall(self, fill: Fill, error: SllmError) -> None:
        """A read does not come back: all who wait are answered, and the chunks stay taken until it does."""
        if fill.stalled:
            return
        fill.stalled = fill.given_up = True
        self._arena.hold_prefault(any(not other.stalled for other in self._fills.values()))
        self._fail(fill, error)
        fill.ops, fill.sinks = [], ()
        same = self._waiting.pop(fill.digest, None)
        if same is not None:
            self._fail(same, error)
        self._begin_waiting()

    def _begin_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for other in waiting.values():
            if other.digest in self._fills:  # its own given-up read is not over yet
                self._waiting[other.digest] = other
            else:
                self._begin(other)

    def _give_up(self, fill: Fill) -> None:
        if fill.job is None:
            del self._waiting[fill.digest]
            self._fail(fill, Cancelled(f"nobody waits for checkpoint {fill.digest} any more"))
        else:
            fill.given_up = True
            self._pool.cancel(fill.job)

    def _fail(self, fill: Fill, error: SllmError) -> None:
        for op in fill.ops:
            self._listener.failed(op, fill.digest, Fault.of(error))
        for sink in fill.sinks:
            sink.failed(error)

    def _lend(self, fill: Fill, read_bytes: int) -> None:
        for sink in fill.sinks:
            self._residency.lend(fill.digest)
            sink.filled(read_bytes)

    def _make_room(self, digest: str, image_bytes: int) -> bool:
        """True when there is room for an image now, False when there will be, once reads that were given up are over. Raises
        OutOfSpace."""
        ending = [fill.occupant for fill in self._fills.values() if fill.given_up and not fill.stalled and fill.occupant]
        return self._residency.make_room(digest, image_bytes, ending)
