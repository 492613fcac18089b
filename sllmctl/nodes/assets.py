"""Text assets of checkpoints on the manager's own disk: fetched from a node that holds them, verified, kept for good.

One directory per checkpoint, named by its digest, made whole under another name and then renamed; so what is there is complete,
and it is still checked when a manager first uses it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from schema.checkpoint import Manifest, decode_manifest
from schema.errors import Fault, InvalidCheckpoint, SllmError, TimedOut, Unschedulable
from sllmctl.nodes.settings import AssetSettings

__all__ = ["Assets", "FileReader", "TextAssets"]

log = logging.getLogger("sllmctl.assets")

_MANIFEST = "manifest.json"
_DIGEST = re.compile("[0-9a-f]{64}")
_PARTIAL = ".part-"


class FileReader(Protocol):
    """Who reads a checkpoint's files from a node: the links."""

    async def read_file(self, node: str, digest: str, file: str) -> bytes: ...


@dataclass(frozen=True, slots=True)
class TextAssets:
    """A checkpoint's manifest, and the directory with the assets that it lists."""

    manifest: Manifest
    directory: Path


@dataclass(slots=True, eq=False)
class _Entry:
    """``nodes`` hold it, in the order in which they said so. ``fault`` is why the last fetch was given up."""

    nodes: dict[str, None] = field(default_factory=dict)
    assets: TextAssets | None = None
    fault: Fault | None = None
    task: asyncio.Task[None] | None = None
    waiters: set[asyncio.Future[None]] = field(default_factory=set)

    def wake(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)


class Assets:
    """Fetches in the background what `known` tells of, one task per checkpoint."""

    def __init__(self, directory: Path, links: FileReader, settings: AssetSettings | None = None) -> None:
        self._directory = directory
        self._links = links
        self._settings = settings or AssetSettings()
        self._entries: dict[str, _Entry] = {}
        self._swept = False

    def known(self, digest: str, node: str) -> None:
        """A node holds this checkpoint: fetch its assets from there, unless they are here."""
        entry = self._entries.setdefault(digest, _Entry())
        entry.nodes.pop(node, None)
        entry.nodes[node] = None
        self._begin(digest, entry)

    async def get(self, digest: str, timeout_s: float) -> TextAssets:
        """The assets, once they are here; a fetch that was given up is begun again.

        Raises Unschedulable when no node is known to hold the checkpoint or every one's copy is bad, TimedOut.
        """
        entry = self._entries.setdefault(digest, _Entry())
        if entry.assets is not None:
            return entry.assets
        self._begin(digest, entry)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry.waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            why = entry.fault.message if entry.fault is not None else "they are still on their way"
            if not entry.nodes:
                raise Unschedulable(f"no node is known to hold checkpoint {digest[:12]}") from None
            raise TimedOut(f"the text assets of checkpoint {digest[:12]} were not here within {timeout_s:g} s: {why}") from None
        finally:
            entry.waiters.discard(waiter)
        assets = self._entries[digest].assets
        if assets is None:
            why = entry.fault.message if entry.fault is not None else "the manager is stopping"
            raise Unschedulable(f"the text assets of checkpoint {digest[:12]} cannot be had: {why}")
        return assets

    async def close(self) -> None:
        """Stop fetching; whoever waits is told."""
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for entry in self._entries.values():
            entry.wake()

    def _begin(self, digest: str, entry: _Entry) -> None:
        if entry.assets is None and entry.task is None:
            entry.task = asyncio.get_running_loop().create_task(self._fetch(digest, entry), name=f"assets of {digest[:12]}")

    async def _fetch(self, digest: str, entry: _Entry) -> None:
        """Take what is on disk, or try the nodes in turn until one's copy is here whole; give up after some rounds."""
        delay_s = self._settings.retry_first_s
        try:
            if _DIGEST.fullmatch(digest) is None:
                raise InvalidCheckpoint(f"{digest!r} is no checkpoint's digest")
            entry.assets = await asyncio.to_thread(self._from_disk, digest)
            for _ in range(self._settings.rounds):
                for node in list(reversed(entry.nodes)):
                    if entry.assets is None:
                        await self._try(digest, entry, node)
                if entry.assets is not None or not entry.nodes:
                    break
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
                delay_s = min(delay_s * 2, self._settings.retry_longest_s)
        except (SllmError, OSError) as error:
            entry.fault = Fault.of(error)
            log.error("the text assets of checkpoint %s cannot be kept: %s", digest[:12], error)
        finally:
            entry.task = None
        # Without a holder those who wait go on waiting: one may become known, as when a manager has just started.
        if entry.assets is not None or entry.nodes or entry.fault is not None:
            entry.wake()

    async def _try(self, digest: str, entry: _Entry, node: str) -> None:
        """One node's copy. Raises OSError when this machine's disk fails; what is wrong with the node is kept as the fault."""
        try:
            manifest = decode_manifest(data := await self._links.read_file(node, digest, _MANIFEST))
            if manifest.digest != digest:
                raise InvalidCheckpoint(f"node {node} gave the manifest of {manifest.digest[:12]} for {digest[:12]}")
            files = {_MANIFEST: data}
            for asset in manifest.text_assets:
                if asset.file in files:
                    raise InvalidCheckpoint(f"the manifest of {digest[:12]} lists {asset.file} twice")
                content = await self._links.read_file(node, digest, asset.file)
                if len(content) != asset.size_bytes or hashlib.sha256(content).hexdigest() != asset.sha256:
                    raise InvalidCheckpoint(f"{asset.file} of {digest[:12]} on node {node} is not what the manifest says")
                files[asset.file] = content
        except SllmError as error:
            entry.fault = Fault.of(error)
            log.warning("the text assets of checkpoint %s did not come from node %s: %s", digest[:12], node, error)
            return
        await asyncio.to_thread(self._keep, digest, files)
        entry.assets, entry.fault = TextAssets(manifest, self._directory / digest), None

    def _from_disk(self, digest: str) -> TextAssets | None:
        """What is kept already, checked; a damaged directory is removed. Raises OSError."""
        if not self._swept:
            self._swept = True
            for leftover in self._directory.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        directory = self._directory / digest
        if not directory.is_dir():
            return None
        try:
            manifest = decode_manifest((directory / _MANIFEST).read_bytes())
            whole = manifest.digest == digest and all(
                hashlib.sha256((directory / asset.file).read_bytes()).hexdigest() == asset.sha256
                for asset in manifest.text_assets
            )
        except (OSError, InvalidCheckpoint):
            whole = False
        if whole:
            return TextAssets(manifest, directory)
        log.warning("the text assets in %s are damaged and are fetched again", directory)
        shutil.rmtree(directory)
        return None

    def _keep(self, digest: str, files: dict[str, bytes]) -> None:
        """Write all files, flushed, under a temporary name; then rename. Raises OSError, and leaves nothing behind then."""
        self._directory.mkdir(parents=True, mode=0o700, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=self._directory, prefix=_PARTIAL))
        try:
            for name, content in files.items():
                with (partial / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_directory(partial)
            partial.rename(self._directory / digest)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync_directory(self._directory)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
