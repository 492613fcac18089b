"""Puts a layout on a remote: its partitions and text assets, checked on the way, and its manifest when all are there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import xxhash

from agent.store.catalog import MANIFEST_FILE, CatalogEntry
from agent.store.remote.api import Patience, Remote, Source
from schema.checkpoint import IN_PLACE, Manifest, Partition
from schema.errors import Conflict, InvalidCheckpoint, InvalidInput, NotFound, SllmError
from schema.remote import RemoteSettings

__all__ = ["publish"]

_MAX_MANIFEST_BYTES: Final = 256 << 20


def publish(
    entry: CatalogEntry,
    remote: Remote,
    settings: RemoteSettings,
    progress: Callable[[int, int], None],
    stopped: threading.Event | None = None,
) -> None:
    """Publish a checkpoint; one whose manifest and sizes are there already is left alone.

    ``progress`` hears (done, total) bytes. A publish that is broken off leaves files without a manifest, which nobody fetches
    and the next one replaces. Raises InvalidCheckpoint when the copy on the disk is not what was ingested, Conflict when
    another manifest lies in its place, and what `Remote` raises.
    """
    if entry.quarantined is not None:
        raise InvalidCheckpoint(f"checkpoint {entry.digest} is in quarantine ({entry.quarantined}); ingest it again")
    if entry.manifest.layout == IN_PLACE:
        raise InvalidInput(
            f"checkpoint {entry.digest} lies in the user's own files, which are not published; add the model without --in-place"
        )
    manifest, base = entry.manifest, f"{entry.digest}/{entry.manifest.layout}"
    data = (entry.directory / MANIFEST_FILE).read_bytes()
    patience = Patience(settings, stopped or threading.Event())
    if patience.ask(lambda: _is_there(remote, base, manifest, data)):
        return
    total = manifest.image_bytes
    lock = threading.Lock()
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(min(done, total), total)

    for partition in manifest.partitions:
        with _checked(entry.directory / partition.file, partition, manifest.chunk_bytes) as source:
            _write(remote, f"{base}/{partition.file}", partition.size_bytes, source, wrote, patience)
    for asset in manifest.assets:
        content = (entry.directory / asset.file).read_bytes()
        if hashlib.sha256(content).hexdigest() != asset.sha256:
            raise InvalidCheckpoint(f"{entry.directory / asset.file} is not what was ingested; ingest the model again")
        _write(remote, f"{base}/{asset.file}", len(content), _of(content), _ignore, patience)
    _write(remote, f"{base}/{MANIFEST_FILE}", len(data), _of(data), _ignore, patience)


def _is_there(remote: Remote, base: str, manifest: Manifest, data: bytes) -> bool:
    try:
        found = remote.read(f"{base}/{MANIFEST_FILE}", _MAX_MANIFEST_BYTES)
    except NotFound:
        return False
    if found != data:
        where = remote.where(f"{base}/{MANIFEST_FILE}")
        raise Conflict(f"{where} is another manifest than this node's; remove that layout from the remote, then publish again")
    sizes = {partition.file: partition.size_bytes for partition in manifest.partitions}
    sizes |= {asset.file: asset.size_bytes for asset in manifest.assets}
    return all(remote.size(f"{base}/{file}") == size for file, size in sizes.items())


def _write(
    remote: Remote, path: str, size_bytes: int, source: Source, wrote: Callable[[int], None], patience: Patience
) -> None:
    """Write a file, again from its start when it was interrupted; what was counted of it is then taken back."""

    def attempt() -> None:
        counted = [0]
        lock = threading.Lock()

        def count(size: int) -> None:
            with lock:
                counted[0] += size
            wrote(size)

        try:
            remote.write(path, size_bytes, source, count)
        except SllmError:
            wrote(-counted[0])
            raise

    patience.ask(attempt)
    patience.progress()


@contextlib.contextmanager
def _checked(path: Path, partition: Partition, chunk_bytes: int) -> Iterator[Source]:
    """A partition's bytes as a `Source`; every chunk that is read as a whole is compared with its checksum."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def read(offset: int, length: int) -> memoryview:
        # From a chunk's start to a chunk's end, so that whatever is handed on was compared.
        start = offset // chunk_bytes * chunk_bytes
        end = min(-(-(offset + length) // chunk_bytes) * chunk_bytes, partition.size_bytes)
        data = memoryview(bytearray(end - start))
        position = 0
        while position < len(data):
            count = os.preadv(descriptor, [data[position:]], start + position)
            if not count:
                raise InvalidCheckpoint(f"{path} ends at byte {start + position}; its manifest says {partition.size_bytes}")
            position += count
        for at in range(0, len(data), chunk_bytes):
            found = xxhash.xxh3_64_intdigest(data[at : at + chunk_bytes])
            if found != (expected := partition.chunk_xxh3[(start + at) // chunk_bytes]):
                raise InvalidCheckpoint(
                    f"{path}: the chunk at offset {start + at} is not what was ingested (xxh3 {found:016x}, expected "
                    f"{expected:016x}); ingest the model again"
                )
        return data[offset - start : offset - start + length]

    try:
        yield read
    except OSError as error:
        raise SllmError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _of(content: bytes) -> Source:
    view = memoryview(content)
    return lambda offset, length: view[offset : offset + length]


def _ignore(size: int) -> None:
    """Text is not counted."""
