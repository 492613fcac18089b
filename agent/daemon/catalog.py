"""What the agent says of checkpoints: those on its disk, read again when one came or went, and where each lies now."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from agent.daemon.pins import Pins
from agent.daemon.storelink import Lying, StoreLink
from agent.store import catalog
from agent.store.catalog import CatalogEntry, DamagedCopy
from schema.errors import InvalidCheckpoint, NotFound, SllmError
from schema.link import CheckpointTruth, DiskCopy, FileChunk, Placement, ReadFile
from schema.states import Tier, TierState

__all__ = ["Checkpoints"]

_MAX_CHUNK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


class Checkpoints:
    """The node's checkpoints. `scan` and `remove` go to a thread; the rest is at hand."""

    def __init__(self, root: Path, store: StoreLink) -> None:
        self.pins = Pins(root.parent / "pins.json")
        self._root = root
        self._store = store
        self._entries: dict[str, CatalogEntry] = {}
        self._copies: tuple[CatalogEntry, ...] = ()
        self._images: dict[tuple[str, str], CatalogEntry] = {}
        self._damaged: dict[str, list[DamagedCopy]] = {}
        self._verified: set[Path] = set()
        self._facts: dict[str, CheckpointTruth] = {}
        self._scanning = asyncio.Lock()

    async def scan(self) -> None:
        """Read again what lies on the disk, and let go what lay in memory or on devices and nobody can use any more.

        Nothing else lets an image go for its copy's sake. One that came during the look may be of a copy that it did not see.
        """
        async with self._scanning:  # so that an earlier look never replaces a later one
            before = self._store.idle()
            found, self._verified = await asyncio.to_thread(self._look)
            self._entries, self._copies, self._images, self._damaged = found.entries, found.copies, {}, {}
            for copy in found.copies:  # of several with one image the best comes first
                self._images.setdefault((copy.digest, copy.manifest.image_id), copy)
            for bad in found.damaged:
                self._damaged.setdefault(bad.digest, []).append(bad)
        lies = {*self._damaged, *self._store.residents, *self._store.devices.digests}
        self._facts = {digest: facts for digest, facts in self._facts.items() if digest in lies}
        for digest, entry in self._entries.items():
            manifest = entry.manifest
            self._facts[digest] = CheckpointTruth(
                digest=digest,
                architecture=manifest.architecture,
                image_bytes=manifest.image_bytes,
                kv_token_bytes=manifest.kv.token_bytes,
                max_context_tokens=manifest.max_context_tokens,
                step=manifest.step,
            )
        for lying in before & self._store.idle():
            if not self._useful(lying):
                self._store.let_go(lying)

    def _look(self) -> tuple[catalog.Found, set[Path]]:
        found = catalog.look(self._root)
        return found, {copy.directory for copy in found.copies if catalog.is_verified(copy.directory)}

    async def look_at_marks(self, digest: str) -> bool:
        """Read again which copies of a checkpoint are verified, which the store writes down; True if that has changed."""
        async with self._scanning:
            before = self._verified
            places = {copy.directory for copy in self._copies if copy.digest == digest}
            verified = await asyncio.to_thread(lambda: {place for place in places if catalog.is_verified(place)})
            self._verified = before - places | verified
            return self._verified != before

    def all_verified(self, digest: str) -> bool:
        """True when it is known of every copy that can be read that it is right."""
        return all(copy.directory in self._verified for copy in self._copies if copy.digest == digest)

    def knows(self, digest: str) -> bool:
        """True when it is known what the checkpoint is, or that nothing of it is here."""
        return digest in self._facts or digest not in self._store.residents

    def entry(self, digest: str) -> CatalogEntry:
        """Raises NotFound when it is not on the disk, InvalidCheckpoint when what lies there cannot be read."""
        entry = self._entries.get(digest)
        if entry is None:
            if (damaged := self._damaged.get(digest)) is not None:
                raise _in_quarantine(digest, damaged[0].quarantined)
            raise NotFound(f"checkpoint {digest} is not on this node's disk; ingest it first")
        return entry

    def directory(self, digest: str) -> str:
        """Its directory, relative to the checkpoints'. Raises NotFound, InvalidCheckpoint for one in quarantine."""
        entry = self.entry(digest)
        if entry.quarantined is not None:
            raise _in_quarantine(digest, entry.quarantined)
        return self.relative(entry)

    def source(self, digest: str, devices: tuple[int, ...] = ()) -> tuple[str, str]:
        """Where weights are loaded from to these devices, or to memory: the directory, relative to the checkpoints', and the
        image's id. Raises NotFound, InvalidCheckpoint where no copy can be used for that.

        Of several copies it is the one that lies on those devices or in memory, or comes there, else the best one. What lies
        there can be started from though the weights of its copy went bad on the disk.
        """
        for image_id, lies in (*self._store.devices.images(digest, devices), *self._store.images(digest)):
            copy = self._copy(digest, image_id)
            if copy is not None and _has_text(copy) and (lies or copy.quarantined is None):
                return self.relative(copy), copy.manifest.image_id
        return self.directory(digest), self.entry(digest).manifest.image_id

    def stale(self, digest: str) -> bool:
        """True when it seems that a `scan` would let go some of what lies of it."""
        return any(lying.digest == digest and not self._useful(lying) for lying in self._store.idle())

    def _useful(self, lying: Lying) -> bool:
        """False if nobody can use what lies there: it is wrong, no copy here has that image, or only one whose text is wrong.
        Where none is sound the best one, or one that cannot even be read, may be put right."""
        if lying.wrong:
            return False
        if (best := self._entries.get(lying.digest)) is None:
            return lying.digest in self._damaged
        alone = best.quarantined is not None and best.manifest.image_id == lying.image_id
        return alone or self._startable(lying.digest, lying.image_id)

    def _startable(self, digest: str, image_id: str) -> bool:
        """True when a worker can be built over this image, where that lies."""
        copy = self._copy(digest, image_id)
        return copy is not None and _has_text(copy)

    def _copy(self, digest: str, image_id: str) -> CatalogEntry | None:
        """The best copy that has this image; "" is that of the best one."""
        return self._images.get((digest, image_id)) if image_id else self._entries.get(digest)

    def layout(self, digest: str) -> str | None:
        """The layout of a sound copy on the disk, or None."""
        entry = self._entries.get(digest)
        return entry.manifest.layout if entry is not None and entry.quarantined is None else None

    async def has_come(self, digest: str, layout: str) -> bool:
        """True when a sound copy of this layout lies on the disk, and stays there: an ingest that did not say so ended well."""
        try:
            return await asyncio.to_thread(catalog.has_come, self._root / digest / layout)
        except (SllmError, OSError) as error:
            _log.warning("cannot tell whether checkpoint %s has come to the disk: %s", digest, error)
            return False

    def copies(self, digest: str) -> dict[str, str | None]:
        """The directories of all of its copies, as the store names them, each with why it is in quarantine, if it is: the best
        one first, those that cannot be read last."""
        return {self.relative(copy): copy.quarantined for copy in self._all(digest)}

    def size(self, digest: str) -> int:
        """Bytes of all copies that can be read."""
        return sum(_size(copy) for copy in self._copies if copy.digest == digest)

    def relative(self, entry: CatalogEntry | DamagedCopy) -> str:
        """An entry's directory as the store names it."""
        return str(entry.directory.relative_to(self._root))

    async def check_assets(self, digest: str) -> None:
        """Look at the small files of the copies of what a worker could not use: one that is wrong puts its copy into
        quarantine."""
        for entry in [copy for copy in self._copies if copy.digest == digest and copy.quarantined is None]:
            try:
                await asyncio.to_thread(catalog.judge_assets, entry.directory)
            except SllmError as error:
                _log.warning("%s", error)
        await self.scan()

    async def found_right(self, directory: str) -> None:
        """The store has found every byte of this copy right."""
        await asyncio.to_thread(catalog.absolve, self._root / directory)

    async def remove(self, digest: str) -> None:
        """Take it from the disk for good, in every layout. Raises NotFound, SllmError."""
        if not (copies := self._all(digest)):
            raise NotFound(f"checkpoint {digest} is not on this node's disk")
        self._entries.pop(digest, None)
        try:
            for copy in copies:
                try:
                    await asyncio.to_thread(catalog.remove, copy)
                except OSError as error:
                    raise SllmError(f"cannot remove {copy.directory}: {error.strerror}") from error
        finally:
            await self.scan()

    def truth(self, digest: str) -> CheckpointTruth:
        """Where a checkpoint lies on this node now."""
        placements = []
        entry, damaged = self._entries.get(digest), self._damaged.get(digest, [])
        resident = self._store.residents.get(digest)
        users = self._store.holds.count(digest)
        coming_bytes = self._store.filling().get(digest)
        size = entry.manifest.image_bytes if entry is not None else resident.image_bytes if resident is not None else 0
        size = size or coming_bytes or 0
        if entry is not None or damaged:
            is_sound = entry is not None and entry.quarantined is None
            state = TierState.RESIDENT if is_sound else TierState.QUARANTINED
            disk_bytes = sum(_disk_bytes(copy) for copy in self._all(digest))
            reason, copies = self._wrong(digest), self._lying(digest)
            placements.append(Placement(tier=Tier.DISK, state=state, size_bytes=disk_bytes, reason=reason, copies=copies))
        if resident is not None:
            bad = resident.condemned
            # Without usable files beside it no worker can be built over the image, however good that is.
            barred = not self._startable(digest, resident.image_id)
            fetched = entry is None and not damaged and users > 0  # its copy on the disk is not committed yet
            without = TierState.FILLING if fetched else TierState.EVICTING
            state = TierState.QUARANTINED if bad else without if barred else TierState.RESIDENT
            image_bytes = resident.image_bytes
            placements.append(Placement(tier=Tier.DRAM, state=state, size_bytes=image_bytes, users=users, reason=bad))
        elif coming_bytes is not None:
            image_bytes = coming_bytes or size
            users = max(users, 1)  # it comes for somebody, who is counted on the device if it goes on there
            placements.append(Placement(tier=Tier.DRAM, state=TierState.FILLING, size_bytes=image_bytes, users=users))
        facts = self._facts.get(digest)
        if facts is not None and (entry is not None or damaged):  # a fetch may be ahead of the disk on devices
            placements += self._store.devices.placements(digest, size)
        return CheckpointTruth(
            digest=digest,
            architecture=facts.architecture if facts is not None else "",
            image_bytes=size or (facts.image_bytes if facts is not None else 0),
            kv_token_bytes=facts.kv_token_bytes if facts is not None else 0,
            max_context_tokens=facts.max_context_tokens if facts is not None else 0,
            step=facts.step if facts is not None else None,
            placements=tuple(placements),
        )

    def _all(self, digest: str) -> list[CatalogEntry | DamagedCopy]:
        """Every copy of it, the best one first."""
        return [*(copy for copy in self._copies if copy.digest == digest), *self._damaged.get(digest, ())]

    def _lying(self, digest: str) -> tuple[DiskCopy, ...]:
        """What lies of it on the disk, the best copy first."""
        return tuple(
            DiskCopy(
                layout=copy.directory.name,
                state=TierState.RESIDENT if copy.quarantined is None else TierState.QUARANTINED,
                verified=copy.quarantined is None and copy.directory in self._verified,
                size_bytes=copy.size_bytes if isinstance(copy, DamagedCopy) else _size(copy),
            )
            for copy in self._all(digest)
        )

    def _wrong(self, digest: str) -> str:
        """Why the best copy is in quarantine, if it is, and which of the others are."""
        best, *others = self._all(digest)
        why = [best.quarantined] if best.quarantined is not None else []
        bad = [copy for copy in others if copy.quarantined is not None]
        return "; ".join([*why, *(f"copy {copy.directory.name} is in quarantine: {copy.quarantined}" for copy in bad)])

    def truths(self) -> tuple[CheckpointTruth, ...]:
        here = {*self._entries, *self._damaged, *self._store.residents, *self._store.devices.digests}
        digests = sorted(here | self._store.filling().keys())
        return tuple(self.truth(digest) for digest in digests)

    async def read(self, message: ReadFile) -> FileChunk:
        """A part of a text asset or the manifest. Raises NotFound for any other file."""
        entry = self.entry(message.digest)
        if message.file != catalog.MANIFEST_FILE and message.file not in {asset.file for asset in entry.manifest.assets}:
            raise NotFound(f"checkpoint {message.digest} has no text asset {message.file!r}")
        return await asyncio.to_thread(_read, entry.directory / message.file, message)


def _size(entry: CatalogEntry) -> int:
    return sum(partition.size_bytes for partition in entry.manifest.partitions)


def _disk_bytes(copy: CatalogEntry | DamagedCopy) -> int:
    """What a copy takes of the node's disk; a user's own files are not the node's."""
    if isinstance(copy, DamagedCopy):
        return copy.size_bytes
    return sum(partition.size_bytes for partition in copy.manifest.partitions if partition.source is None)


def _has_text(entry: CatalogEntry) -> bool:
    """True when none of its small files is why a copy is in quarantine."""
    if entry.quarantined is None:
        return True
    assets = (str(entry.directory / file) for file in (catalog.MANIFEST_FILE, *(a.file for a in entry.manifest.assets)))
    return not any(asset in entry.quarantined for asset in assets)


def _in_quarantine(digest: str, why: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"checkpoint {digest} is in quarantine ({why}); ingest it again, fetch it from where it was published "
        f"(`sllmctl checkpoint fetch {digest[:16]} --from URL`), or verify it if its files are right again"
    )


def _read(path: Path, message: ReadFile) -> FileChunk:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            data = os.pread(descriptor, _MAX_CHUNK_BYTES, message.offset_bytes) if message.offset_bytes < size else b""
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SllmError(f"cannot read {path}: {error.strerror}") from error
    return FileChunk(op=message.op, file=message.file, offset_bytes=message.offset_bytes, size_bytes=size, data=data)
