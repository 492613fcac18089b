"""`sllmctl bench load`, the node's side: how fast this machine loads a checkpoint, and what bounds that.

Runs as a process of its own with an arena of its own, so that a node that serves is disturbed on its disk alone. Every row
goes through the store's and the worker's own code. Rounds are interleaved, and each row is set against the raw rate of the
disk in the same round: the store's reader with no manifest, no chunk table and no checksums.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from agent.engine.image import image_tensors
from agent.native.calibration import Tuning
from agent.native.cold import forget, remember
from agent.native.disk_record import record_path, remembered
from agent.native.mapping import ImageMapping
from agent.store import catalog, peers
from agent.store.catalog import CatalogEntry, partition_path
from agent.store.index import TensorIndex, read_index
from agent.store.ingest.convert import convert
from agent.store.trial import Timing, TrialStore, cpu_s
from schema.checkpoint import IN_PLACE
from schema.errors import Fault, InvalidInput, NotFound, SllmError
from schema.link import Resident
from schema.loadreport import LoadAnswer, LoadReport, LoadRow

__all__ = ["find_entry", "main", "measure"]

RAW: Final = "disk, raw reads"
COLD: Final = "disk -> memory"
CHECKED: Final = "disk -> memory, checksums"
WARM: Final = "page cache -> memory"
ATTACH: Final = "memory -> tensors"
FIRST: Final = "tensors, first pass"
_STEPS: Final = (RAW, COLD, CHECKED, WARM, ATTACH, FIRST)
_STILL_CACHED: Final = 0.01
_NEAR: Final = 0.85
_LEAST_BYTES: Final = 128 << 20
"""A fast disk reads so much in some hundredths of a second: of less a rate is mostly of what comes before the first byte."""
"""A load that reaches this share of the raw disk is bound by it."""


def main(*, checkpoints: Path, directory: Path | None, digest: str, rounds: int, chunk_bytes: int, reader_threads: int) -> int:
    """Measure, and write a `LoadAnswer` as JSON on standard output. Returns the exit code."""
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no part of the answer
    try:
        with contextlib.ExitStack() as stack:
            if directory is None:
                entry = find_entry(checkpoints, digest)
            else:
                entry = stack.enter_context(_entry_in(directory.resolve()))
            tuning = _tuning(checkpoints)
            report = measure(entry, rounds, chunk_bytes=chunk_bytes, reader_threads=reader_threads, tuning=tuning)
        answer = LoadAnswer(report=report if directory is None else msgspec.structs.replace(report, directory=str(directory)))
    except (SllmError, OSError) as error:
        answer = LoadAnswer(fault=Fault.of(error))
    with os.fdopen(out, "wb") as file:
        file.write(msgspec.json.encode(answer))
    return 0 if answer.report is not None else 1


def find_entry(checkpoints: Path, digest: str) -> CatalogEntry:
    """The checkpoint whose digest begins so; for an empty text the largest there is. Raises NotFound, InvalidInput."""
    found = [entry for key, entry in catalog.scan(checkpoints).items() if key.startswith(digest)]
    if not found:
        what = f"checkpoint {digest}" if digest else "checkpoint"
        raise NotFound(f"there is no {what} on this machine's disk, in {checkpoints}; `sllmctl model add` brings one there")
    if digest and len(found) > 1:
        raise InvalidInput(f"{len(found)} checkpoints begin with {digest}; give more of the digest")
    return max(found, key=lambda entry: entry.manifest.image_bytes)


@contextlib.contextmanager
def _entry_in(directory: Path) -> Iterator[CatalogEntry]:
    """The checkpoint in a directory; for a Hugging Face model's, one in place that lasts as long as this."""
    if (directory / catalog.MANIFEST_FILE).exists():
        yield catalog.read_entry(directory)
        return
    if not any(directory.glob("*.safetensors")):
        raise InvalidInput(f"{directory} is neither a checkpoint's directory nor a model's with safetensors files", "dir")
    with tempfile.TemporaryDirectory(prefix="sllmctl-bench-") as scratch:
        checkpoints, temporary = Path(scratch, "checkpoints"), Path(scratch, "tmp")
        for made in (checkpoints, temporary):
            made.mkdir()
        _say("looking through the files once, for their checksums")
        digest = convert(directory, checkpoints, temporary, lambda _done, _total: None, in_place=True)
        yield catalog.scan(checkpoints)[digest]


def _tuning(checkpoints: Path) -> Tuning | None:
    """How the node of these checkpoints reads its disk, if it has found that out."""
    record = remembered(record_path(checkpoints.parent), checkpoints)
    return None if record is None else record.tuning


@dataclass(slots=True, eq=False)
class _Row:
    step: str
    timings: list[Timing] = field(default_factory=list)
    raw: list[Timing] = field(default_factory=list)

    def result(self, image_bytes: int, *, limited: bool, moves: bool) -> LoadRow:
        seconds = [timing.seconds for timing in self.timings]
        middle = statistics.median(seconds)
        shares = [raw.seconds / timing.seconds for raw, timing in zip(self.raw, self.timings, strict=True)]
        return LoadRow(
            step=self.step,
            seconds=middle,
            low=min(seconds),
            high=max(seconds),
            rate_bps=image_bytes / middle if moves else 0.0,
            of_limit=statistics.median(shares) if limited else None,
            cpu_s_per_gb=statistics.median(t.cpu_s for t in self.timings) / image_bytes * 1e9 if moves else None,
        )


def measure(
    entry: CatalogEntry, rounds: int, *, chunk_bytes: int, reader_threads: int, tuning: Tuning | None = None
) -> LoadReport:
    """Load the checkpoint over and over, cold and warm, and beside it other loaders of the same files, where these are
    safetensors. Raises InvalidCheckpoint, OutOfSpace for memory, SllmError."""
    if entry.quarantined is not None:
        raise InvalidInput(f"{entry.directory} is quarantined ({entry.quarantined}); its speed would say nothing")
    files = [partition_path(entry.directory, partition) for partition in entry.manifest.partitions]
    index = read_index(entry.directory, entry.manifest)
    image_bytes = entry.manifest.image_bytes
    store = TrialStore(image_bytes, chunk_bytes=chunk_bytes, reader_threads=reader_threads, tuning=tuning)
    raw, cold, checked, warm, attach, first = rows = [_Row(step) for step in _STEPS]
    others = [(_Row(peer.name), peer) for peer in (peers.installed() if entry.manifest.layout == IN_PLACE else ())]
    kept = 0.0
    try:
        store.fill(entry)  # once for the machinery, and for the checksums that a first load looks at
        for number in range(rounds):
            loads: list[tuple[_Row, Callable[[], Timing]]] = [
                (raw, lambda: store.read(entry, check=False)),
                (cold, lambda: store.fill(entry)[1]),
                (checked, lambda: store.read(entry, check=True)),
                *((row, partial(_load_by, peer, files)) for row, peer in others),
            ]
            for row, load in loads:
                kept = max(kept, *(forget(file) for file in files))
                _time(row, load, number, rounds)
            for file in files:
                remember(file)
            resident, timing = store.fill(entry)
            warm.timings.append(timing)
            attached, touched = _attach(store, index, resident)
            attach.timings.append(attached)
            first.timings.append(touched)
        pages, reader = store.arena.pages, store.reader
    finally:
        store.close()
    rows += [row for row, _ in others]
    for row in rows:
        row.raw = raw.timings
    is_cold = kept <= _STILL_CACHED
    results = tuple(
        row.result(
            image_bytes, limited=is_cold and row.step not in (RAW, WARM, ATTACH, FIRST), moves=row.step not in (ATTACH, FIRST)
        )
        for row in rows
    )
    if image_bytes < _LEAST_BYTES:
        results = tuple(msgspec.structs.replace(row, of_limit=None) for row in results)
    bound, verdict = _verdict({row.step: row for row in results}, is_cold, image_bytes)
    return LoadReport(
        digest=entry.digest, directory=str(entry.directory), image_bytes=image_bytes, tensors=len(index),
        rounds=rounds, reader=reader, pages=pages, cold=is_cold, rows=results, bound=bound, verdict=verdict,
    )  # fmt: skip


def _time(row: _Row, load: Callable[[], Timing], number: int, rounds: int) -> None:
    row.timings.append(load())
    _say(f"round {number + 1} of {rounds}: {row.step} {row.timings[-1].seconds:.2f} s")


def _load_by(peer: peers.Peer, files: Sequence[Path]) -> Timing:
    began, began_cpu_s = time.perf_counter(), cpu_s()
    tensors = peer.load(files)
    timing = Timing(time.perf_counter() - began, cpu_s() - began_cpu_s)
    del tensors
    return timing


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _attach(store: TrialStore, index: TensorIndex, resident: Resident) -> tuple[Timing, Timing]:
    """What is left for a worker when its image is there: to map it and lay tensors over it; and a first pass's faults."""
    began = time.perf_counter()
    mapping = ImageMapping(store.arena.descriptor, resident.extents, resident.image_bytes)
    tensors = image_tensors(index, mapping.buffer)
    seconds = time.perf_counter() - began
    del tensors
    began = time.perf_counter()
    np.frombuffer(mapping.buffer, np.uint8)[:: mmap.PAGESIZE].max()
    touched = time.perf_counter() - began
    mapping.close()
    return Timing(seconds, seconds), Timing(touched, touched)


def _verdict(rows: dict[str, LoadRow], is_cold: bool, image_bytes: int) -> tuple[str, str]:
    """What bounds a load, cold and with its pages cached. A start waits for its worker too, which is not measured here."""
    cold, warm, attach = rows[COLD], rows[WARM], rows[ATTACH]
    if image_bytes < _LEAST_BYTES:
        text = f"{image_bytes / 2**20:.1f} MiB are too small to judge by: opening files and waking threads take the time"
        return "size", f"{text}, not the disk; measure a model of at least {_LEAST_BYTES >> 20} MiB"
    if not is_cold:
        return "memory", "this file system keeps its pages in memory, so that no row is of a disk"
    share = cold.of_limit or 0.0
    if attach.seconds > cold.seconds:
        return "attach", f"laying tensors over the weights ({attach.seconds:.2f} s) takes longer than reading them"
    if share >= _NEAR and cold.seconds > 1.2 * warm.seconds:
        text = f"the disk bounds the load: {cold.seconds:.2f} s cold, at {share:.0%} of what it gives"
        text += f", {attach.seconds * 1e3:.1f} ms for weights kept in memory"
        return "disk", f"{text}; a start takes the longer of that and its worker, which `sllmctl doctor` sets beside it"
    if share >= _NEAR:
        return "memory", f"the disk is as fast as this machine copies memory: a cold load takes {cold.seconds:.2f} s"
    return "memory", f"loads reach {share:.0%} of what the disk gives: processor or memory bound them, not the disk"
