"""A checkpoint that is on its way to the disk: ``<data>/partial/<digest>+<layout>/``, kept for the next try, then committed.

What lies in it is believed only after its checksum. Its directory is held with flock by the one who fetches.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

from agent.store import catalog
from agent.store.budget import claim_room
from agent.store.durable import disk_errors, reserve
from agent.store.ingest.reading import SourceReader
from agent.store.temporary import hold_kept
from schema.checkpoint import Manifest
from schema.errors import Conflict

__all__ = ["Partial"]


class Partial:
    """The directory of one fetch. ``resumed``: an earlier one has left files there, of the same manifest."""

    def __init__(self, data: Path, checkpoints: Path, manifest: Manifest, encoded: bytes) -> None:
        self._data = data
        self.manifest = manifest
        self.path = data / "partial" / f"{manifest.digest}+{manifest.layout}"
        self.target = checkpoints / manifest.digest / manifest.layout
        self._trash = data / "tmp" / f"trash-{manifest.digest[:16]}-{manifest.layout}-{secrets.token_hex(4)}"
        self._encoded = encoded
        self._need_bytes = sum(partition.size_bytes for partition in manifest.partitions)
        self.resumed = False
        self._held = -1
        self._files: dict[str, int] = {}
        self._readers: dict[str, SourceReader] = {}

    def begin(self, limit_bytes: int = 0) -> None:
        """Take the directory, and room for all partitions. Raises Conflict when another has it, OutOfSpace.

        ``limit_bytes``: what checkpoints may take of the disk, 0 for all of it.
        """
        with disk_errors(f"fetching checkpoint {self.manifest.digest}", self._data, self._need_bytes):
            held = hold_kept(self.path)
            if held is None:
                raise Conflict(f"checkpoint {self.manifest.digest} is being fetched by another process")
            self._held = held
            manifest_path = self.path / catalog.MANIFEST_FILE
            self.resumed = manifest_path.is_file() and manifest_path.read_bytes() == self._encoded
            if not self.resumed:
                for child in self.path.iterdir():
                    child.unlink()
                manifest_path.write_bytes(self._encoded)
            what = f"checkpoint {self.manifest.digest[:16]}"
            with claim_room(limit_bytes, self._data, self._need_bytes, what, but=self.path):
                for partition in self.manifest.partitions:
                    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                    descriptor = self._files[partition.file] = os.open(self.path / partition.file, flags, 0o666)
                    os.ftruncate(descriptor, partition.size_bytes)
                    reserve(descriptor, partition.size_bytes)
                    self._readers[partition.file] = SourceReader(descriptor)

    def write_asset(self, name: str, data: bytes) -> None:
        with disk_errors(f"writing {self.path / name}", self._data, len(data)):
            (self.path / name).write_bytes(data)

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Write into a partition. Raises OutOfSpace, SllmError."""
        with disk_errors(f"writing {self.path / file} at byte {offset}", self._data, self._need_bytes):
            while data:
                count = os.pwrite(self._files[file], data, offset)
                data = data[count:]
                offset += count

    def has(self, file: str, offset: int, length: int) -> bool:
        """True when something was written to this range, as far as the file system tells."""
        try:
            return os.lseek(self._files[file], offset, os.SEEK_DATA) < offset + length
        except OSError as error:
            return error.errno != errno.ENXIO

    def read(self, file: str, offset: int, view: memoryview) -> None:
        """Read back what lies in a partition."""
        with disk_errors(f"reading {self.path / file} at byte {offset}"):
            if self._readers[file].read_into(offset, view) < len(view):
                raise OSError(errno.EIO, "the file ends early")

    def commit(self) -> None:
        """Every byte was found right: make it durable, then visible. A copy in quarantine is replaced, a sound one is kept."""
        with disk_errors(f"committing checkpoint {self.manifest.digest}"):
            catalog.release(self.path)
            try:
                if not catalog.commit(self.path, self.target, self._trash):
                    shutil.rmtree(self.path)
            finally:
                shutil.rmtree(self._trash, ignore_errors=True)

    def close(self, *, keep: bool = True) -> None:
        """Let go of it; what was not committed stays for the next try, or goes."""
        with contextlib.ExitStack() as stack:  # backwards, and to its end whatever fails on the way
            if self._held >= 0:
                stack.callback(os.close, self._held)
            if not keep:
                stack.callback(shutil.rmtree, self.path, ignore_errors=True)
            for descriptor in self._files.values():
                stack.callback(os.close, descriptor)
            for reader in self._readers.values():
                stack.callback(reader.close)
            self._held, self._files, self._readers = -1, {}, {}
