"""What the agent says of checkpoints: those on its disk, read again when one came or went, and where each lies now."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from agent.daemon.pins import Pins
from agent.daemon.storelink import StoreLink
from agent.store import catalog
from agent.store.catalog import CatalogEntry, DamagedCopy
from schema.errors import InvalidCheckpoint, NotFound, SllmError
from schema.link import CheckpointTruth, FileChunk, Placement, ReadFile
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
        self._images: dict[tuple[str, str], CatalogEntry] = {}
        self._damaged: dict[str, DamagedCopy] = {}
        self._facts: dict[str, CheckpointTruth] = {}
        self._scanning = asyncio.Lock()

    async def scan(self) -> None:
        """Read again what lies on the disk."""
        async with self._scanning:  # so that an earlier look never replaces a later one
            found = await asyncio.to_thread(catalog.look, self._root)
            self._entries, self._damaged = found.entries, found.damaged
            self._images = {(copy.digest, copy.manifest.image_id): copy for copy in found.copies}
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

    def knows(self, digest: str) -> bool:
        """True when it is known what the checkpoint is, or that nothing of it is here."""
        return digest in self._facts or digest not in self._store.residents

    def entry(self, digest: str) -> CatalogEntry:
        """Raises NotFound when it is not on the disk, InvalidCheckpoint when what lies there cannot be read."""
        entry = self._entries.get(digest)
        if entry is None:
            if (damaged := self._damaged.get(digest)) is not None:
                raise _in_quarantine(digest, damaged.reason)
            raise NotFound(f"checkpoint {digest} is not on this node's disk; ingest it first")
        return entry

    def directory(self, digest: str) -> str:
        """Its directory, relative to the checkpoints'. Raises NotFound, InvalidCheckpoint for one in quarantine."""
        entry = self.entry(digest)
        if entry.quarantined is not None:
            raise _in_quarantine(digest, entry.quarantined)
        return self.relative(entry)

    def source(self, digest: str) -> tuple[str, str]:
        """Where weights are loaded from: the directory, relative to the checkpoints', and the image's id. Raises NotFound,
        InvalidCheckpoint for a copy in quarantine.

        Of several copies it is the one that lies in memory already, or comes there. One whose weights went bad can still be
        started from a good image in DRAM, or where they lie on a device.
        """
        entry = self._lying(digest)
        if entry is None or (entry.quarantined is not None and not self._usable(entry)):
            entry = self.entry(digest)
        if entry.quarantined is not None and not self._usable(entry):
            raise _in_quarantine(digest, entry.quarantined)
        return self.relative(entry), entry.manifest.image_id

    def drop_stale(self, digest: str) -> None:
        """Let what lies in memory of it go when it is of no use to anybody: no copy here has that image, or only one that is
        unusable beside one that is not. A copy that is alone and cannot be read may be put right."""
        lying, best = self._lying(digest), self._entries.get(digest)
        useless = lying is not None and lying is not best and lying.quarantined is not None and not self._usable(lying)
        if (lying is None or useless) and digest not in self._damaged:
            self._store.drop_idle(digest)

    def _lying(self, digest: str) -> CatalogEntry | None:
        """The copy whose image lies in memory or on a device, or comes there."""
        image_id = self._store.image_id(digest)
        return self._images.get((digest, image_id)) if image_id else self._entries.get(digest)

    def layout(self, digest: str) -> str | None:
        """The layout of a sound copy on the disk, or None."""
        entry = self._entries.get(digest)
        return entry.manifest.layout if entry is not None and entry.quarantined is None else None

    def copies(self, digest: str) -> list[str]:
        """The directories of all that lies on the disk of it, in whatever state, as the store names them, the best one first.
        Raises NotFound."""
        best = self._damaged.get(digest) or self.entry(digest)
        others = [copy for (found, _), copy in self._images.items() if found == digest and copy is not best]
        return [self.relative(copy) for copy in (best, *others)]

    def size(self, digest: str) -> int:
        """Bytes of all copies that can be read."""
        copies = [copy for (found, _), copy in self._images.items() if found == digest]
        return sum(partition.size_bytes for copy in copies for partition in copy.manifest.partitions)

    def relative(self, entry: CatalogEntry | DamagedCopy) -> str:
        """An entry's directory as the store names it."""
        return str(entry.directory.relative_to(self._root))

    async def check_assets(self, digest: str) -> None:
        """Look at the small files of a copy that a worker could not use: one that is wrong puts it into quarantine."""
        entry = self._entries.get(digest)
        if entry is not None and entry.quarantined is None:
            try:
                await asyncio.to_thread(catalog.check_assets, entry.directory, entry.manifest)
            except InvalidCheckpoint as error:
                try:
                    await asyncio.to_thread(catalog.quarantine, entry.directory, str(error))
                except OSError as failure:
                    _log.error("cannot put %s into quarantine: %s", entry.directory, failure)
            except SllmError as error:
                _log.warning("%s", error)
        await self.scan()

    def _usable(self, entry: CatalogEntry) -> bool:
        """True when weights and text can be had without the bytes for which a copy is in quarantine."""
        resident = self._store.residents.get(entry.digest)
        lies = (resident is not None and not resident.condemned) or entry.digest in self._store.devices.digests
        lies = lies and self._store.image_id(entry.digest) in ("", entry.manifest.image_id)
        reason = entry.quarantined or ""
        assets = (str(entry.directory / file) for file in (catalog.MANIFEST_FILE, *(a.file for a in entry.manifest.assets)))
        return lies and not any(asset in reason for asset in assets)

    async def remove(self, digest: str) -> None:
        """Take it from the disk for good, in every layout. Raises NotFound, SllmError."""
        copy: CatalogEntry | DamagedCopy | None = self._entries.pop(digest, None) or self._damaged.pop(digest, None)
        if copy is None:
            raise NotFound(f"checkpoint {digest} is not on this node's disk")
        while copy is not None:
            try:
                await asyncio.to_thread(catalog.remove, copy)
            except OSError as error:
                raise SllmError(f"cannot remove {copy.directory}: {error.strerror}") from error
            finally:
                await self.scan()
            copy = self._entries.get(digest) or self._damaged.get(digest)

    def truth(self, digest: str) -> CheckpointTruth:
        """Where a checkpoint lies on this node now."""
        placements = []
        entry, damaged = self._entries.get(digest), self._damaged.get(digest)
        resident = self._store.residents.get(digest)
        users = self._store.holds.count(digest)
        size = entry.manifest.image_bytes if entry is not None else resident.image_bytes if resident is not None else 0
        if entry is not None:
            state = TierState.RESIDENT if entry.quarantined is None else TierState.QUARANTINED
            placements.append(Placement(tier=Tier.DISK, state=state, size_bytes=size, reason=entry.quarantined or ""))
        elif damaged is not None:
            bad_bytes = damaged.size_bytes
            placements.append(
                Placement(tier=Tier.DISK, state=TierState.QUARANTINED, size_bytes=bad_bytes, reason=damaged.reason)
            )
        if resident is not None:
            bad = resident.condemned
            # Without usable files beside it no worker can be built over the image, however good that is.
            lying = self._lying(digest)
            barred = lying is None or (lying.quarantined is not None and not self._usable(lying))
            fetched = entry is None and damaged is None and users > 0  # its copy on the disk is not committed yet
            without = TierState.FILLING if fetched else TierState.EVICTING
            state = TierState.QUARANTINED if bad else without if barred else TierState.RESIDENT
            image_bytes = resident.image_bytes
            placements.append(Placement(tier=Tier.DRAM, state=state, size_bytes=image_bytes, users=users, reason=bad))
        elif self._store.filling(digest):
            placements.append(Placement(tier=Tier.DRAM, state=TierState.FILLING, size_bytes=size, users=users))
        facts = self._facts.get(digest)
        if facts is not None:  # else it is coming by a fetch, which is ahead of the disk on devices
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

    def truths(self) -> tuple[CheckpointTruth, ...]:
        digests = sorted({*self._entries, *self._damaged, *self._store.residents, *self._store.devices.digests})
        return tuple(self.truth(digest) for digest in digests)

    async def read(self, message: ReadFile) -> FileChunk:
        """A part of a text asset or the manifest. Raises NotFound for any other file."""
        entry = self.entry(message.digest)
        if message.file != catalog.MANIFEST_FILE and message.file not in {asset.file for asset in entry.manifest.assets}:
            raise NotFound(f"checkpoint {message.digest} has no text asset {message.file!r}")
        return await asyncio.to_thread(_read, entry.directory / message.file, message)


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
