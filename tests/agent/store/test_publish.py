"""Publishing a layout: what is right on the remote stays, what is not is written anew, and only right bytes leave."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from agent.native.cold import cached_fraction
from agent.store import catalog
from agent.store.remote.api import STEADY_BYTES, Body, Interrupted, Remote
from agent.store.remote.open import open_remote
from agent.store.remote.publish import publish
from schema.errors import Conflict, InvalidCheckpoint, SllmError
from schema.remote import RemoteSettings
from tests.agent.store.fetching import PART, SETTINGS, FetchBench, assert_there, changed, image_of, make_source, rewrite, spoil
from tests.agent.store.images import CHUNK, read_image
from tests.mappings import make_cold
from tests.remotes import S3_ENVIRONMENT, s3_server


@pytest.fixture
def source(tmp_path: Path) -> tuple[str, Path, bytes]:
    return make_source(tmp_path / "source")


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Remote]:
    (tmp_path / "share").mkdir()
    remote = open_remote(f"file://{tmp_path}/share", SETTINGS)
    yield remote
    remote.close()


def put(directory: Path, remote: Remote, settings: RemoteSettings = SETTINGS) -> tuple[tuple[str, ...], list[str]]:
    """Publish: what was mended, and the names of the files that were written."""
    written: list[str] = []
    write = remote.write

    def watched(path: str, *rest: object) -> None:
        written.append(path.rpartition("/")[2])
        write(path, *rest)  # type: ignore[arg-type]

    remote.write = watched  # type: ignore[method-assign]
    steps: list[tuple[int, int]] = []
    try:
        mended = publish(catalog.read_entry(directory), remote, settings, lambda done, total: steps.append((done, total)))
    finally:
        remote.write = write  # type: ignore[method-assign]
    assert steps[-1] == (len(image_of(directory)),) * 2
    return mended, written


ALL = [PART, "partition_1.bin", "tokenizer.json", "manifest.json"]


@pytest.mark.parametrize("kind", ["directory", pytest.param("s3", marks=pytest.mark.slow)])
def test_what_is_published_is_compared_mended_and_fetched(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, source: tuple[str, Path, bytes]
) -> None:
    digest, directory, image = source
    settings = SETTINGS
    if kind == "s3":
        import boto3

        for name, value in S3_ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("agent.store.remote.s3._PART_BYTES", 5 << 20)
    with s3_server(tmp_path / "log") if kind == "s3" else nullcontext("") as endpoint:
        if kind == "s3":
            settings = changed(SETTINGS, s3_endpoint=endpoint)
            client = boto3.client("s3", endpoint_url=endpoint)
            client.create_bucket(Bucket="models")
            url = "s3://models/some/where"
        else:
            (tmp_path / "share").mkdir()
            url = f"file://{tmp_path}/share"
        remote = open_remote(url, settings)
        assert put(directory, remote, settings) == ((), ALL)
        assert put(directory, remote, settings) == ((), []), "it is there already"
        # One byte is wrong there, and no size.
        wrong = bytearray((directory / PART).read_bytes())
        wrong[3 * CHUNK + 5] ^= 1
        if kind == "s3":
            client.put_object(Bucket="models", Key=f"some/where/{digest}/exec1/{PART}", Body=bytes(wrong))
            client.close()
        else:
            (tmp_path / "share" / digest / "exec1" / PART).write_bytes(wrong)
        assert put(directory, remote, settings) == ((PART,), [PART])
        remote.close()
        bench = FetchBench(tmp_path / "data", settings, 32)
        assert bench.get(digest, url, in_memory=True) is None
        assert_there(bench, digest, image)
        assert read_image(bench.arena.descriptor, bench.store.residents()[0]) == image
        bench.close()


def test_whatever_is_wrong_there_is_written_anew_and_told(
    tmp_path: Path, source: tuple[str, Path, bytes], share: Remote
) -> None:
    digest, directory, image = source
    put(directory, share)
    there = tmp_path / "share" / digest / "exec1"
    (there / "tokenizer.json").write_bytes(b"[]" * 1000)
    (there / "manifest.json").write_bytes((there / "manifest.json").read_bytes()[:-9])
    (there / "partition_1.bin").write_bytes(b"short")
    mended, written = put(directory, share)
    assert written == ["partition_1.bin", "tokenizer.json", "manifest.json"]
    assert sorted(mended) == sorted(written)
    assert image_of(there) == image
    assert put(directory, share) == ((), [])


def test_a_publish_that_broke_off_goes_on_with_what_is_right_there(
    tmp_path: Path, source: tuple[str, Path, bytes], share: Remote
) -> None:
    digest, directory, image = source
    there = tmp_path / "share" / digest / "exec1"
    there.mkdir(parents=True)
    (there / PART).write_bytes((directory / PART).read_bytes())
    assert put(directory, share) == ((), ALL[1:])
    assert image_of(there) == image


def test_comparing_outlasts_what_breaks_now_and_then(
    source: tuple[str, Path, bytes], share: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory, _ = source
    put(directory, share)
    real, lock, tries = share.open, threading.Lock(), Counter[tuple[str, int]]()

    def trouble(path: str, start: int, *rest: Any, **named: Any) -> Any:
        """Each part breaks off as often as it may and is right at its last attempt, whoever else reads meanwhile."""
        with lock:
            tries[path, start] += 1
            if tries[path, start] < SETTINGS.attempts:
                raise Interrupted("the share is away")
        return real(path, start, *rest, **named)

    monkeypatch.setattr(share, "open", trouble)
    assert put(directory, share) == ((), [])
    assert set(tries.values()) == {SETTINGS.attempts}


def test_what_lies_there_is_compared_however_often_its_reading_breaks(
    source: tuple[str, Path, bytes], share: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory, image = source
    put(directory, share)
    real, starts = share.open, []

    class Short(Body):
        def __init__(self, body: Body) -> None:
            self._body, self._left = body, STEADY_BYTES

        def some(self, view: memoryview) -> int:
            if not self._left:
                raise Interrupted("the share is away")
            count = self._body.some(view[: self._left])
            self._left -= count
            return count

    @contextmanager
    def short(path: str, start: int, *rest: Any, **named: Any) -> Iterator[Body]:
        starts.append((path, start))
        with real(path, start, *rest, **named) as body:
            yield Short(body) if path.endswith(".bin") else body

    monkeypatch.setattr(share, "open", short)
    assert put(directory, share) == ((), [])
    weights = [each for each in starts if each[0].endswith(".bin")]
    assert len(weights) == len({*weights}) >= len(image) // STEADY_BYTES


def test_a_copy_is_read_past_the_page_cache(source: tuple[str, Path, bytes], share: Remote) -> None:
    _, directory, _ = source
    make_cold(directory / PART)
    publish(catalog.read_entry(directory), share, SETTINGS, lambda done, total: None)
    assert cached_fraction(directory / PART) < 0.1


def test_an_error_of_the_disk_here_is_not_taken_for_one_of_the_remote(
    source: tuple[str, Path, bytes], share: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory, _ = source
    catalog.mark_verified(directory)

    def fails(descriptor: int, *_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(SllmError, match=rf"^cannot read {directory}/{PART} at byte 0: Input/output error$"):
        publish(catalog.read_entry(directory), share, SETTINGS, lambda done, total: None)
    assert not catalog.is_verified(directory), "the next load looks at every byte"


def test_a_copy_that_was_replaced_while_it_was_published_is_not_judged(
    tmp_path: Path, source: tuple[str, Path, bytes], share: Remote
) -> None:
    _, directory, _ = source
    entry = catalog.read_entry(directory)
    _, new, _ = make_source(tmp_path / "new")
    spoil(new, 0)  # whatever it has, it is not what is being published
    directory.rename(tmp_path / "old")
    new.rename(directory)
    with pytest.raises(InvalidCheckpoint, match=r"the chunk at offset 0 .*\); ingest the model again"):
        publish(entry, share, SETTINGS, lambda done, total: None)
    assert catalog.quarantine_reason(directory) is None


def test_a_manifest_is_written_last_and_only_what_is_right_leaves(
    tmp_path: Path, source: tuple[str, Path, bytes], share: Remote
) -> None:
    digest, directory, _ = source
    entry = catalog.read_entry(directory)
    spoil(directory, 4 * CHUNK, "partition_1.bin")
    with pytest.raises(InvalidCheckpoint, match=f"the chunk at offset {4 * CHUNK} is not what was ingested.*fetch"):
        publish(entry, share, SETTINGS, lambda done, total: None)
    target = tmp_path / "share" / digest / "exec1"
    assert sorted(path.name for path in target.iterdir()) == [PART]
    # Nothing is to start from that copy either, until it is right again.
    assert f"offset {4 * CHUNK}" in (catalog.quarantine_reason(directory) or "")
    with pytest.raises(InvalidCheckpoint, match="in quarantine"):
        publish(catalog.read_entry(directory), share, SETTINGS, lambda done, total: None)
    spoil(directory, 4 * CHUNK, "partition_1.bin")
    catalog.release(directory)
    seen: list[bool] = []
    publish(entry, share, SETTINGS, lambda done, total: seen.append((target / "manifest.json").exists()))
    assert not any(seen)
    assert (target / "manifest.json").read_bytes() == (directory / "manifest.json").read_bytes()
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", PART, "partition_1.bin", "tokenizer.json"]
    rewrite(directory, architecture="Other")
    with pytest.raises(Conflict, match=f"another manifest.*fetch {digest[:16]} --from .*forget {digest[:16]}"):
        publish(catalog.read_entry(directory), share, SETTINGS, lambda done, total: None)
