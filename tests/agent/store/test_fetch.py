"""Publish and fetch of whole layouts: to the disk, into the arena on the way, and everything that may go wrong between."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.native.arena import Arena
from agent.store import catalog
from agent.store.remote.fetches import Fetches
from agent.store.remote.open import open_remote
from agent.store.remote.publish import publish
from schema.checkpoint import AssetEntry, decode_manifest, encode_manifest
from schema.errors import Conflict, Fault, InvalidCheckpoint
from schema.remote import RemoteSettings
from tests.agent.store.images import CHUNK, Bench, commit, read_image
from tests.remotes import S3_ENVIRONMENT, WebServer, cut, s3_server, web_server

SETTINGS = RemoteSettings(
    streams=3, part_bytes=2 * CHUNK, connect_s=5, read_s=5, part_s=20, attempts=4, longest_delay_s=0.01
)  # fmt: skip
SIZE = 10 * CHUNK + 12_345
PART = "partition_0.bin"


class FetchBench(Bench):
    """A store with fetches into a data directory, driven as the store process drives them."""

    def __init__(self, data: Path, settings: RemoteSettings = SETTINGS, chunks: int = 16, disk_bytes: int = 0) -> None:
        super().__init__(Arena.create(chunks * CHUNK, CHUNK))
        self.data = data
        self.answers: dict[str, Fault | None] = {}
        self.progress: list[tuple[str, int, int]] = []
        checkpoints = data / "checkpoints"
        self.fetches = Fetches(
            data, checkpoints, settings, self.store, self, lambda: self._write(self._event, 1), disk_bytes=disk_bytes
        )

    def fetching(self, op: str, done_bytes: int, total_bytes: int) -> None:
        self.progress.append((op, done_bytes, total_bytes))

    def fetched(self, op: str, digest: str, layout: str, fault: Fault | None) -> None:
        assert op not in self.answers, f"{op} was answered twice"
        assert fault is not None or layout == "exec1"
        self.answers[op] = fault

    def until(self, what: object, timeout_s: float = 30.0) -> None:
        """Pump until ``what()`` holds."""
        deadline = time.monotonic() + timeout_s
        while not what():  # type: ignore[operator]
            assert select.select([self._event], [], [], deadline - time.monotonic())[0], f"{self.answers}"
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


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[FetchBench]:
    bench = FetchBench(tmp_path / "data")
    yield bench
    bench.close()
    assert not [name for name in open_files() if name.startswith(str(bench.data))], "descriptors have leaked"


def open_files() -> Iterator[str]:
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            yield str(path.readlink())


@pytest.fixture
def source(tmp_path: Path) -> tuple[str, Path, bytes]:
    """A checkpoint with an asset, as it lies on a remote whose root is ``<tmp>/remote``."""
    digest, directory, image = commit(tmp_path / "remote", 7, SIZE, partitions=2)
    text = b"{}" * 1000
    (directory / "tokenizer.json").write_bytes(text)
    rewrite(directory, assets=(AssetEntry("tokenizer.json", len(text), hashlib.sha256(text).hexdigest()),))
    return digest, directory, image


@pytest.fixture
def web(tmp_path: Path, source: tuple[str, Path, bytes]) -> Iterator[WebServer]:
    with web_server(tmp_path / "remote") as server:
        yield server


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


def test_to_the_disk_alone(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, _, image = source
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)
    assert bench.store.residents() == ()
    fetched = [(path, sent) for path, sent in web.ranges if path.endswith(".bin")]
    assert len(fetched) == 12  # of 2 x 11 chunks, two at a time
    # One more asked for the newest layout, which is not there, and was closed.
    assert web.connections <= SETTINGS.streams + 1


def test_into_memory_on_the_way(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, _, image = source
    bench.close()
    bench.__init__(bench.data, chunks=32)  # type: ignore[misc]
    assert bench.get(digest, web.url, in_memory=True) is None
    assert_there(bench, digest, image)
    (resident,) = bench.store.residents()
    assert read_image(bench.arena.descriptor, resident) == image
    assert resident.users == 1
    bench.store.fill("later", digest, bench.data / "checkpoints" / digest / "exec1")
    assert bench.told.resident["later"].read_bytes == 0
    assert bench.progress[-1][1] <= len(image) == bench.progress[-1][2]


def test_without_room_in_memory_it_still_comes_to_the_disk(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, _, image = source
    assert bench.get(digest, web.url, in_memory=True) is None  # 22 chunks do not fit 16
    assert_there(bench, digest, image)
    assert bench.store.residents() == ()


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
    web.pause_s = 0.005
    for op in ("one", "two", "one"):
        bench.fetches.begin(op, digest, web.url)
    assert bench.fetches.ops() == ("one", "two")
    bench.until(lambda: bench.progress)
    bench.fetches.begin("three", digest, web.url)
    bench.fetches.cancel("two")
    bench.until(lambda: {"one", "three"} <= bench.answers.keys())
    assert bench.answers == {"one": None, "three": None}
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


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_server_that_stays_away_leaves_what_came_for_the_next_try(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer, in_memory: bool
) -> None:
    digest, _, image = source
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
    assert bench.leftovers == [f"partial/{digest}-exec1"]
    assert bench.store.arena.used_bytes == 0
    web.fault = None
    before = web.sent_bytes
    assert bench.get(digest, web.url, in_memory=in_memory) is None
    assert_there(bench, digest, image)
    assert web.sent_bytes - before < len(image) * 0.7
    if in_memory:
        assert read_image(bench.arena.descriptor, bench.store.residents()[0]) == image
    bench.close()


def test_a_part_that_is_wrong_once_is_fetched_again(bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, directory, image = source
    spoil(directory, 5 * CHUNK + 99)
    lock = threading.Lock()

    def mend(handler: object, path: str, count: int) -> bool:
        start = handler.headers.get("Range", "")  # type: ignore[attr-defined]
        with lock:
            if path.endswith(PART) and start.startswith(f"bytes={5 * CHUNK}-"):
                spoil(directory, 5 * CHUNK + 99)  # that was its second try, from the wrong chunk on
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
    spoil(directory, 5 * CHUNK + 99)
    fault = bench.get(digest, web.url, in_memory=in_memory)
    assert fault is not None
    assert fault.code == "invalid_checkpoint"
    assert (
        f"{web.url}/{digest}/exec1/{PART}: the {CHUNK} bytes at offset {5 * CHUNK} are not what was published" in fault.message
    )
    assert bench.leftovers == []
    assert not catalog.scan(tmp_path / "data" / "checkpoints")
    assert bench.store.arena.used_bytes == 0
    bench.close()


def test_what_an_earlier_fetch_left_is_believed_only_after_its_checksum(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, directory, image = source
    partial = bench.data / "partial" / f"{digest}-exec1"
    partial.mkdir(parents=True)
    for file in ("manifest.json", "partition_0.bin", "partition_1.bin"):
        (partial / file).write_bytes((directory / file).read_bytes())
    spoil(partial, 3 * CHUNK)
    spoil(partial, 0, "partition_1.bin")
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)
    assert sorted(sent for path, sent in web.ranges if path.endswith(".bin")) == [
        f"bytes=0-{CHUNK - 1}", f"bytes={3 * CHUNK}-{4 * CHUNK - 1}"
    ]  # fmt: skip


def test_a_partial_of_another_manifest_is_begun_anew(
    bench: FetchBench, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, _, image = source
    partial = bench.data / "partial" / f"{digest}-exec1"
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_bytes(b"{}")
    (partial / "other").write_bytes(b"x")
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)
    assert not (bench.data / "checkpoints" / digest / "exec1" / "other").exists()


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
    digest, _, image = source
    web.pause_s = 0.01
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
    web.pause_s = 0.0
    before = web.sent_bytes
    assert bench.get(digest, web.url) is None
    assert_there(bench, digest, image)
    assert web.sent_bytes - before <= len(image) - done + (4 << 20)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_cancel_in_the_middle_leaves_nothing(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer, in_memory: bool
) -> None:
    digest, _, _ = source
    bench = FetchBench(tmp_path / "data", chunks=32)
    web.pause_s = 0.05
    bench.fetches.begin("op", digest, web.url, in_memory=in_memory)
    bench.until(lambda: bench.progress)
    begun = time.monotonic()
    bench.fetches.cancel("op")
    assert bench.fetches.ops() == ()
    bench.until(lambda: bench.leftovers == [] and bench.store.arena.used_bytes == 0)
    assert time.monotonic() - begun < 5
    assert bench.answers == {}
    bench.close()


def test_a_store_that_ends_keeps_what_came(tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, _, image = source
    bench = FetchBench(tmp_path / "data", chunks=32)
    web.pause_s = 0.05
    bench.fetches.begin("op", digest, web.url, in_memory=True)
    bench.until(lambda: bench.progress and bench.progress[-1][1] > 0)
    bench.close()
    web.pause_s = 0.0
    assert bench.leftovers == [f"partial/{digest}-exec1"]
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
    begun = time.monotonic()
    fault = bench.get(digest, web.url)
    assert time.monotonic() - begun < 10
    assert fault is not None
    assert fault.code == "unreachable"
    assert "in time" in fault.message
    bench.close()


def changed(settings: RemoteSettings, **changes: object) -> RemoteSettings:
    return msgspec.structs.replace(settings, **changes)


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
    old, new = (bench.data / "partial" / name for name in ("old", "new"))
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "file").write_bytes(b"x")
    os.utime(old / "file", (1, 1))
    assert bench.get(source[0], web.url) is None
    assert bench.leftovers == ["partial/new"]


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_what_is_published_is_fetched(
    bench: FetchBench, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, source: tuple[str, Path, bytes]
) -> None:
    digest, directory, image = source
    entry = catalog.read_entry(directory)
    settings, steps = SETTINGS, []
    if kind == "s3":
        import boto3

        for name, value in S3_ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("agent.store.remote.s3._PART_BYTES", 5 << 20)
    with s3_server(tmp_path / "log") as endpoint:
        if kind == "s3":
            settings = changed(SETTINGS, s3_endpoint=endpoint)
            with_bucket = boto3.client("s3", endpoint_url=endpoint)
            with_bucket.create_bucket(Bucket="models")
            with_bucket.close()
            url = "s3://models/some/where"
        else:
            (tmp_path / "share").mkdir()
            url = f"file://{tmp_path}/share"
        remote = open_remote(url, settings)
        publish(entry, remote, settings, lambda done, total: steps.append((done, total)))
        assert steps[-1] == (len(image), len(image))
        count = len(steps)
        publish(entry, remote, settings, lambda done, total: steps.append((done, total)))
        assert len(steps) == count, "it is there already"
        remote.close()
        bench.close()
        bench.__init__(bench.data, settings, 32)  # type: ignore[misc]
        assert bench.get(digest, url, in_memory=True) is None
        assert_there(bench, digest, image)
        assert read_image(bench.arena.descriptor, bench.store.residents()[0]) == image


def test_a_publish_writes_its_manifest_last_and_only_what_is_right(tmp_path: Path, source: tuple[str, Path, bytes]) -> None:
    digest, directory, _ = source
    (tmp_path / "share").mkdir()
    entry = catalog.read_entry(directory)
    remote = open_remote(f"file://{tmp_path}/share", SETTINGS)
    spoil(directory, 4 * CHUNK, "partition_1.bin")
    with pytest.raises(InvalidCheckpoint, match=f"the chunk at offset {4 * CHUNK} is not what was ingested"):
        publish(entry, remote, SETTINGS, lambda done, total: None)
    target = tmp_path / "share" / digest / "exec1"
    assert sorted(path.name for path in target.iterdir()) == [PART]
    spoil(directory, 4 * CHUNK, "partition_1.bin")
    seen: list[bool] = []
    publish(entry, remote, SETTINGS, lambda done, total: seen.append((target / "manifest.json").exists()))
    assert not any(seen)
    assert (target / "manifest.json").read_bytes() == (directory / "manifest.json").read_bytes()
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", PART, "partition_1.bin", "tokenizer.json"]
    rewrite(directory, architecture="Other")
    with pytest.raises(Conflict, match="another manifest"):
        publish(catalog.read_entry(directory), remote, SETTINGS, lambda done, total: None)
    remote.close()


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
