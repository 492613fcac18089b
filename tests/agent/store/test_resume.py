"""Ingests that were broken off: what lies complete and right is kept, everything else is done again, the result is the same."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from agent.native.cold import cached_fraction
from agent.store.budget import claim_room, used_bytes
from agent.store.ingest.files import SourceDirectory
from agent.store.ingest.headers import Sources, SourceTensor
from agent.store.ingest.pipeline import CHUNK_BYTES, find_chunks
from agent.store.ingest.reading import SourceReader
from agent.store.ingest.writer import Written, write_partition
from agent.store.temporary import kept_directory, sweep, temporary_directory
from schema.errors import InvalidCheckpoint, OutOfSpace, Unreachable
from tests.checkpoints import Tensor, write_safetensors
from tests.examples import sampled
from tests.mappings import make_cold

SEED = 20261128
WORK = """
import sys, time
from pathlib import Path
from agent.store.ingest.files import SourceDirectory
from agent.store.ingest.headers import Sources
from agent.store.ingest.writer import write_partition
at = Path(sys.argv[2])
with Sources(SourceDirectory(Path(sys.argv[1]))) as sources:
    real = sources.read_into
    def slow(tensor, start, target):
        time.sleep(0.01)
        real(tensor, start, target)
    sources.read_into = slow
    print("begun", flush=True)
    write_partition(at / "p.bin", sources, sources.tensors.values(), lambda done: None, journal=at / "journal")
"""


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    make = random.Random(SEED)
    sizes = [3 * CHUNK_BYTES + 777, CHUNK_BYTES, 0, 2 * CHUNK_BYTES - 1] + [make.randrange(1 << 20) for _ in range(60)]
    return {f"t{n:03}": ("U8", (size,), make.randbytes(size)) for n, size in enumerate(sizes)}


@pytest.fixture
def source(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    (tmp_path / "m").mkdir()
    write_safetensors(tmp_path / "m" / "model.safetensors", tensors)
    return tmp_path / "m"


class Tried:
    """One try at a partition in ``at``: what it spared, and what it read."""

    def __init__(self, source: Path, at: Path, stop_after: int = 1 << 60) -> None:
        at.mkdir(exist_ok=True)
        self.spared_bytes = -1
        self.read_bytes = 0
        lock = threading.Lock()
        self.written: Written | None = None
        with Sources(SourceDirectory(source)) as sources:
            real = sources.read_into

            def read_into(tensor: SourceTensor, start: int, target: memoryview) -> None:
                if self.read_bytes > stop_after:
                    raise Unreachable("the source is gone")
                with lock:  # several threads read
                    self.read_bytes += len(target)
                real(tensor, start, target)

            sources.read_into = read_into  # type: ignore[method-assign]
            with contextlib.suppress(Unreachable):
                self.written = write_partition(
                    at / "p.bin", sources, sources.tensors.values(), lambda done: None, journal=at / "journal",
                    resumed=self._resumed,
                )  # fmt: skip

    def _resumed(self, spared_bytes: int) -> None:
        self.spared_bytes = spared_bytes


def test_what_is_complete_is_kept_and_the_rest_is_done_again(tmp_path: Path, source: Path) -> None:
    whole = Tried(source, tmp_path / "whole")
    assert whole.spared_bytes == 0
    spared = []
    for stop_after in (1, 8 * CHUNK_BYTES, 8 * CHUNK_BYTES, 1 << 60):
        tried = Tried(source, tmp_path / "part", stop_after)
        assert tried.spared_bytes + tried.read_bytes <= whole.read_bytes + CHUNK_BYTES
        spared.append(tried.spared_bytes)
    assert spared == sorted(spared)
    assert spared[-1] > 0
    assert tried.written == whole.written
    assert (tmp_path / "part" / "p.bin").read_bytes() == (tmp_path / "whole" / "p.bin").read_bytes()
    again = Tried(source, tmp_path / "part")
    assert (again.spared_bytes, again.read_bytes) == (whole.read_bytes, 0)
    assert again.written == whole.written


def test_a_changed_source_begins_anew(tmp_path: Path, source: Path) -> None:
    Tried(source, tmp_path / "part")
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert Tried(source, tmp_path / "part").spared_bytes == 0
    assert Tried(source, tmp_path / "part").written == Tried(source, tmp_path / "whole").written


def test_a_source_that_is_changed_meanwhile_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "at").mkdir()
    with Sources(SourceDirectory(source)) as sources:

        def change(done: int) -> None:
            os.utime(source / "model.safetensors", ns=(1, 1))

        with pytest.raises(InvalidCheckpoint, match="were changed while they were read"):
            write_partition(
                tmp_path / "at" / "p.bin", sources, sources.tensors.values(), change, journal=tmp_path / "at" / "journal"
            )


@pytest.mark.parametrize("harm", sampled(["chunk", "length", "gone", "line", "torn", "zeros"], "chunk", "torn"))
def test_nothing_is_believed_without_its_checksum(tmp_path: Path, source: Path, harm: str) -> None:
    whole = Tried(source, tmp_path / "whole")
    Tried(source, tmp_path / "part")
    image, journal = tmp_path / "part" / "p.bin", tmp_path / "part" / "journal"
    data, lines = bytearray(image.read_bytes()), bytearray(journal.read_bytes())
    if harm == "chunk":
        data[CHUNK_BYTES + 5] ^= 1
    elif harm == "length":
        del data[-CHUNK_BYTES:]
    elif harm == "line":
        lines[len(lines) // 2] ^= 1
    elif harm == "torn":
        del lines[len(lines) // 2 :]
    elif harm == "zeros":
        lines[len(lines) // 2 :] = bytes(len(lines) // 2)
    image.write_bytes(data)
    journal.write_bytes(lines)
    if harm == "gone":
        image.unlink()
    tried = Tried(source, tmp_path / "part")
    assert tried.spared_bytes < whole.read_bytes
    assert tried.written == whole.written
    assert image.read_bytes() == (tmp_path / "whole" / "p.bin").read_bytes()


def test_looking_at_what_is_there_leaves_the_page_cache_to_others(tmp_path: Path) -> None:
    data = np.random.default_rng(SEED).bytes(4 * CHUNK_BYTES + 300_001)
    path = tmp_path / "p.bin"
    path.write_bytes(data)
    sums = {at // CHUNK_BYTES: xxhash.xxh3_64_intdigest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)}
    make_cold(path)
    right = {number: sums[number] for number in (0, 2, 3, 4)}
    assert find_chunks(path, len(data), right | {1: sums[0], 5: 0}) == right
    assert cached_fraction(path) < 0.1


def test_what_cannot_be_read_back_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.bin").write_bytes(bytes(2 * CHUNK_BYTES))
    zeros = xxhash.xxh3_64_intdigest(bytes(CHUNK_BYTES))
    real = SourceReader.read_into

    def broken(self: SourceReader, at: int, target: memoryview) -> int:
        if not at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, at, target)

    monkeypatch.setattr(SourceReader, "read_into", broken)
    assert find_chunks(tmp_path / "p.bin", 2 * CHUNK_BYTES, {0: zeros, 1: zeros}) == {1: zeros}


@pytest.mark.slow
def test_killed_at_any_point_it_goes_on_to_the_same_bytes(tmp_path: Path, source: Path) -> None:
    make = random.Random(SEED)
    whole = Tried(source, tmp_path / "whole")
    at = tmp_path / "part"
    at.mkdir()
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", WORK, str(source), str(at)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        with child.stdout:
            child.stdout.readline()
            lines = count_lines(at / "journal")
            wanted = lines + make.randrange(8, 30)
            deadline = time.monotonic() + 100
            while child.poll() is None and count_lines(at / "journal") < wanted and time.monotonic() < deadline:
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
            assert child.wait(30) in (0, -signal.SIGKILL)
    last = Tried(source, at)
    assert last.spared_bytes > 0
    assert last.written == whole.written
    assert (at / "p.bin").read_bytes() == (tmp_path / "whole" / "p.bin").read_bytes()


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- the directories ---


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (None, False),
        (InvalidCheckpoint("bad"), False),
        (OutOfSpace("full"), False),
        (OutOfSpace("the budget is short", short_bytes=7), True),
        (KeyboardInterrupt(), True),
    ],
)
def test_what_another_try_could_use_stays(tmp_path: Path, error: BaseException | None, stays: bool) -> None:
    with contextlib.suppress(InvalidCheckpoint, OutOfSpace, KeyboardInterrupt), kept_directory(tmp_path, "ingest", "k") as path:
        (path / "file").write_bytes(b"x")
        if error is not None:
            raise error
    assert path.exists() == stays
    with kept_directory(tmp_path, "ingest", "k") as again:
        assert again == path
        assert [file.name for file in again.iterdir()] == ["file"] * stays
        with kept_directory(tmp_path, "ingest", "k") as other:
            assert other != again
            assert sweep(tmp_path) == []
        assert not other.exists()


def test_a_sweep_leaves_what_is_fresh_and_what_is_just_being_removed(tmp_path: Path) -> None:
    for name in ("ingest+fresh", "ingest+old", "ingest-dead", "trash-now"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    for path in (tmp_path / "ingest+old" / "file", tmp_path / "ingest+old"):
        os.utime(path, (1, 1))
    with temporary_directory(tmp_path, "ingest") as held:
        assert sweep(tmp_path, 60) == ["ingest+old", "ingest-dead"]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["ingest+fresh", "trash-now", held.name])
        assert sweep(tmp_path, kept_alone=True) == ["ingest+fresh"]


def test_two_claims_never_find_the_same_room_free(tmp_path: Path) -> None:
    fitted = []

    def ingest(number: int) -> None:
        path = tmp_path / "tmp" / f"ingest-{number}"
        path.mkdir(parents=True)
        with contextlib.suppress(OutOfSpace), claim_room(300_000, tmp_path, 131072, "it", but=path):
            time.sleep(0.02)  # the longer it takes to reserve, the more would come between
            (path / "file").write_bytes(b"x" * 131072)
            fitted.append(number)

    threads = [threading.Thread(target=ingest, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fitted) == 2
    assert used_bytes(tmp_path) <= 300_000


def test_what_was_broken_off_goes_before_anything_is_refused(tmp_path: Path) -> None:
    def left() -> Iterator[Path]:
        for number in range(2):
            path = tmp_path / "tmp" / f"ingest+{number}" / "file"
            path.parent.mkdir(parents=True)
            path.write_bytes(b"x" * 131072)
            yield path

    first, mine = left()
    with claim_room(300_000, tmp_path, 131072, "it", but=mine.parent):
        assert first.exists(), "it fits beside it"
    held = os.open(mine.parent, os.O_RDONLY)
    try:
        with kept_directory(tmp_path / "tmp", "ingest", "1") as own, claim_room(200_000, tmp_path, 131072, "it", but=own):
            assert not first.exists()
            assert mine.exists()
    finally:
        os.close(held)
