"""A store that fetches, and what it fetches: a checkpoint with an asset, whole or spoilt."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent.native.arena import Arena
from agent.store import catalog
from agent.store.remote.fetches import Fetches
from schema.checkpoint import AssetEntry, decode_manifest, encode_manifest
from schema.errors import Fault
from schema.link import Fetching
from schema.remote import RemoteSettings
from tests.agent.store.images import CHUNK, Bench, commit

SETTINGS = RemoteSettings(
    streams=3, part_bytes=2 * CHUNK, connect_s=60, read_s=60, part_s=100, attempts=4, longest_delay_s=0.01
)  # fmt: skip
SIZE = 5 * CHUNK + 12_345
PART = "partition_0.bin"


class FetchBench(Bench):
    """A store with fetches into a data directory, driven as the store process drives them."""

    def __init__(self, data: Path, settings: RemoteSettings = SETTINGS, chunks: int = 16, disk_bytes: int = 0) -> None:
        super().__init__(Arena.create(chunks * CHUNK, CHUNK))
        self.data = data
        self.answers: dict[str, Fault | None] = {}
        self.layouts: dict[str, str] = {}
        self.progress: list[tuple[str, int, int]] = []
        self.coming_to: list[Fetching] = []
        checkpoints = data / "checkpoints"
        self.fetches = Fetches(
            data, checkpoints, settings, self.store, self, lambda: self._write(self._event, 1), disk_bytes=disk_bytes
        )

    def coming(self, message: Fetching) -> None:
        self.coming_to.append(message)

    def fetching(self, op: str, done_bytes: int, total_bytes: int) -> None:
        self.progress.append((op, done_bytes, total_bytes))

    def fetched(self, op: str, digest: str, layout: str, fault: Fault | None, came_bytes: int) -> None:
        assert not op or op not in self.answers, f"{op} was answered twice"  # "" is nobody, who may be told of several
        self.answers[op], self.layouts[op] = fault, layout

    def until(self, what: object, timeout_s: float = 100.0) -> None:
        """Pump until ``what()`` holds."""
        deadline = time.monotonic() + timeout_s
        while not what():  # type: ignore[operator]
            assert select.select([self._event], [], [], max(0.0, deadline - time.monotonic()))[0], f"{self.answers}"
            os.eventfd_read(self._event)
            self.store.pump()
            self.fetches.pump()

    def get(self, digest: str, url: str, layout: str = "", *, in_memory: bool = False) -> Fault | None:
        op = f"op-{len(self.answers)}"
        self.fetches.begin(op, digest, url, layout, in_memory=in_memory, users=1 if in_memory else 0)
        self.until(lambda: op in self.answers)
        return self.answers[op]

    @property
    def leftovers(self) -> list[str]:
        return [
            str(path.relative_to(self.data)) for kind in ("partial", "tmp") for path in sorted((self.data / kind).glob("*"))
        ]

    def close(self) -> None:
        self.fetches.close()
        self.store.pump()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch")]
        free = self.arena.chunks - sum(len(each.extents) and -(-each.image_bytes // CHUNK) for each in self.store.residents())
        assert self.store.arena.used_bytes == (self.arena.chunks - free) * CHUNK, "chunks have leaked"
        super().close()


def open_files() -> Iterator[str]:
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            yield str(path.readlink())


def make_source(root: Path) -> tuple[str, Path, bytes]:
    """A checkpoint with an asset, as it lies on a remote at ``root``: its digest, its directory, its image."""
    digest, directory, image = commit(root, 7, SIZE, partitions=2)
    text = b"{}" * 1000
    (directory / "tokenizer.json").write_bytes(text)
    rewrite(directory, assets=(AssetEntry("tokenizer.json", len(text), hashlib.sha256(text).hexdigest()),))
    return digest, directory, image


def rewrite(directory: Path, **changes: object) -> None:
    manifest = decode_manifest((directory / "manifest.json").read_bytes())
    (directory / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, **changes)))


def spoil(directory: Path, offset: int, file: str = PART) -> None:
    with (directory / file).open("r+b") as target:
        target.seek(offset)
        byte = target.read(1)
        target.seek(offset)
        target.write(bytes([byte[0] ^ 1]))


def image_of(directory: Path) -> bytes:
    return b"".join((directory / f"partition_{number}.bin").read_bytes() for number in range(2))


def assert_there(bench: FetchBench, digest: str, image: bytes) -> None:
    entry = catalog.scan(bench.data / "checkpoints")[digest]
    assert entry.quarantined is None
    assert catalog.is_verified(entry.directory)
    assert image_of(entry.directory) == image
    assert (entry.directory / "tokenizer.json").read_bytes() == b"{}" * 1000
    assert bench.leftovers == []


def changed(settings: RemoteSettings, **changes: object) -> RemoteSettings:
    return msgspec.structs.replace(settings, **changes)
