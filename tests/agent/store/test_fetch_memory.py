"""Fetches into the arena as the bytes come: who hears where they lie, who uses them, and what the disk's end means for them."""

from __future__ import annotations

import contextlib
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from agent.store.layers import Layers
from agent.store.remote.partial import Partial
from schema.checkpoint import decode_manifest
from schema.errors import Conflict, SllmError
from schema.link import Arriving, Fetching
from tests.agent.store.fetching import SETTINGS, FetchBench, assert_there, changed, rewrite
from tests.agent.store.images import CHUNK, read_image
from tests.remotes import NO_LIMIT, WebServer, web_server


def refuse(handler: Any, path: str, _: int) -> bool:
    handler.answer(403, b"no")
    return True


def test_into_memory_on_the_way(tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer) -> None:
    digest, _, image = source
    with contextlib.closing(FetchBench(tmp_path / "data", chunks=32)) as bench:
        assert bench.get(digest, web.url, in_memory=True) is None
        assert_there(bench, digest, image)
        (resident,) = bench.store.residents()
        assert read_image(bench.arena.descriptor, resident) == image
        assert resident.users == 1
        bench.store.fill("later", digest, bench.data / "checkpoints" / digest / "exec1")
        assert bench.told.resident["later"].read_bytes == 0
        assert bench.progress[-1][1] <= len(image) == bench.progress[-1][2]


def test_without_room_in_memory_it_still_comes_to_the_disk(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, _, image = source
    with contextlib.closing(FetchBench(tmp_path / "data", chunks=8)) as bench:
        web.pause_s = 0.005
        assert bench.get(digest, web.url, in_memory=True) is None  # 12 chunks do not fit 8
        assert_there(bench, digest, image)
        assert bench.store.residents() == ()
        assert [message.in_memory for message in bench.coming_to] == [False]


@pytest.mark.parametrize("fails", [False, True])
def test_memory_is_usable_before_the_disk_has_it_and_goes_if_that_never_does(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    digest, _, image = source
    go, real = threading.Event(), Partial.commit

    def commit_late(partial: Partial) -> None:
        assert go.wait(100)
        if fails:
            raise SllmError("the disk has gone")
        real(partial)

    monkeypatch.setattr(Partial, "commit", commit_late)
    with contextlib.closing(FetchBench(tmp_path / "data", chunks=32)) as bench:
        bench.fetches.begin("op", digest, web.url, in_memory=True, users=1)
        bench.until(lambda: bench.store.has_sound(digest))
        assert bench.answers == {}
        assert "" not in bench.told.resident, "it is announced when a worker can be built over it"
        (resident,) = bench.store.residents()
        with pytest.raises(Conflict, match="fetched"):
            bench.store.drop(digest, resident.image_id)  # of an agent that has not heard of its copy
        assert read_image(bench.arena.descriptor, resident) == image
        go.set()
        bench.until(lambda: "op" in bench.answers)
        if not fails:
            assert bench.answers == {"op": None}
            assert bench.told.resident[""].digest == digest
            assert_there(bench, digest, image)
            return
        fault = bench.answers["op"]
        assert fault is not None
        assert fault.message == "the disk has gone"
        assert not bench.store.has_sound(digest)
        assert bench.told.bad == [], "its bytes are right: whoever waited is told why it ends, and nobody else has it"
        bench.store.hold(digest, 0)  # as who waited for it fails
        assert bench.store.arena.used_bytes == 0
        assert bench.told.gone == [digest]
        monkeypatch.setattr(Partial, "commit", real)
        before = web.sent_bytes
        assert bench.get(digest, web.url, in_memory=True) is None
        assert web.sent_bytes - before < CHUNK, "what came to the disk is believed by its checksums"
        assert_there(bench, digest, image)


@pytest.mark.parametrize("fails", [False, True])
def test_a_start_that_finds_its_image_gone_waits_for_what_becomes_of_the_copy(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    digest, _, image = source
    go, real = threading.Event(), Partial.commit

    def commit_late(partial: Partial) -> None:
        assert go.wait(100)
        if fails:
            raise SllmError("the disk has gone")
        real(partial)

    monkeypatch.setattr(Partial, "commit", commit_late)
    with contextlib.closing(FetchBench(tmp_path / "data", chunks=32)) as bench:
        bench.fetches.begin("op", digest, web.url, in_memory=True, users=0)
        bench.until(lambda: bench.store.has_sound(digest))
        bench.store.drop(digest)
        bench.store.fill("start", digest, bench.data / "checkpoints" / digest / "exec1")
        assert (bench.told.resident, bench.told.faults) == ({}, {})
        go.set()
        bench.until(lambda: "start" in bench.told.resident.keys() | bench.told.faults.keys())
        if fails:
            assert bench.told.faults["start"].code == "internal"
            assert "the disk has gone" in bench.told.faults["start"].message
        else:
            assert read_image(bench.arena.descriptor, bench.told.resident["start"]) == image


def test_a_start_that_joins_a_fetch_just_when_it_breaks_hears_why(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, _, _ = source
    go, real = threading.Event(), Partial.close

    def close_late(partial: Partial, **how: bool) -> None:
        assert go.wait(100)
        real(partial, **how)

    monkeypatch.setattr(Partial, "close", close_late)
    web.fault = lambda handler, path, count: path.endswith(".bin") and refuse(handler, path, count)
    with contextlib.closing(FetchBench(tmp_path / "data", chunks=32)) as bench:
        bench.fetches.begin("op", digest, web.url, in_memory=True, users=1)
        bench.until(lambda: bench.coming_to)
        bench.until(lambda: not bench.store.fills(digest))
        bench.store.fill("start", digest, bench.data / "checkpoints" / digest / "exec1")
        go.set()
        bench.until(lambda: "op" in bench.answers and "start" in bench.told.faults)
        fault = bench.answers["op"]
        assert fault is not None
        assert bench.told.faults["start"].code == "internal", "not that the checkpoint is wrong"
        assert fault.message in bench.told.faults["start"].message


def test_what_an_earlier_fetch_left_says_nothing_of_how_soon_the_rest_comes(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, directory, image = source
    rewrite(directory, layer_ends=tuple(range(CHUNK, len(image), CHUNK)))
    held, go = threading.Event(), threading.Event()

    def the_end(handler: Any, path: str) -> bool:
        return path.endswith("partition_1.bin") and not handler.headers["Range"].startswith("bytes=0-")

    def hold(handler: Any, path: str, _: int) -> bool:
        if the_end(handler, path):
            held.set()
            assert go.wait(100)
        return False

    with contextlib.closing(FetchBench(tmp_path / "data", changed(SETTINGS, streams=1), chunks=32)) as bench:
        web.fault = lambda handler, path, count: the_end(handler, path) and refuse(handler, path, count)
        assert bench.get(digest, web.url, in_memory=True) is not None
        web.fault = hold
        bench.coming_to.clear()
        bench.fetches.begin("op", digest, web.url, in_memory=True, users=1)
        bench.until(lambda: bench.coming_to)
        bench.store.fill("start", digest, bench.data / "checkpoints" / digest / "exec1")
        assert held.wait(100)
        bench.store.pump()
        assert bench.told.coming == [], "nobody knows how fast the remote is"
        go.set()
        bench.until(lambda: "op" in bench.answers and "start" in bench.told.resident)
        assert read_image(bench.arena.descriptor, bench.told.resident["start"]) == image


def test_who_uses_a_fetched_image_is_whoever_was_told_of_last(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, _, _ = source
    with contextlib.closing(FetchBench(tmp_path / "data", chunks=32)) as bench:
        web.pause_s = 0.005
        for told_early in (True, False):
            bench.fetches.begin(f"{told_early}", digest, web.url, in_memory=True, users=1)
            if not told_early:
                bench.until(lambda: bench.fetches.ops() and bench.store.arena.used_bytes)
            bench.store.hold(digest, 0)
            bench.until(lambda told_early=told_early: f"{told_early}" in bench.answers)
            (resident,) = bench.store.residents()
            assert resident.users == 0
            assert bench.told.resident.pop("").digest == digest, "it is announced, though nobody asked a fill for it"
            bench.store.drop(digest)
            shutil.rmtree(bench.data / "checkpoints")


def test_a_start_joins_while_the_last_parts_are_under_way(
    tmp_path: Path, source: tuple[str, Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.store.cache._SOON_S", 1e9)  # however slow the machine
    digest, directory, image = source
    rewrite(directory, layer_ends=tuple(range(CHUNK, len(image), CHUNK)))
    held, go = threading.Event(), threading.Event()

    def hold_the_end(handler: Any, path: str, count: int) -> bool:
        if path.endswith("partition_1.bin") and not handler.headers["Range"].startswith("bytes=0-"):
            held.set()
            assert go.wait(100)
        return False

    settings = changed(SETTINGS, streams=1)
    with (
        web_server(tmp_path / "remote") as web,
        contextlib.closing(FetchBench(tmp_path / "data", settings, chunks=32)) as bench,
    ):
        web.fault = hold_the_end
        bench.fetches.begin("op", digest, web.url, in_memory=True, users=1)
        bench.until(lambda: bench.coming_to)
        (coming,) = bench.coming_to
        image_id = decode_manifest((directory / "manifest.json").read_bytes()).image_id
        assert coming == Fetching(
            op="op",
            digest=digest,
            image_id=image_id,
            layout="exec1",
            directory=coming.directory,
            in_memory=True,
            image_bytes=len(image),
        )
        there = bench.data / coming.directory
        assert decode_manifest((there / "manifest.json").read_bytes()).digest == digest
        assert (there / "tokenizer.json").read_bytes() == b"{}" * 1000
        bench.store.fill("start", digest, bench.data / "checkpoints" / digest / "exec1")
        bench.until(lambda: bench.told.coming and bench.told.coming[-1].layers >= 7)
        assert held.wait(100)
        offer = bench.told.coming[0]
        assert isinstance(offer, Arriving)
        assert (offer.op, offer.digest, offer.image_bytes) == ("start", digest, len(image))
        layers = Layers(decode_manifest((there / "manifest.json").read_bytes()))
        assert bench.told.coming[-1].layers < len(layers)
        assert "start" not in bench.told.resident
        bench.fetches.begin("op", digest, web.url, in_memory=True, users=1)  # as the agent's next life does
        bench.fetches.pump()
        assert bench.coming_to == [coming, coming]
        go.set()
        bench.until(lambda: "op" in bench.answers and "start" in bench.told.resident)
        assert bench.told.resident["start"].read_bytes == len(image)
        assert read_image(bench.arena.descriptor, bench.told.resident["start"]) == image
        assert_there(bench, digest, image)


def test_a_start_that_joined_a_fetch_hears_why_it_broke(
    tmp_path: Path, source: tuple[str, Path, bytes], web: WebServer
) -> None:
    digest, _, image = source
    with contextlib.closing(FetchBench(tmp_path / "data", chunks=32)) as bench:
        web.limit_bytes = len(image) // 2
        bench.fetches.begin("op", digest, web.url, in_memory=True, users=1)
        bench.until(lambda: bench.coming_to)
        bench.store.fill("start", digest, bench.data / "checkpoints" / digest / "exec1")
        web.fault = refuse
        web.limit_bytes = NO_LIMIT
        bench.until(lambda: "op" in bench.answers)
        assert bench.answers["op"] is not None
        assert bench.told.faults["start"] == bench.answers["op"]
        bench.store.hold(digest, 0)
        assert bench.store.arena.used_bytes == 0
