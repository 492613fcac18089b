"""Fetches a model's directory from a web server that is no hub: only the files that ingest reads, in parts, resumable.

A server cannot be asked what it has, so the names are those that Hugging Face directories have, and those in an index. Weights
come in ranges over several connections; each chunk that has come is noted with its checksum (`Journal`), so that a fetch
which broke off goes on, if the server still has the same file by its size and ETag (or Last-Modified).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import xxhash

from agent.store.durable import disk_errors, reserve
from agent.store.ingest.files import PLAIN_NAME
from agent.store.ingest.headers import parse_json
from agent.store.ingest.journal import Journal
from agent.store.ingest.pipeline import CHUNK_BYTES, find_chunks
from agent.store.remote.api import Body, Forbidden, Patience
from agent.store.remote.steady import Steady
from agent.store.remote.web import WebRemote
from schema.errors import InvalidCheckpoint, NotFound, OutOfSpace, SllmError
from schema.remote import RemoteSettings, check_remote_url
from schema.spec import UrlSource

__all__ = ["fetch_directory"]

T = TypeVar("T")

_SMALL: Final = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja",
)  # fmt: skip
_WEIGHTS: Final = (
    ("model.safetensors.index.json", "model.safetensors", r".*\.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", r".*\.bin"),
)
_MAX_SMALL_BYTES: Final = 64 << 20
_MAX_SMALL_SUM_BYTES: Final = 128 << 20
"""Small files are in memory until the weights are known to be there."""
_MAX_SHARDS: Final = 10_000
_TICK_S: Final = 0.1
_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Weights:
    """One file of weights on its way, open from its first part to its last: few of many shards are open at a time."""

    name: str
    size_bytes: int
    version: str
    parts: list[tuple[int, int]] = field(default_factory=list)
    """The ranges to fetch."""
    parts_left: int = 0
    descriptor: int = -1
    journal: Journal | None = None

    def close(self) -> None:
        if self.journal is not None:
            os.close(self.descriptor)
            self.journal.close()
        self.descriptor, self.journal = -1, None


def fetch_directory(
    source: UrlSource,
    directory: Path,
    settings: RemoteSettings,
    progress: Callable[[int, int], None],
    free: Callable[[int], int],
    resumed: Callable[[int], None] = lambda _: None,
) -> None:
    """Fetch a model into ``directory``, which may hold a part of it from before; ``resumed`` hears how many bytes it holds.
    ``free`` says how many bytes the disk has, if so many are needed.

    ``progress`` hears (done, total) bytes of the weights. Raises NotFound where there is no model, Unauthorised,
    Unreachable when the server does not answer, breaks off again and again or has no valid certificate, InvalidInput when it
    does not honour Range requests, InvalidCheckpoint for names that are not plain, for files that are too large and for one
    that is changed meanwhile, OutOfSpace before the weights are fetched when the disk has no room.
    """
    remote = WebRemote(check_remote_url(source.url), settings)
    try:
        with disk_errors(f"fetching {source.url}", directory):
            _Fetch(remote, directory, settings, progress, free, resumed).run()
    finally:
        remote.close()


class _Fetch:
    def __init__(
        self,
        remote: WebRemote,
        directory: Path,
        settings: RemoteSettings,
        progress: Callable[[int, int], None],
        free: Callable[[int], int],
        resumed: Callable[[int], None],
    ) -> None:
        self._free = free
        self._remote = remote
        self._directory = directory
        self._settings = settings
        self._progress = progress
        self._resumed = resumed
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._small_bytes = 0
        self._readable = False
        self._refused: dict[str, Forbidden] = {}

    def run(self) -> None:
        config = self._small("config.json")
        if config is None:
            where = self._remote.where("config.json")
            raise NotFound(f"{where} does not exist; give the URL of a directory that has a model's config.json and weights")
        self._readable = True
        small = {"config.json": config}
        small |= {name: data for name in _SMALL if (data := self._small(name)) is not None}
        index, names = self._weight_files()
        small |= index
        found = self._look(names)
        self._tidy(names)
        for name, data in small.items():
            (self._directory / name).write_bytes(data)
        for name in self._refused:
            _log.warning("%s may not be read (403), and is taken for absent", self._remote.where(name))
        self._fetch_weights(found)

    def _small(self, name: str) -> bytes | None:
        limit = min(_MAX_SMALL_BYTES, _MAX_SMALL_SUM_BYTES - self._small_bytes)
        data = self._ask(name, lambda: self._remote.read(name, limit, self._settings.part_s))
        self._small_bytes += len(data or b"")
        return data

    def _ask(self, name: str, question: Callable[[], T]) -> T | None:
        """The answer about a file, asked for as often as the settings allow; None where there is no such file.

        S3 answers 403 for what is not there, unless the bucket may be listed. So a file that is refused counts as absent, once
        another one could be read.
        """
        try:
            return Patience(self._settings, self._stopped).ask(question)
        except NotFound:
            return None
        except Forbidden as error:
            if not self._readable:
                raise
            self._refused[name] = error
            return None

    def _weight_files(self) -> tuple[dict[str, bytes], list[str]]:
        """The index, if there is one, and the names of all files of weights."""
        for index, single, pattern in _WEIGHTS:
            if (data := self._small(index)) is not None:
                placed = parse_json(data, self._remote.where(index)).get("weight_map")
                names = sorted(set(map(str, placed.values()))) if isinstance(placed, dict) else []
                if not 0 < len(names) <= _MAX_SHARDS:
                    raise InvalidCheckpoint(f"{self._remote.where(index)} has no weight_map of names to files")
                for name in names:
                    if PLAIN_NAME.fullmatch(name) is None or re.fullmatch(pattern, name) is None:
                        raise InvalidCheckpoint(f"{self._remote.where(index)}: {name[:80]!r} is no plain name of such a file")
                return {index: data}, names
            if self._ask(single, lambda single=single: self._remote.look(single)) is not None:  # type: ignore[misc]
                return {}, [single]
        for _, single, _ in _WEIGHTS:
            if (refused := self._refused.get(single)) is not None:
                raise refused
        raise NotFound(f"{self._remote.where('')} has a config.json, but neither {_WEIGHTS[0][1]} nor {_WEIGHTS[1][1]}")

    def _look(self, names: list[str]) -> list[_Weights]:
        """The files of weights, all of which must be there before anything of an earlier fetch goes."""
        found = []
        for name in names:
            look = self._ask(name, lambda name=name: self._remote.look(name))  # type: ignore[misc]
            if look is None:
                raise self._refused.get(name) or NotFound(
                    f"{self._remote.where(name)} does not exist, although the index names it"
                )
            found.append(_Weights(name, *look))
        return found

    def _tidy(self, names: list[str]) -> None:
        """Leave of an earlier fetch only what this one goes on with."""
        wanted = {*names, *map(_journal_name, names)}
        for path in self._directory.iterdir():
            if path.name not in wanted:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _fetch_weights(self, found: list[_Weights]) -> None:
        total = sum(weights.size_bytes for weights in found)
        lie = sum(path.stat().st_blocks * 512 for each in found if (path := self._directory / each.name).exists())
        if (room := self._free(total - lie) + lie) < total:
            missing = f"{self._directory} has {room} free: {total - room} are missing"
            raise OutOfSpace(f"{self._remote.url} has {total} bytes of weights; {missing}")
        for weights in found:
            self._begin(weights)
        self._resumed(self._done_bytes)
        try:
            self._fetch_parts(found, total)
        finally:
            for weights in found:
                weights.close()

    def _begin(self, weights: _Weights) -> None:
        """Take the disk's room for a file, and find out what of it is there."""
        size = weights.size_bytes
        journal = self._open(weights)
        try:
            if journal.fresh or os.fstat(weights.descriptor).st_size != size:
                journal.forget()
                os.ftruncate(weights.descriptor, 0)
                reserve(weights.descriptor, size)
                os.ftruncate(weights.descriptor, size)
            there = find_chunks(self._directory / weights.name, size, journal.chunks)
        finally:
            weights.close()
        self._done_bytes += sum(min(CHUNK_BYTES, size - number * CHUNK_BYTES) for number in there)
        weights.parts = list(self._missing(size, there))
        weights.parts_left = len(weights.parts)

    def _open(self, weights: _Weights) -> Journal:
        known = f"{self._remote.where(weights.name)} {weights.version} {CHUNK_BYTES}"
        journal = Journal(self._directory / _journal_name(weights.name), hashlib.sha256(known.encode()).hexdigest())
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            weights.descriptor = os.open(self._directory / weights.name, flags, 0o666)
        except OSError:
            journal.close()
            raise
        weights.journal = journal
        return journal

    def _missing(self, size: int, there: dict[int, int]) -> Iterator[tuple[int, int]]:
        """Runs of bytes of chunks that are not there, none longer than a part."""
        longest = max(1, self._settings.part_bytes // CHUNK_BYTES)
        first = 0
        last = -(-size // CHUNK_BYTES)
        for number in range(last + 1):
            if number == last or number in there or number - first == longest:
                if number > first:
                    yield first * CHUNK_BYTES, min(size, number * CHUNK_BYTES)
                first = number + 1 if number in there else number

    def _fetch_parts(self, found: list[_Weights], total: int) -> None:
        parts = iter([(weights, *part) for weights in found for part in weights.parts])

        def work() -> None:
            memory = memoryview(bytearray(CHUNK_BYTES))
            while not self._stopped.is_set():
                with self._lock:
                    part = next(parts, None)
                    if part is None:
                        return
                    weights = part[0]
                    if weights.journal is None:
                        self._open(weights)
                self._fetch_part(*part, memory)
                with self._lock:
                    weights.parts_left -= 1
                    if not weights.parts_left:
                        weights.close()

        with ThreadPoolExecutor(self._settings.streams, thread_name_prefix="fetch") as pool:
            pending = {pool.submit(work) for _ in range(self._settings.streams)}
            try:
                while pending:
                    ended, pending = wait(pending, _TICK_S, FIRST_EXCEPTION)
                    self._progress(self._done_bytes, total)
                    for each in ended:
                        each.result()
            except BaseException:
                self._stopped.set()
                self._remote.abort()
                raise

    def _fetch_part(self, weights: _Weights, start: int, end: int, memory: memoryview) -> None:
        def open_at(at: int) -> AbstractContextManager[Body]:
            deadline = time.monotonic() + self._settings.part_s
            return self._remote.open_version(weights.name, weights.version, at, end - at, deadline)

        patience = Patience(self._settings, self._stopped)
        try:
            with Steady(open_at, start, patience) as body:
                while start < end:
                    view = memory[: min(CHUNK_BYTES, end - start)]
                    body.fill(view)
                    self._keep(weights, start, view)
                    start += len(view)
                    patience.progress()
        except NotFound as error:
            raise SllmError(
                f"{self._remote.where(weights.name)} was there when the fetch began, and is not any more"
            ) from error

    def _keep(self, weights: _Weights, start: int, view: memoryview) -> None:
        xxh3 = xxhash.xxh3_64_intdigest(view)
        data, at = view, start
        while data:
            count = os.pwrite(weights.descriptor, data, at)
            data, at = data[count:], at + count
        assert weights.journal is not None
        weights.journal.chunk(start // CHUNK_BYTES, xxh3)
        with self._lock:
            self._done_bytes += len(view)


def _journal_name(name: str) -> str:
    return f".{hashlib.sha256(name.encode()).hexdigest()[:32]}.journal"  # a name as long as it may be leaves no room for more
