"""Verification: a copy on disk and its image in the arena against the manifest, to the byte; quarantine and its end."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.native.address import address_of
from agent.native.reader import ReadJob, ReadPool, Unit
from agent.store import catalog
from schema.checkpoint import Manifest
from schema.errors import Conflict, SllmError
from tests.agent.store.fetching import make_source, rewrite, spoil
from tests.agent.store.images import CHUNK, Bench, commit, read_image
from tests.mappings import mapping_flags


def flip_image(bench: Bench, chunks: tuple[int, ...], offset: int) -> None:
    (view,) = bench.arena.views(chunks, offset, 1)
    view[0] ^= 0x40


@pytest.mark.parametrize("size_bytes", [1, 4096, CHUNK, 20 * CHUNK + 4096 * 3])
@pytest.mark.parametrize("checksum_bytes", [4096, 12288, CHUNK, 4 * CHUNK, 16 * CHUNK])
def test_a_good_copy_is_found_good_and_marked(bench: Bench, tmp_path: Path, size_bytes: int, checksum_bytes: int) -> None:
    digest, directory, image = commit(tmp_path, 1, size_bytes, partitions=2, checksum_bytes=checksum_bytes)
    assert not catalog.is_verified(directory)
    assert bench.verify(digest, directory) is None
    assert catalog.is_verified(directory)
    done = [step for step in bench.told.steps if step[0].endswith(" verify disk")]
    assert all(total == len(image) for _, _, total in done)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages to ask for")
def test_it_reads_into_huge_pages(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, flags = ReadPool.submit, []

    def submit(self: ReadPool, units: Sequence[Unit], *given: Any, **named: Any) -> ReadJob:
        flags.extend(mapping_flags(address_of(target)) for unit in units for target in unit.targets)
        return real(self, units, *given, **named)

    monkeypatch.setattr(ReadPool, "submit", submit)
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK)
    assert bench.verify(digest, directory) is None
    assert flags
    assert all("hg" in each for each in flags)


def test_any_flipped_byte_is_found_and_its_file_and_chunk_named(bench: Bench, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    sum_bytes = 3 * 4096
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK + 777, partitions=2, checksum_bytes=sum_bytes)
    for _ in range(12):
        partition, offset = draw.randrange(2), draw.randrange(2 * CHUNK)
        path = directory / f"partition_{partition}.bin"
        spoil(directory, offset, path.name)
        fault = bench.verify(digest, directory)
        assert fault is not None
        assert fault.code == "invalid_checkpoint"
        assert str(path) in fault.message
        assert f"at offset {offset // sum_bytes * sum_bytes} " in fault.message
        assert catalog.quarantine_reason(directory) == fault.message
        spoil(directory, offset, path.name)


def test_a_quarantined_copy_that_is_right_again_is_released_and_loads(bench: Bench, tmp_path: Path) -> None:
    digest, directory, image = commit(tmp_path, 1, CHUNK)
    catalog.quarantine(directory, "a checksum failed")
    bench.fill("a", digest, directory)
    assert bench.told.faults["a"].code == "invalid_checkpoint"
    assert bench.verify(digest, directory) is None
    assert catalog.quarantine_reason(directory) is None
    bench.fill("b", digest, directory)
    assert read_image(bench.arena.descriptor, bench.told.resident["b"]) == image


def test_a_bad_copy_on_a_disk_that_takes_no_marks_is_not_loaded_all_the_same(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, directory, image = commit(tmp_path, 1, CHUNK)
    catalog.mark_verified(directory)
    spoil(directory, 5)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("write_text", "touch", "unlink"):
        monkeypatch.setattr(Path, name, fail)
    fault = bench.verify(digest, directory)
    assert fault is not None
    assert "bytes at offset 0" in fault.message
    assert "its quarantine could not be written down" in fault.message
    assert catalog.is_verified(directory), "which nobody may believe now"
    bench.fill("bad", digest, directory)
    assert "bytes at offset 0" in bench.told.faults["bad"].message
    spoil(directory, 5)
    assert bench.verify(digest, directory) is None
    bench.fill("good", digest, directory)
    assert read_image(bench.arena.descriptor, bench.told.resident["good"]) == image


@pytest.mark.parametrize("harm", ["cut", "gone", "longer", "manifest"])
def test_files_that_are_not_what_they_were_are_quarantined(bench: Bench, tmp_path: Path, harm: str) -> None:
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK)
    path = directory / "partition_0.bin"
    match harm:
        case "cut":
            path.write_bytes(path.read_bytes()[:-4096])
        case "gone":
            path.unlink()
        case "longer":
            path.write_bytes(path.read_bytes() + bytes(4096))
        case _:
            (directory / "manifest.json").write_text("{")
    fault = bench.verify(digest, directory)
    assert fault is not None
    assert fault.code == "invalid_checkpoint"
    assert catalog.quarantine_reason(directory) == fault.message


def test_an_asset_is_compared_by_its_sha256(bench: Bench, tmp_path: Path) -> None:
    digest, directory, _ = make_source(tmp_path)
    assert bench.verify(digest, directory) is None
    spoil(directory, 77, "tokenizer.json")
    fault = bench.verify(digest, directory)
    assert fault is not None
    assert "tokenizer.json" in fault.message
    assert "sha256" in fault.message


def test_a_good_image_outlives_a_copy_that_went_bad(bench: Bench, tmp_path: Path) -> None:
    digest, directory, image = commit(tmp_path, 1, 2 * CHUNK)
    bench.fill("a", digest, directory, users=0)
    spoil(directory, 5)
    assert bench.verify(digest, directory) is not None
    bench.store.fill("b", digest, directory)
    assert read_image(bench.arena.descriptor, bench.told.resident["b"]) == image
    assert bench.told.gone == []


def test_a_bad_image_without_users_is_dropped_and_read_again(bench: Bench, tmp_path: Path) -> None:
    digest, directory, image = commit(tmp_path, 1, 2 * CHUNK, partitions=2)
    bench.fill("a", digest, directory, users=0)
    flip_image(bench, bench.store._residency._residents[digest].chunks, 3 * CHUNK + 9)
    fault = bench.verify(digest, directory)
    assert fault is not None
    assert "partition_1.bin in memory" in fault.message
    assert f"offset {CHUNK} " in fault.message
    assert bench.told.gone == [digest]
    assert catalog.quarantine_reason(directory) is None
    bench.fill("b", digest, directory)
    assert read_image(bench.arena.descriptor, bench.told.resident["b"]) == image


def test_a_bad_copy_and_its_bad_image_are_both_named(bench: Bench, tmp_path: Path) -> None:
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK)
    bench.fill("a", digest, directory, users=0)
    flip_image(bench, bench.store._residency._residents[digest].chunks, 9)
    spoil(directory, CHUNK)
    fault = bench.verify(digest, directory)
    assert fault is not None
    assert fault.code == "invalid_checkpoint"
    of_copy, of_image = fault.message.split("; ")
    assert of_copy == catalog.quarantine_reason(directory)
    assert f"{directory}/partition_0.bin: the {CHUNK} bytes at offset {CHUNK} " in of_copy
    assert f"partition_0.bin in memory: the {CHUNK} bytes at offset 0 " in of_image


def test_a_bad_image_with_users_goes_with_the_last_of_them_and_gets_no_other(bench: Bench, tmp_path: Path) -> None:
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK)
    bench.fill("a", digest, directory, users=1)
    flip_image(bench, bench.store._residency._residents[digest].chunks, 9)
    bench.verify(digest, directory)
    assert [resident.digest for resident in bench.told.bad] == [digest]
    assert bench.told.bad[0].condemned
    assert bench.store.residents()[0].condemned
    bench.store.fill("b", digest, directory, users=2)
    assert bench.told.faults["b"].code == "invalid_checkpoint"
    assert bench.told.gone == []
    bench.store.hold(digest, 0)
    assert bench.told.gone == [digest]
    bench.fill("c", digest, directory)
    assert bench.told.resident["c"].read_bytes


def test_a_bad_image_that_is_looked_at_twice_goes_though_the_second_look_is_cancelled(bench: Bench, tmp_path: Path) -> None:
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK)
    other = commit(tmp_path, 2, CHUNK)
    bench.fill("a", digest, directory, users=0)
    flip_image(bench, bench.store._residency._residents[digest].chunks, 9)
    bench.store.verify("v", digest, directory)
    bench.store.verify("w", digest, directory)
    bench.store.cancel_verify("w")
    bench.store.verify("x", other[0], other[1])
    bench.wait("v", "x")
    assert bench.told.gone == [digest]
    bench.fill("b", digest, directory)
    assert bench.told.resident["b"].read_bytes


def test_a_store_that_is_told_of_a_bad_image_acts_as_the_one_that_found_it(bench: Bench, tmp_path: Path) -> None:
    digest, directory, _ = commit(tmp_path, 1, CHUNK)
    bench.fill("a", digest, directory, users=1)
    bench.store.hold(digest, 1, "the image is wrong")
    bench.store.fill("b", digest, directory)
    assert "the image is wrong" in bench.told.faults["b"].message
    bench.store.hold(digest, 0)
    assert bench.told.gone == [digest]


def test_an_image_that_is_looked_at_is_neither_evicted_nor_dropped(bench: Bench, tmp_path: Path) -> None:
    digest, directory, _ = commit(tmp_path, 1, 6 * CHUNK)
    other = commit(tmp_path, 2, 6 * CHUNK)
    bench.fill("a", digest, directory, users=0)
    bench.store.verify("v", digest, directory)
    with pytest.raises(Conflict, match="verified"):
        bench.store.drop(digest)
    bench.store.fill("b", other[0], other[1])
    assert bench.told.faults["b"].code == "out_of_space"
    bench.wait("v")
    bench.fill("c", other[0], other[1])
    assert bench.told.gone == [digest]


def test_a_cancelled_verification_is_not_answered_and_changes_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun, go = ReadPool.submit, threading.Event(), threading.Event()

    def submit(self: ReadPool, *given: Any, **named: Any) -> ReadJob:
        begun.set()
        assert go.wait(100)
        return real(self, *given, **named)

    monkeypatch.setattr(ReadPool, "submit", submit)
    digest, directory, _ = commit(tmp_path, 1, 40 * CHUNK)
    other = commit(tmp_path, 2, CHUNK)
    bench.store.verify("v", digest, directory)
    bench.store.verify("w", other[0], other[1])
    assert begun.wait(100)
    bench.store.cancel_verify("v")
    go.set()
    bench.wait("w")
    assert bench.told.verdicts == {"w": None}
    assert not catalog.is_verified(directory)
    assert catalog.quarantine_reason(directory) is None


def test_one_that_is_cancelled_while_it_waits_lets_go_of_its_image_at_once(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, go = ReadPool.submit, threading.Event()
    first, second = commit(tmp_path, 1, CHUNK), commit(tmp_path, 2, CHUNK)
    bench.fill("a", second[0], second[1], users=0)

    def submit(self: ReadPool, *given: Any, **named: Any) -> ReadJob:
        assert go.wait(100)
        return real(self, *given, **named)

    with monkeypatch.context() as held:
        held.setattr(ReadPool, "submit", submit)
        bench.store.verify("v", first[0], first[1])
        bench.store.verify("w", second[0], second[1])
        bench.store.cancel_verify("w")
        bench.store.pump()
        bench.store.drop(second[0])
        go.set()
        bench.wait("v")
    assert bench.told.verdicts == {"v": None}


def test_a_failed_read_takes_the_mark_away_so_that_the_next_load_looks_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK)
    catalog.mark_verified(directory)

    def submit(units: Any, changed: Any, **_: Any) -> Any:
        broken = SllmError("cannot read partition_0.bin at byte 4096: Input/output error")
        job = SimpleNamespace(done_bytes=4096, error=broken, corrupt=False, finished=True)
        changed(job)
        return job

    with monkeypatch.context() as patch:
        patch.setattr(bench.store._pool, "submit", submit)
        bench.fill("a", digest, directory)
    assert bench.told.faults["a"].code == "internal"
    assert not catalog.is_verified(directory)
    assert catalog.quarantine_reason(directory) is None
    spoil(directory, 0)
    bench.fill("b", digest, directory)
    assert bench.told.faults["b"].code == "invalid_checkpoint"
    assert catalog.quarantine_reason(directory) is not None


@pytest.mark.parametrize("what", ["verify", "fill"])
def test_what_was_found_of_a_copy_says_nothing_of_another_in_its_place(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    digest, directory, _ = commit(tmp_path, 1, CHUNK)
    _, other, _ = commit(tmp_path / "again", 1, CHUNK)
    spoil(other, 7)

    looks: list[Manifest] = []

    def replace_it(manifest: Manifest) -> None:
        looks.append(manifest)
        if len(looks) == 2:  # all of the copy was read
            directory.rename(tmp_path / "old")
            other.rename(directory)

    monkeypatch.setattr(catalog, "changed_source", replace_it)
    if what == "verify":
        fault = bench.verify(digest, directory)
        assert fault is not None
        assert fault.code == "conflict"
    else:
        bench.fill("f", digest, directory)
        assert bench.told.faults == {}
    assert not catalog.is_verified(directory)
    assert catalog.quarantine_reason(directory) is None


def test_a_copy_that_comes_between_its_manifests_reading_and_its_loading_is_not_judged_by_it(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, directory, _ = commit(tmp_path / "here", 1, CHUNK)
    _, new, _ = commit(tmp_path / "new", 2, CHUNK)
    rewrite(new, digest=digest)
    make_room = bench.store._residency.make_room

    def replace_it(*given: Any) -> bool:
        directory.rename(tmp_path / "old")
        new.rename(directory)
        return make_room(*given)

    monkeypatch.setattr(bench.store._residency, "make_room", replace_it)
    bench.fill("f", digest, directory)
    assert bench.told.faults["f"].code == "invalid_checkpoint", "it was read with the checksums of the other"
    assert catalog.quarantine_reason(directory) is None
    monkeypatch.undo()
    bench.fill("again", digest, directory)
    assert bench.told.faults.keys() == {"f"}


def marks(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} & {"verified", "quarantined"}


@pytest.mark.parametrize(
    ("write", "reason", "before", "after"),
    [
        (catalog.mark_verified, (), set(), {"verified"}),
        (catalog.unmark_verified, (), {"verified"}, set()),
        (catalog.quarantine, ("it is wrong",), {"verified"}, {"quarantined"}),
        (catalog.release, (), {"quarantined"}, {"verified"}),
    ],
)
def test_a_mark_goes_with_the_copy_that_it_is_of(
    tmp_path: Path, write: Callable[..., None], reason: tuple[str, ...], before: set[str], after: set[str]
) -> None:
    (_, directory, _), (_, new, _) = commit(tmp_path / "here", 1, CHUNK), commit(tmp_path / "new", 1, CHUNK)
    for copy in (directory, new):
        for name in before:
            (copy / name).touch()
    looked, old = catalog.identity(directory), tmp_path / "old"

    def replace_then_write(place: Path, *given: str) -> None:
        directory.rename(old)
        new.rename(directory)
        write(place, *given)

    assert catalog.mark(replace_then_write, directory, looked, *reason)
    assert (marks(old), marks(directory)) == (after, before)
    assert not catalog.mark(write, directory, looked, *reason)
    assert (marks(old), marks(directory)) == (after, before)


def test_an_image_is_not_compared_with_another_copy_of_its_digest(bench: Bench, tmp_path: Path) -> None:
    digest, directory, _ = commit(tmp_path / "one", 1, 2 * CHUNK)
    _, other, _ = commit(tmp_path / "other", 1, CHUNK, partitions=2)
    bench.fill("a", digest, directory)
    assert bench.verify(digest, other) is None
    assert bench.told.bad == []
    assert bench.store.has_sound(digest)
