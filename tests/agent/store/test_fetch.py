"""Fetches of whole layouts: to the disk, into the arena on the way, and everything that may go wrong between."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.native.cold import cached_fraction
from agent.store import catalog
from agent.store.ingest.reading import SourceReader
from agent.store.remote.api import STEADY_BYTES
from agent.store.remote.partial import Partial
from agent.store.temporary import hold_kept
from schema.checkpoint import AssetEntry
from tests.agent.store.fetching import (
    PART,
    SETTINGS,
    SIZE,
    FetchBench,
    assert_there,
    changed,
    open_files,
    rewrite,
    spoil,
)
from tests.agent.store.images import CHUNK, commit, read_image
from tests.mappings import make_cold
from tests.remotes import NO_LIMIT, WebServer, cut


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[FetchBench]:
    bench = FetchBench(tmp_path / "data")
    yield bench
    bench.close()
    assert not [name for name in open_files() if name.startswith(str(bench.data))], "descriptors have leaked"


def test_to_the_disk_alone(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, _, image = source
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)
    assert bench.store.residents() == ()
    fetched = [(path, sent) for path, sent in web.ranges if path.endswith(".bin")]
    assert len(fetched) == 6  # of 2 x 6 chunks, two at a time
    # One more asked for the newest layout, which is not there, and was closed.
    assert web.connections <= SETTINGS.streams + 1


def test_chunks_larger_than_a_block(tmp_path: Path) -> None:
    digest, _, image = commit(tmp_path / "remote", 3, 25_000_000, checksum_bytes=9 << 20)
    bench = FetchBench(tmp_path / "data")
    for in_memory in (False, True):
        assert bench.get(digest, f"file://{tmp_path}/remote", in_memory=in_memory) is None
        entry = catalog.scan(tmp_path / "data" / "checkpoints")[digest]
        assert (entry.directory / PART).read_bytes() == image
        if not in_memory:
            catalog.remove(entry)
    assert read_image(bench.arena.descriptor, bench.store.residents()[0]) == image
    bench.close()


def test_two_ops_make_one_fetch(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, _, image = source
    web.limit_bytes = len(image) // 2
    for op in ("one", "two", "one"):
        bench.fetches.begin(op, digest, web.url)
    assert bench.fetches.ops() == ("one", "two")
    bench.until(lambda: bench.progress)
    bench.fetches.begin("three", digest, web.url)
    bench.fetches.begin("other", digest, f"file://{bench.data}/nowhere")
    bench.fetches.cancel("two")
    web.limit_bytes = NO_LIMIT
    bench.until(lambda: {"one", "three", "other"} <= bench.answers.keys())
    assert bench.answers == {"one": None, "three": None, "other": None}
    assert bench.layouts == {"one": "exec1", "three": "exec1", "other": ""}, "nobody has looked at the other remote"
    assert_there(bench, digest, image)
    assert web.sent_bytes < len(image) * 1.01 + 10_000


def test_what_breaks_now_and_then_is_tried_again(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, directory, image = source

    lock = threading.Lock()
    tries: Counter[str] = Counter()

    def trouble(handler: object, path: str, count: int) -> bool:
        with lock:  # what is left of a part ends where all of it did
            part = path + handler.headers.get("Range", "").partition("-")[2]  # type: ignore[attr-defined]
            count = tries[part] = tries[part] + 1
        if count % 3 == 1:
            handler.answer(503, b"")  # type: ignore[attr-defined]
            return True
        if count % 3 == 2 and path.endswith(PART):
            first, last = (int(each) for each in handler.headers["Range"][6:].split("-"))  # type: ignore[attr-defined]
            size = last + 1 - first
            data = (directory / PART).read_bytes()[first : first + size * 2 // 3]
            cut(handler, 206, size, data, (directory / PART).stat().st_size)  # type: ignore[arg-type]
            return True
        return False

    web.fault = trouble
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)


def right_bytes(partial: Path, directory: Path) -> int:
    """How much of what has come is right, in whole chunks."""
    right = 0
    for file in directory.glob("*.bin"):
        there = (partial / file.name).read_bytes() if (partial / file.name).exists() else b""
        data = file.read_bytes()
        chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
        right += sum(len(each) for number, each in enumerate(chunks) if there[number * CHUNK :][: len(each)] == each)
    return right


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_server_that_stays_away_leaves_what_came_for_the_next_try(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer, in_memory: bool
) -> None:
    digest, directory, image = source
    bench = FetchBench(tmp_path / "data", chunks=32)

    def down(handler: object, path: str, count: int) -> bool:
        if web.sent_bytes < len(image) // 2:
            return False
        handler.answer(502, b"")  # type: ignore[attr-defined]
        return True

    web.fault = down
    fault = bench.get(digest, web.url, in_memory=in_memory)
    assert fault is not None
    assert fault.code == "unreachable"
    assert f"{web.url}/{digest}/exec1/partition_" in fault.message
    assert "502 (tried 4 times)" in fault.message
    assert bench.leftovers == [f"partial/{digest}+exec1"]
    assert bench.store.arena.used_bytes == 0
    web.fault = None
    came, before = right_bytes(bench.data / bench.leftovers[0], directory), len(web.ranges)
    assert came
    assert bench.get(digest, web.url, in_memory=in_memory) is None
    assert_there(bench, digest, image)
    assert web.asked_bytes(before) == len(image) - came
    if in_memory:
        assert read_image(bench.arena.descriptor, bench.store.residents()[0]) == image
    bench.close()


def test_a_part_that_is_wrong_once_is_fetched_again(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, directory, image = source
    spoil(directory, 3 * CHUNK + 99)
    lock = threading.Lock()

    def mend(handler: object, path: str, count: int) -> bool:
        start = handler.headers.get("Range", "")  # type: ignore[attr-defined]
        with lock:
            if path.endswith(PART) and start.startswith(f"bytes={3 * CHUNK}-"):
                spoil(directory, 3 * CHUNK + 99)  # that was its second try, from the wrong chunk on
        return False

    web.fault = mend
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_part_that_is_wrong_twice_is_named(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer, in_memory: bool
) -> None:
    digest, directory, _ = source
    bench = FetchBench(tmp_path / "data", chunks=32)
    spoil(directory, 3 * CHUNK + 99)
    fault = bench.get(digest, web.url, in_memory=in_memory)
    assert fault is not None
    assert fault.code == "invalid_checkpoint"
    assert (
        f"{web.url}/{digest}/exec1/{PART}: the {CHUNK} bytes at offset {3 * CHUNK} are not what was published" in fault.message
    )
    assert bench.leftovers == []
    assert not catalog.scan(tmp_path / "data" / "checkpoints")
    assert bench.store.arena.used_bytes == 0
    bench.close()


def leave_all(bench: FetchBench, digest: str, directory: Path) -> Path:
    """What an earlier fetch would have left that had everything but the asset. Returns where."""
    partial = bench.data / "partial" / f"{digest}+exec1"
    partial.mkdir(parents=True)
    for file in ("manifest.json", PART, "partition_1.bin"):
        shutil.copyfile(directory / file, partial / file)
    return partial


def test_what_an_earlier_fetch_left_is_believed_only_after_its_checksum(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, directory, image = source
    partial = leave_all(bench, digest, directory)
    spoil(partial, 3 * CHUNK)
    spoil(partial, 0, "partition_1.bin")
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)
    assert sorted(sent for path, sent in web.ranges if path.endswith(".bin")) == [
        f"bytes=0-{CHUNK - 1}", f"bytes={3 * CHUNK}-{4 * CHUNK - 1}"
    ]  # fmt: skip


def test_what_killed_processes_have_left_goes_with_the_next_fetch(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    for place in ("tmp", "partial"):
        (bench.data / place / "left").mkdir(parents=True)
    assert bench.get(source[0], web.url) is None
    assert bench.leftovers == []


def test_what_an_earlier_fetch_has_left_waits_while_room_is_made(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, directory, image = source
    with contextlib.closing(FetchBench(tmp_path / "data", disk_bytes=len(image) + CHUNK)) as bench:
        _, other, _ = commit(bench.data / "checkpoints", 9, 2 * CHUNK)
        leave_all(bench, digest, directory)
        fault = bench.get(digest, web.url)
        assert fault is not None
        assert (fault.code, fault.short_bytes > 0) == ("out_of_space", True)
        shutil.rmtree(other)
        assert bench.get(digest, web.url) is None
        assert_there(bench, digest, image)
        assert web.asked_bytes() == 0


def test_what_cannot_be_read_back_is_fetched_again(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, directory, image = source
    leave_all(bench, digest, directory)
    real = SourceReader.read_into

    def broken(self: SourceReader, at: int, target: memoryview) -> int:
        if at == 2 * CHUNK:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, at, target)

    monkeypatch.setattr(SourceReader, "read_into", broken)
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)
    assert web.asked_bytes() == 2 * CHUNK  # one chunk of each partition


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_machine_without_memory_for_it_ends_a_fetch(
    bench: FetchBench,
    source: tuple[str, Path, bytes],
    web: WebServer,
    monkeypatch: pytest.MonkeyPatch,
    in_memory: bool,
) -> None:
    real = mmap.mmap

    def fail(descriptor: int, size: int, **named: Any) -> mmap.mmap:
        if threading.current_thread().name == "fetch-1":  # one of several
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(descriptor, size, **named)

    with monkeypatch.context() as broken:
        broken.setattr(mmap, "mmap", fail)
        fault = bench.get(source[0], web.url, in_memory=in_memory)
    assert fault is not None
    assert "Cannot allocate memory" in fault.message
    assert bench.get(source[0], web.url) is None


def test_whatever_fails_when_a_fetch_is_committed_is_its_end(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a mistake")

    with monkeypatch.context() as broken:
        broken.setattr(catalog, "commit", fail)
        fault = bench.get(source[0], web.url)
    assert fault is not None
    assert "ValueError: a mistake" in fault.message
    assert bench.get(source[0], web.url) is None


def test_a_fetch_whose_files_cannot_be_closed_ends(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Partial.close

    def fail(self: Partial, *, keep: bool = True) -> None:
        real(self, keep=keep)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Partial, "close", fail)
    assert bench.get(source[0], web.url) is None, "it was durable before"
    assert_there(bench, source[0], source[2])


def test_a_partial_of_another_manifest_is_begun_anew(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, _, image = source
    partial = bench.data / "partial" / f"{digest}+exec1"
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_bytes(b"{}")
    (partial / "other").write_bytes(b"x")
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)
    assert not (bench.data / "checkpoints" / digest / "exec1" / "other").exists()


def test_what_an_earlier_fetch_has_left_is_read_past_the_page_cache(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, directory, image = source
    for file in leave_all(bench, digest, directory).iterdir():
        make_cold(file)
    assert bench.get(digest, web.url) is None
    assert web.asked_bytes() == 0
    assert cached_fraction(bench.data / "checkpoints" / digest / "exec1" / PART) < 0.1
    assert_there(bench, digest, image)


KILLED = """
import os, sys, time
from pathlib import Path
from agent.store.remote.fetch import Fetch
from agent.store.remote.open import open_remote
from schema.remote import RemoteSettings
url, digest, data = sys.argv[1:]
settings = RemoteSettings(streams=2, part_bytes=4 << 20)
fetch = Fetch(open_remote(url, settings), digest, "", Path(data), Path(data) / "checkpoints", settings)
fetch.prepare()
fetch.submit((), lambda job: os.write(1, b"%d\\n" % job.done_bytes))
time.sleep(60)
"""


def test_a_fetch_goes_on_where_a_killed_one_was(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, directory, image = source
    web.limit_bytes = len(image) * 2 // 3
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, web.url, digest, str(bench.data)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    done = 0
    while done < len(image) // 3:
        done = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    web.limit_bytes = NO_LIMIT
    came, before = right_bytes(bench.data / bench.leftovers[0], directory), len(web.ranges)
    assert came >= done
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)
    assert web.asked_bytes(before) == len(image) - came


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_cancel_in_the_middle_leaves_nothing(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer, in_memory: bool
) -> None:
    digest, _, image = source
    bench = FetchBench(tmp_path / "data", chunks=32)
    web.limit_bytes = len(image) // 2
    bench.fetches.begin("op", digest, web.url, in_memory=in_memory)
    bench.until(lambda: bench.progress)
    bench.fetches.cancel("op")
    assert bench.fetches.ops() == ()
    bench.until(lambda: bench.leftovers == [] and bench.store.arena.used_bytes == 0)
    assert bench.answers == {}
    bench.close()


@pytest.mark.parametrize("keep", [False, True])
def test_a_fetch_that_follows_a_cancelled_one_waits_until_that_has_let_go(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer, keep: bool
) -> None:
    digest, _, image = source
    with contextlib.closing(FetchBench(tmp_path / "data", chunks=32)) as bench:
        web.limit_bytes, web.pause_s = len(image) * 4 // 5, 0.06
        bench.fetches.begin("one", digest, web.url, in_memory=True, users=1)
        bench.until(lambda: bench.progress and bench.progress[-1][1] > len(image) // 3)
        bench.fetches.cancel("one", keep=keep)
        bench.fetches.begin("never", digest, web.url)
        bench.fetches.cancel("never")
        web.limit_bytes, web.pause_s = NO_LIMIT, 0.0
        bench.fetches.begin("two", digest, web.url, in_memory=True, users=1)
        bench.until(lambda: "two" in bench.answers)
        assert bench.answers == {"two": None}
        assert_there(bench, digest, image)
        (resident,) = bench.store.residents()
        assert (resident.users, read_image(bench.arena.descriptor, resident)) == (1, image)
        begun = max(number for number, (path, _) in enumerate(web.ranges) if path.endswith("manifest.json"))
        assert (web.asked_bytes(begun) < len(image)) is keep


def test_a_fetch_that_was_whole_before_its_cancel_is_told_to_nobody_in_particular(
    tmp_path: Path, source: tuple[str, Path, bytes]
) -> None:
    digest, _, image = source
    with contextlib.closing(FetchBench(tmp_path / "data", chunks=32)) as bench:
        bench.fetches.begin("op", digest, f"file://{tmp_path}/remote", in_memory=True)
        deadline = time.monotonic() + 100
        while not (bench.data / "checkpoints" / digest / "exec1").exists():  # the store looks only after that
            assert select.select([bench._event], [], [], max(0.0, deadline - time.monotonic()))[0]
            os.eventfd_read(bench._event)
            if not bench.store.arena.used_bytes:
                bench.fetches.pump()
        bench.fetches.cancel("op")
        bench.until(lambda: bench.answers)
        assert (bench.answers, bench.layouts) == ({"": None}, {"": "exec1"})
        assert_there(bench, digest, image)
        assert bench.told.resident[""].digest == digest


def test_a_store_that_ends_keeps_what_came(tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, _, image = source
    bench = FetchBench(tmp_path / "data", chunks=32)
    web.limit_bytes, web.pause_s = len(image) * 3 // 4, 0.1  # long enough to be told of once more
    bench.fetches.begin("op", digest, web.url, in_memory=True)
    bench.until(lambda: bench.progress and bench.progress[-1][1] > 0)
    bench.close()
    web.limit_bytes, web.pause_s = NO_LIMIT, 0.0
    assert bench.leftovers == [f"partial/{digest}+exec1"]
    again = FetchBench(tmp_path / "data")
    assert again.get(digest, web.url) is None
    assert_there(again, digest, image)
    again.close()


def test_a_server_that_trickles_is_given_up(tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, _, _ = source
    bench = FetchBench(tmp_path / "data", changed(SETTINGS, part_s=0.2, attempts=2))

    def slow(handler: object, path: str, count: int) -> bool:
        if path.endswith(".bin"):
            web.block_bytes, web.pause_s = 1000, 0.02
        return False

    web.fault = slow
    fault = bench.get(digest, web.url)
    assert fault is not None
    assert fault.code == "unreachable"
    assert "in time" in fault.message
    bench.close()


def sends(web: WebServer, count: int, then: Callable[[Any], object]) -> None:
    """Of each range of weights the server sends so many bytes at most, and ``then`` does something else."""
    first = web.root

    def fault(handler: Any, path: str, _: int) -> bool:
        if not path.endswith(".bin"):
            return False
        data = (first / path).read_bytes()
        start, last = map(int, re.findall(r"\d+", handler.headers["Range"]))
        if last + 1 - start <= count:
            return False
        cut(handler, 206, last + 1 - start, data[start : start + count], len(data), then)
        return True

    web.fault = fault


def test_what_has_come_of_a_chunk_is_not_asked_for_again(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, _, image = source
    sends(web, STEADY_BYTES, lambda handler: None)  # a chunk takes more connections than may fail
    assert SETTINGS.attempts * STEADY_BYTES < CHUNK
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)
    starts = [int(sent.removeprefix("bytes=").split("-")[0]) for path, sent in web.ranges if path.endswith(".bin")]
    assert len(starts) >= len(image) // STEADY_BYTES
    assert all(start % STEADY_BYTES == 0 for start in starts)


def test_a_server_that_breaks_off_too_soon_is_given_up(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, _, _ = source
    sends(web, STEADY_BYTES - 1, lambda handler: None)
    fault = bench.get(digest, web.url)
    assert fault is not None
    assert fault.code == "unreachable"
    assert f"(tried {SETTINGS.attempts} times)" in fault.message
    asked = [sent for path, sent in web.ranges if path.endswith(".bin")]
    assert len(asked) <= SETTINGS.streams * SETTINGS.attempts


def test_what_has_come_of_a_chunk_is_progress(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, _, image = source
    held = threading.Event()

    def wait(handler: Any) -> None:
        assert held.wait(100)

    sends(web, CHUNK // 2, wait)
    bench.fetches.begin("op", digest, web.url)
    deadline = time.monotonic() + 100
    while not bench.progress or bench.progress[-1][1] < SETTINGS.streams * CHUNK // 2:
        assert time.monotonic() < deadline, bench.progress
        bench.fetches.pump()
        time.sleep(0.01)
    assert bench.progress[-1][1] == SETTINGS.streams * CHUNK // 2, "no chunk is whole"
    web.fault = None
    held.set()
    bench.until(lambda: "op" in bench.answers)
    assert_there(bench, digest, image)
    assert [total for _, _, total in bench.progress] == [len(image)] * len(bench.progress)


def test_a_slow_link_takes_as_many_connections_as_it_needs(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, _, image = source
    settings = changed(SETTINGS, part_s=0.3, attempts=100)
    sends(web, 2 * CHUNK // 3, lambda handler: handler.rfile.read(1))  # and then nothing, until the node has had enough
    with contextlib.closing(FetchBench(tmp_path / "data", settings)) as bench:
        assert bench.get(digest, web.url) is None
        assert_there(bench, digest, image)


def test_a_server_without_ranges_is_refused(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    web.honour_ranges = False
    fault = bench.get(source[0], web.url)
    assert fault is not None
    assert fault.code == "invalid_input"
    assert "ignores Range requests" in fault.message


def test_a_full_disk(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, _, image = source
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK, limits[1]))
    try:
        fault = bench.get(digest, web.url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fault is not None
    assert fault.code == "out_of_space"
    assert bench.leftovers == []
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)


def test_a_copy_in_quarantine_is_replaced_and_a_sound_one_kept(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, _, image = source
    target = bench.data / "checkpoints" / digest / "exec1"
    assert bench.get(digest, web.url) is None
    inode = target.stat().st_ino
    assert bench.get(digest, web.url) is None
    assert target.stat().st_ino == inode
    catalog.quarantine(target, "a test")
    assert bench.get(digest, web.url) is None
    assert target.stat().st_ino != inode
    assert_there(bench, digest, image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digest": "0" * 64}, "it was moved"),
        ({"layout": "other"}, "it was moved"),
        ({"assets": (AssetEntry("manifest.json", 1, "0" * 64),)}, "file name twice"),
        ({"assets": (AssetEntry("verified", 0, "0" * 64),)}, "file name twice"),
        ({"assets": (AssetEntry(PART, 1, "0" * 64),)}, "file name twice"),
        ({"assets": (AssetEntry("tokenizer.json", 2000, "0" * 64),)}, "not what was published"),
        ({"assets": (AssetEntry("tokenizer.json", 1999, "0" * 64),)}, "bytes"),
        ({"assets": (AssetEntry("tokenizer.json", 1 << 40, "0" * 64),)}, "at most"),
        ({"assets": (AssetEntry("absent.json", 10, "0" * 64),)}, "does not exist"),
        ({"format_version": 99}, "format version"),
    ],
)
def test_manifests_that_lie(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer, changes: dict[str, object], message: str
) -> None:
    digest, directory, _ = source
    rewrite(directory, **changes)
    fault = bench.get(digest, web.url)
    assert fault is not None
    assert message in fault.message
    assert bench.leftovers == []


def test_manifests_that_are_none(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, directory, _ = source
    for content in (b"", b"[" * 100_000, b"\xff\xfe", b'{"format_version": 1}'):
        (directory / "manifest.json").write_bytes(content)
        fault = bench.get(digest, web.url)
        assert fault is not None
        assert fault.code == "invalid_checkpoint"
    (directory / PART).write_bytes(b"short")
    assert bench.leftovers == []


def test_a_partition_of_another_size(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, directory, _ = source
    os.truncate(directory / PART, SIZE // 2)
    fault = bench.get(digest, web.url)
    assert fault is not None
    assert fault.code == "invalid_checkpoint"
    assert "its manifest says" in fault.message or "416" in fault.message
    assert bench.leftovers == []


def test_what_is_nowhere(bench: FetchBench, tmp_path: Path, web: WebServer) -> None:
    (tmp_path / "empty").mkdir()
    for url in (web.url, f"file://{tmp_path}/empty", f"file://{tmp_path}/nowhere", "gopher://host/a"):
        fault = bench.get("f" * 64, url)
        assert fault is not None
        assert fault.code == ("invalid_input" if url.startswith("gopher") else "not_found")


def test_abandoned_partials_go_in_the_end(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    old, new = (bench.data / "partial" / name for name in ("old+l", "new+l"))
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "file").write_bytes(b"x")
    os.utime(old / "file", (1, 1))
    assert bench.get(source[0], web.url) is None
    assert bench.leftovers == ["partial/new+l"]


def test_a_fetch_that_would_pass_the_disks_budget_is_refused_before_it_writes(
    tmp_path: Path, source: tuple[str, Path, bytes]
) -> None:
    digest, _, image = source
    bench = FetchBench(tmp_path / "small", disk_bytes=len(image) + CHUNK)
    commit(tmp_path / "small" / "checkpoints", 3, 2 * CHUNK)
    fault = bench.get(digest, f"file://{tmp_path}/remote")
    assert fault is not None
    assert fault.code == "out_of_space"
    assert CHUNK <= fault.short_bytes < 2 * CHUNK
    assert bench.leftovers == []
    shutil.rmtree(tmp_path / "small" / "checkpoints" / f"{3:064x}")
    assert bench.get(digest, f"file://{tmp_path}/remote") is None
    bench.close()


def test_a_fetch_that_finds_the_disk_full_says_how_much_is_missing(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what was refused has filled the disk, as it does on some file systems."""
    real = shutil.disk_usage
    free = [CHUNK, 0]

    def usage(path: Any) -> Any:
        return real(path)._replace(free=free[0])

    def full(descriptor: int, offset: int, size: int) -> None:
        free.pop(0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(os, "posix_fallocate", full)
    fault = bench.get(source[0], web.url)
    assert fault is not None
    need = -(-len(source[2]) // 4096) * 4096 - 4096  # but for the manifest, which is there
    assert (fault.code, fault.short_bytes) == ("out_of_space", 0)
    assert fault.message == (
        f"No space left on device: checkpoint {source[0][:16]} needs {need} more bytes of disk, and {bench.data} "
        f"has {CHUNK} free: at least {need - CHUNK} are missing; free some of that disk and try again"
    )
    assert bench.leftovers == []


def test_what_broken_off_fetches_have_left_goes_before_another_is_refused(
    tmp_path: Path, source: tuple[str, Path, bytes]
) -> None:
    digest, _, image = source
    bench = FetchBench(tmp_path / "small", disk_bytes=len(image) + CHUNK)
    left = bench.data / "partial" / f"{'e' * 64}+exec1"
    left.mkdir(parents=True)
    (left / "partition_0.bin").write_bytes(bytes(2 * CHUNK))
    held = hold_kept(left)
    assert held is not None
    fault = bench.get(digest, f"file://{tmp_path}/remote")
    assert fault is not None
    assert fault.code == "out_of_space"
    os.close(held)
    assert bench.get(digest, f"file://{tmp_path}/remote") is None
    assert bench.leftovers == []
    bench.close()
