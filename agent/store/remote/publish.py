"""Puts a layout on a remote: its partitions and text assets, checked on the way, and its manifest when all are there.

What lies there already is read back and compared with the manifest's checksums: what is right stays, what is not is written
anew. So "published" means that every byte there was right when the publish ended, and a copy here may go.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import xxhash

from agent.store import catalog
from agent.store.catalog import MANIFEST_FILE, CatalogEntry
from agent.store.ingest.reading import SourceReader
from agent.store.remote.api import Body, Patience, Remote, Source
from agent.store.remote.steady import Steady
from schema.checkpoint import IN_PLACE, Manifest, Partition, decode_manifest
from schema.errors import Cancelled, Conflict, InvalidCheckpoint, InvalidInput, NotFound, SllmError
from schema.remote import RemoteSettings

__all__ = ["publish"]

_MAX_MANIFEST_BYTES: Final = 256 << 20
_BLOCK_BYTES: Final = 4 << 20


def publish(
    entry: CatalogEntry,
    remote: Remote,
    settings: RemoteSettings,
    progress: Callable[[int, int], None],
    stopped: threading.Event | None = None,
) -> tuple[str, ...]:
    """Publish a checkpoint; returns the names of the files that lay there with other bytes and were written anew.

    ``progress`` hears (done, total) bytes, compared or written. A publish that is broken off leaves files without a manifest,
    which nobody fetches; the next one keeps those that are right. Raises InvalidCheckpoint when the copy on the disk is not
    what was ingested, which puts it into quarantine; Conflict when another sound manifest lies in its place; and what `Remote`
    raises.
    """
    if entry.quarantined is not None:
        raise InvalidCheckpoint(f"checkpoint {entry.digest} is in quarantine ({entry.quarantined}); {_again(entry.digest)}")
    if entry.manifest.layout == IN_PLACE:
        raise InvalidInput(
            f"checkpoint {entry.digest} lies in the user's own files, which are not published; add the model without --in-place"
        )
    return _Publish(entry, remote, settings, progress, stopped or threading.Event()).run()


class _Publish:
    def __init__(
        self,
        entry: CatalogEntry,
        remote: Remote,
        settings: RemoteSettings,
        progress: Callable[[int, int], None],
        stopped: threading.Event,
    ) -> None:
        self._entry = entry
        self._manifest = entry.manifest
        self._base = f"{entry.digest}/{entry.manifest.layout}"
        self._remote = remote
        self._settings = settings
        self._progress = progress
        self._stopped = stopped
        self._patience = Patience(settings, stopped)
        self._lock = threading.Lock()
        self._done = 0
        self._mended: list[str] = []

    def run(self) -> tuple[str, ...]:
        directory, manifest = self._entry.directory, self._manifest
        data = self._local(directory / MANIFEST_FILE)
        same = self._same_manifest(data)
        for partition in manifest.partitions:
            if not self._is_right(partition):
                with self._checked(directory / partition.file, partition, manifest.chunk_bytes) as source:
                    self._write(partition.file, partition.size_bytes, source, self._count)
        for asset in manifest.assets:
            if not self._has(asset.file, asset.size_bytes, asset.sha256):
                content = self._local(directory / asset.file)
                if hashlib.sha256(content).hexdigest() != asset.sha256:
                    raise self._bad(f"{directory / asset.file} is not what was ingested")
                self._write(asset.file, len(content), _of(content), _ignore)
        if not same:
            self._write(MANIFEST_FILE, len(data), _of(data), _ignore)
        return tuple(self._mended)

    # --- what lies there

    def _same_manifest(self, data: bytes) -> bool:
        """True when this manifest lies there, False when none does, or one that nobody can fetch by."""
        path = f"{self._base}/{MANIFEST_FILE}"
        try:
            found = self._read(path, _MAX_MANIFEST_BYTES)
        except NotFound:
            return False
        except InvalidCheckpoint:  # too long to be one
            found = b""
        if found == data:
            return True
        if _is_of(found, self._manifest):
            where, digest = self._remote.where(path), self._manifest.digest[:16]
            raise Conflict(
                f"{where} is another manifest of this checkpoint than this node's. `sllmctl checkpoint fetch {digest} --from "
                f"{self._remote.url}` brings that one to a node that has no copy. To publish this one, choose another remote, "
                f"or remove that layout there, and `sllmctl checkpoint forget {digest} {self._remote.url}`"
            )
        self._mended.append(MANIFEST_FILE)
        return False

    def _is_right(self, partition: Partition) -> bool:
        """True when a partition lies there whose every chunk is right. Parts of it are read back side by side."""
        if not self._is_of_size(partition.file, partition.size_bytes):
            return False
        chunk_bytes = self._manifest.chunk_bytes
        step = max(1, self._settings.part_bytes // chunk_bytes)
        wrong = threading.Event()
        compared = 0

        def compare(first: int) -> int:
            """The bytes of a part, 0 as soon as one is known to be wrong."""
            if wrong.is_set():
                return 0
            numbers = range(first, min(first + step, len(partition.chunk_xxh3)))
            size = self._compare(partition, numbers)
            if not size:
                wrong.set()
            return size

        with ThreadPoolExecutor(self._settings.streams, thread_name_prefix="compare") as pool:
            for size in pool.map(compare, range(0, len(partition.chunk_xxh3), step)):
                compared += size
                self._count(size)
        if wrong.is_set():
            self._count(-compared)
            self._mended.append(partition.file)
        return not wrong.is_set()

    def _compare(self, partition: Partition, numbers: range) -> int:
        """The size of a run of chunks if all of them are right there, else 0."""
        chunk_bytes = self._manifest.chunk_bytes
        start = numbers.start * chunk_bytes
        end = min(numbers.stop * chunk_bytes, partition.size_bytes)
        block = memoryview(bytearray(min(_BLOCK_BYTES, chunk_bytes)))
        path, size = f"{self._base}/{partition.file}", partition.size_bytes

        def open_at(at: int) -> contextlib.AbstractContextManager[Body]:
            return self._remote.open(path, at, end - at, total_bytes=size, deadline=time.monotonic() + self._settings.part_s)

        try:
            with Steady(open_at, start, Patience(self._settings, self._stopped)) as body:
                for number in numbers:
                    left = min(chunk_bytes, partition.size_bytes - number * chunk_bytes)
                    digest = xxhash.xxh3_64()
                    while left:
                        piece = block[: min(left, len(block))]
                        body.fill(piece)
                        digest.update(piece)
                        left -= len(piece)
                    if self._stopped.is_set():
                        raise Cancelled("the publish was cancelled")
                    if digest.intdigest() != partition.chunk_xxh3[number]:
                        return 0
        except InvalidCheckpoint:  # it was replaced by a file of another size just now
            return 0
        return end - start

    def _has(self, file: str, size_bytes: int, sha256: str) -> bool:
        """True when a small file lies there as it should."""
        if not self._is_of_size(file, size_bytes):
            return False
        found = self._read(f"{self._base}/{file}", size_bytes)
        if hashlib.sha256(found).hexdigest() == sha256:
            return True
        self._mended.append(file)
        return False

    def _read(self, path: str, limit_bytes: int) -> bytes:
        return self._patience.ask(lambda: self._remote.read(path, limit_bytes, self._settings.part_s))

    def _is_of_size(self, file: str, size_bytes: int) -> bool:
        found = self._patience.ask(lambda: self._remote.size(f"{self._base}/{file}"))
        if found not in (None, size_bytes):
            self._mended.append(file)
        return found == size_bytes

    # --- what is written

    def _write(self, file: str, size_bytes: int, source: Source, wrote: Callable[[int], None]) -> None:
        """Write a file, and again when it was interrupted; what was counted of it is then taken back, and counted again where
        it has stayed."""

        def attempt() -> None:
            counted = [0]
            lock = threading.Lock()

            def count(size: int) -> None:
                with lock:
                    counted[0] += size
                wrote(size)

            try:
                self._remote.write(f"{self._base}/{file}", size_bytes, source, count)
            except SllmError:
                wrote(-counted[0])
                raise

        self._patience.ask(attempt)

    @contextlib.contextmanager
    def _checked(self, path: Path, partition: Partition, chunk_bytes: int) -> Iterator[Source]:
        """A partition's bytes as a `Source`; every chunk that is read as a whole is compared with its checksum."""
        with contextlib.ExitStack() as stack:
            with self._reading(path):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                stack.callback(os.close, descriptor)
                reader = stack.enter_context(contextlib.closing(SourceReader(descriptor)))
            yield partial(self._read_checked, path, partition, chunk_bytes, reader)

    def _read_checked(
        self, path: Path, partition: Partition, chunk_bytes: int, reader: SourceReader, offset: int, length: int
    ) -> memoryview:
        # From a chunk's start to a chunk's end, so that whatever is handed on was compared.
        start = offset // chunk_bytes * chunk_bytes
        end = min(-(-(offset + length) // chunk_bytes) * chunk_bytes, partition.size_bytes)
        data = memoryview(bytearray(end - start))
        with self._reading(path, start):
            count = reader.read_into(start, data)
        if count < len(data):
            raise self._bad(f"{path} ends at byte {start + count}; its manifest says {partition.size_bytes}")
        for at in range(0, len(data), chunk_bytes):
            found = xxhash.xxh3_64_intdigest(data[at : at + chunk_bytes])
            if found != (expected := partition.chunk_xxh3[(start + at) // chunk_bytes]):
                raise self._bad(
                    f"{path}: the chunk at offset {start + at} is not what was ingested "
                    f"(xxh3 {found:016x}, expected {expected:016x})"
                )
        return data[offset - start : offset - start + length]

    def _local(self, path: Path) -> bytes:
        """A small file of the copy here."""
        with self._reading(path):
            return path.read_bytes()

    @contextlib.contextmanager
    def _reading(self, path: Path, at: int = 0) -> Iterator[None]:
        """Tells an error of the disk here from one of the remote, which may be a disk too, and is tried again."""
        try:
            yield
        except OSError as error:
            catalog.mark(catalog.unmark_verified, self._entry.directory, self._entry.identity)
            raise SllmError(f"cannot read {path} at byte {at}: {error.strerror}") from error

    def _bad(self, reason: str) -> InvalidCheckpoint:
        """The copy here is wrong: nothing is to start from it either."""
        marked = catalog.mark(catalog.quarantine, self._entry.directory, self._entry.identity, reason)
        where = "the copy is in quarantine now: " if marked else ""
        return InvalidCheckpoint(f"{reason}; {where}{_again(self._entry.digest)}")

    def _count(self, size: int) -> None:
        with self._lock:
            self._done += size
            total = self._manifest.image_bytes
            self._progress(max(0, min(self._done, total)), total)


def _is_of(data: bytes, manifest: Manifest) -> bool:
    """True when this is a manifest of the same checkpoint and layout, by which a node could fetch."""
    try:
        found = decode_manifest(data)
    except (InvalidCheckpoint, RecursionError):
        return False
    return (found.digest, found.layout) == (manifest.digest, manifest.layout)


def _again(digest: str) -> str:
    return (
        f"ingest the model again, or fetch it from a remote that has it (`sllmctl checkpoint fetch {digest[:16]} --from URL`)"
    )


def _of(content: bytes) -> Source:
    view = memoryview(content)
    return lambda offset, length: view[offset : offset + length]


def _ignore(size: int) -> None:
    """Text is not counted."""
