"""Fetches a model's directory from a web server that is no hub: only the files that ingest reads, in parts, resumable.

A server cannot be asked what it has, so the names are those that Hugging Face directories have, and those in an index. Weights
come in ranges over several connections; each chunk that has come is noted with its checksum (`Journal`), so that a fetch
which broke off goes on, if the server still has the same file by its size and ETag (or Last-Modified).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import xxhash

from agent.store.durable import disk_errors, reserve
from agent.store.ingest.files import PLAIN_NAME
from agent.store.ingest.headers import parse_json
from agent.store.ingest.journal import Journal
from agent.store.ingest.pipeline import CHUNK_BYTES, find_chunks
from agent.store.remote.api import Interrupted, Patience
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
_MAX_SHARDS: Final = 10_000
_TICK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Weights:
    """One file of weights on its way."""

    name: str
    size_bytes: int
    version: str
    descriptor: int
    journal: Journal


def fetch_directory(
    source: UrlSource,
    directory: Path,
    settings: RemoteSettings,
    progress: Callable[[int, int], None],
    resumed: Callable[[int], None] = lambda _: None,
) -> None:
    """Fetch a model into ``directory``, which may hold a part of it from before; ``resumed`` hears how many bytes it holds.

    ``progress`` hears (done, total) bytes of the weights. Raises NotFound where there is no model, Unauthorised,
    Unreachable when the server does not answer, breaks off again and again or has no valid certificate, InvalidInput when it
    does not honour Range requests, InvalidCheckpoint for names that are not plain, for files that are too large and for one
    that is changed meanwhile, OutOfSpace before the weights are fetched when the disk has no room.
    """
    remote = WebRemote(check_remote_url(source.url), settings)
    try:
        with disk_errors(f"fetching {source.url}"):
            _Fetch(remote, directory, settings, progress, resumed).run()
    finally:
        remote.close()


class _Fetch:
    def __init__(
        self,
        remote: WebRemote,
        directory: Path,
        settings: RemoteSettings,
        progress: Callable[[int, int], None],
        resumed: Callable[[int], None],
    ) -> None:
        self._remote = remote
        self._directory = directory
        self._settings = settings
        self._progress = progress
        self._resumed = resumed
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._done_bytes = 0

    def run(self) -> None:
        config = self._small("config.json")
        if config is None:
            where = self._remote.where("config.json")
            raise NotFound(f"{where} does not exist; give the URL of a directory that has a model's config.json and weights")
        small = {"config.json": config}
        small |= {name: data for name in _SMALL if (data := self._small(name)) is not None}
        index, names = self._weight_files()
        small |= index
        self._tidy(names)
        for name, data in small.items():
            (self._directory / name).write_bytes(data)
        self._weights(names)

    def _small(self, name: str) -> bytes | None:
        return self._ask(lambda: self._remote.read(name, _MAX_SMALL_BYTES, time.monotonic() + self._settings.part_s))

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The answer, asked for as often as the settings allow; None where there is no such file."""
        try:
            return Patience(self._settings, self._stopped).ask(question)
        except NotFound:
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
            if self._ask(lambda single=single: self._remote.look(single)) is not None:  # type: ignore[misc]
                return {}, [single]
        raise NotFound(f"{self._remote.where('')} has a config.json, but neither {_WEIGHTS[0][1]} nor {_WEIGHTS[1][1]}")

    def _tidy(self, names: list[str]) -> None:
        """Leave of an earlier fetch only what this one goes on with."""
        wanted = {*names, *map(_journal_name, names)}
        for path in self._directory.iterdir():
            if path.name not in wanted:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _weights(self, names: list[str]) -> None:
        found = {name: self._ask(lambda name=name: self._remote.look(name)) for name in names}  # type: ignore[misc]
        looks: dict[str, tuple[int, str]] = {}
        for name, look in found.items():
            if look is None:
                raise NotFound(f"{self._remote.where(name)} does not exist, although the index names it")
            looks[name] = look
        total = sum(size for size, _ in looks.values())
        lie = sum(path.stat().st_blocks * 512 for name in names if (path := self._directory / name).exists())
        if (free := shutil.disk_usage(self._directory).free + lie) < total:
            raise OutOfSpace(f"{self._remote.url} has {total} bytes of weights; {self._directory} has {free} free")
        opened: list[_Weights] = []
        try:
            parts: list[tuple[_Weights, int, int]] = []
            for name, (size, version) in looks.items():
                weights = self._open(name, size, version)
                opened.append(weights)
                there = find_chunks(self._directory / name, size, weights.journal.chunks)
                self._done_bytes += sum(min(CHUNK_BYTES, size - number * CHUNK_BYTES) for number in there)
                parts += [(weights, *part) for part in self._missing(size, there)]
            self._resumed(self._done_bytes)
            self._fetch_parts(iter(parts), total)
        finally:
            for weights in opened:
                os.close(weights.descriptor)
                weights.journal.close()

    def _open(self, name: str, size: int, version: str) -> _Weights:
        identity = hashlib.sha256(f"{self._remote.where(name)} {version} {CHUNK_BYTES}".encode()).hexdigest()
        journal = Journal(self._directory / _journal_name(name), identity)
        descriptor = os.open(self._directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        if journal.fresh or os.fstat(descriptor).st_size != size:
            journal.forget()
            os.ftruncate(descriptor, 0)
            reserve(descriptor, size)
            os.ftruncate(descriptor, size)
        return _Weights(name, size, version, descriptor, journal)

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

    def _fetch_parts(self, parts: Iterator[tuple[_Weights, int, int]], total: int) -> None:
        def work() -> None:
            memory = memoryview(bytearray(CHUNK_BYTES))
            while not self._stopped.is_set():
                with self._lock:
                    part = next(parts, None)
                if part is None:
                    return
                self._fetch_part(*part, memory)

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
        patience = Patience(self._settings, self._stopped)
        while start < end:
            try:
                deadline = time.monotonic() + self._settings.part_s
                with self._remote.open_version(weights.name, weights.version, start, end - start, deadline) as body:
                    while start < end:
                        view = memory[: min(CHUNK_BYTES, end - start)]
                        body.fill(view)
                        self._keep(weights, start, view)
                        start += len(view)
                        patience.progress()
            except Interrupted as error:
                patience.failed(error)
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
        weights.journal.chunk(start // CHUNK_BYTES, xxh3)
        with self._lock:
            self._done_bytes += len(view)


def _journal_name(name: str) -> str:
    return f".{name}.journal"
