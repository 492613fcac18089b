"""What lies on the disk: sound, in quarantine, or damaged, and then still shown, counted, verified, replaced and removed."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.native.arena import Arena
from agent.store import catalog, durable
from agent.store.budget import used_bytes
from schema.errors import InvalidCheckpoint, SllmError
from tests.agent.store.fetching import PART, FetchBench, assert_there, make_source, rewrite
from tests.agent.store.images import CHUNK, Bench, commit


@pytest.fixture
def source(tmp_path: Path) -> tuple[str, Path, bytes]:
    return make_source(tmp_path / "data" / "checkpoints")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)


DAMAGE: list[tuple[str, Callable[[Path], None]]] = [
    ("manifest.json", flip),
    ("manifest.json", cut),
    ("manifest.json", Path.unlink),
    ("tokenizer.json", cut),
    ("tokenizer.json", Path.unlink),
    (PART, cut),
    (PART, Path.unlink),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGE)
def test_a_damaged_copy_is_found_named_and_removed(
    source: tuple[str, Path, bytes], file: str, damage: Callable[[Path], None]
) -> None:
    digest, directory, image = source
    catalog.mark_verified(directory)
    damage(directory / file)
    found = catalog.look(directory.parent.parent)
    assert found.copies == ()
    (copy,) = found.damaged
    assert (copy.digest, copy.directory) == (digest, directory)
    assert str(directory / file) in copy.quarantined
    lost = 0 if file != PART else len(image) // 2 + CHUNK
    assert len(image) - lost <= copy.size_bytes <= len(image) + 10 * 4096
    assert not catalog.is_verified(directory), "its bytes are looked at again once it can be read"
    catalog.remove(copy)
    assert catalog.look(directory.parent.parent) == catalog.Found((), ())


def test_each_damaged_layout_beside_a_sound_one_is_found(source: tuple[str, Path, bytes]) -> None:
    digest, directory, _ = source
    others = [directory.with_name(name) for name in ("another", "other")]
    for other in others:
        other.mkdir()
        (other / "manifest.json").write_bytes(b"{")
    found = catalog.look(directory.parent.parent)
    assert {key: entry.directory for key, entry in found.entries.items()} == {digest: directory}
    assert [copy.directory for copy in found.damaged] == others


def test_of_sound_layouts_the_first_by_name_is_the_best_and_one_in_quarantine_the_last(source: tuple[str, Path, bytes]) -> None:
    digest, directory, _ = source
    for layout in ("b", "a"):
        shutil.copytree(directory, directory.with_name(layout))
        rewrite(directory.with_name(layout), layout=layout)
    catalog.quarantine(directory.with_name("a"), "a test")
    found = catalog.look(directory.parent.parent)
    assert [copy.directory.name for copy in found.copies] == ["b", "exec1", "a"]
    assert found.entries[digest] is found.copies[0]


@pytest.mark.parametrize("verified", [False, True])
def test_a_damaged_copy_is_replaced_by_a_fetch(tmp_path: Path, source: tuple[str, Path, bytes], verified: bool) -> None:
    digest, directory, image = source
    make_source(tmp_path / "remote")
    (directory / "manifest.json").write_bytes(b"damaged")
    with contextlib.closing(FetchBench(tmp_path / "data")) as bench:
        if verified:
            fault = bench.verify(digest, directory)
            assert fault is not None
            assert fault.code == InvalidCheckpoint.code
            assert str(directory / "manifest.json") in (catalog.quarantine_reason(directory) or "")
        assert bench.get(digest, f"file://{tmp_path}/remote") is None
        assert_there(bench, digest, image)


def test_a_commit_keeps_what_is_sound_and_replaces_the_rest(tmp_path: Path, source: tuple[str, Path, bytes]) -> None:
    digest, target, _ = source
    replaced = tmp_path / "tmp" / "replaced"
    _, new, _ = make_source(tmp_path / "new")
    inode = target.stat().st_ino
    assert not catalog.commit(new, target, replaced)
    assert (target.stat().st_ino, new.exists(), replaced.exists()) == (inode, True, False)
    cut(target / "manifest.json")
    inode = new.stat().st_ino
    assert catalog.commit(new, target, replaced)
    assert (target.stat().st_ino, new.exists(), replaced.exists()) == (inode, False, True)
    assert catalog.look(target.parent.parent).entries[digest].quarantined is None


def test_whoever_looks_while_a_copy_is_replaced_finds_one(
    tmp_path: Path, source: tuple[str, Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, target, _ = source
    _, new, _ = make_source(tmp_path / "new")
    catalog.quarantine(target, "its text is wrong")
    try:
        durable._exchange(target, new)
        durable._exchange(target, new)
    except OSError as error:
        pytest.skip(f"the file system of {tmp_path} does not exchange directories: {error.strerror}")
    rename, seen = Path.rename, []

    def looked(path: Path, to: Path) -> Path:
        moved = rename(path, to)
        seen.append(digest in catalog.look(target.parent.parent).entries)
        return moved

    monkeypatch.setattr(Path, "rename", looked)
    assert catalog.commit(new, target, tmp_path / "replaced")
    assert seen == [True]


def test_a_copy_that_cannot_be_replaced_stays(
    tmp_path: Path, source: tuple[str, Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, target, _ = source
    _, new, _ = make_source(tmp_path / "new")
    catalog.quarantine(target, "its text is wrong")
    rename = Path.rename

    def cannot(*_: Path) -> None:
        raise OSError(errno.EINVAL, "this file system does not exchange")

    def fails(path: Path, to: Path) -> Path:
        if path == new:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(durable, "_exchange", cannot)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="Input/output"):
            catalog.commit(new, target, tmp_path / "replaced")
    assert catalog.look(target.parent.parent).entries[digest].quarantined == "its text is wrong"
    assert catalog.commit(new, target, tmp_path / "replaced")
    assert catalog.look(target.parent.parent).entries[digest].quarantined is None


def test_small_files_are_compared_with_their_checksums(source: tuple[str, Path, bytes]) -> None:
    _, directory, _ = source
    entry = catalog.read_entry(directory)
    catalog.check_assets(directory, entry.manifest)
    flip(directory / "tokenizer.json")
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.json: its 2000 bytes are not what was ingested"):
        catalog.check_assets(directory, entry.manifest)


@pytest.mark.parametrize("file", ["manifest.json", "quarantined", PART])
def test_what_the_system_fails_to_read_says_nothing_of_the_copy(
    source: tuple[str, Path, bytes], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    digest, directory, _ = source
    catalog.mark_verified(directory)
    before = sorted(path.name for path in directory.iterdir())

    def fail(real: Callable[..., object]) -> Callable[..., object]:
        def call(path: Path, *more: object, **named: object) -> object:
            if path == directory / file:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(path, *more, **named)

        return call

    with contextlib.closing(Bench(Arena.create(40 * CHUNK, CHUNK))) as bench, monkeypatch.context() as broken:
        for name in ("open", "lstat"):
            broken.setattr(Path, name, fail(getattr(Path, name)))
        bench.store.fill("load", digest, directory)
        bench.store.verify("look", digest, directory)
        bench.wait("load", "look")
        for fault in (bench.told.faults["load"], bench.told.verdicts["look"]):
            assert fault is not None
            assert fault.code == "internal"
            assert str(directory / file) in fault.message
        new = directory.with_name("new")
        new.mkdir()
        with pytest.raises(SllmError, match=file):
            catalog.commit(new, directory, directory.with_name("replaced"))
        broken.undo()
        assert sorted(path.name for path in directory.iterdir()) == [name for name in before if name != "verified"]
        bench.fill("again", digest, directory)
        assert bench.told.faults.keys() == {"load"}


@pytest.mark.parametrize("where", ["the digest", "the layout", "a file"])
def test_a_bad_spot_of_the_disk_hides_no_other_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    root = tmp_path / "data" / "checkpoints"
    bad, good = (commit(root, number, CHUNK) for number in (1, 2))
    spot = {"the digest": bad[1].parent, "the layout": bad[1], "a file": bad[1] / PART}[where]

    def fail(real: Callable[..., object]) -> Callable[..., object]:
        def call(path: object = ".", *more: object, **named: object) -> object:
            if str(path) == str(spot) or Path(str(path)).is_relative_to(spot):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path, *more, **named)

        return call

    for name in ("open", "stat", "lstat", "scandir", "listdir"):
        monkeypatch.setattr(os, name, fail(getattr(os, name)))
    monkeypatch.setattr(io, "open", fail(io.open))
    found = catalog.look(root)
    assert [copy.digest for copy in found.copies] == [good[0]]
    assert {copy.digest for copy in found.damaged} == {bad[0]}
    assert CHUNK <= used_bytes(tmp_path / "data") < 3 * CHUNK


def test_a_copy_that_cannot_be_listed_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, directory, _ = commit(tmp_path, 1, CHUNK)
    real = os.scandir

    def fail(path: str | Path) -> Any:
        if Path(path) == directory.parent:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path)

    monkeypatch.setattr(os, "scandir", fail)
    assert [(copy.digest, copy.directory) for copy in catalog.look(tmp_path).copies] == [(digest, directory)]


def test_what_a_removal_could_not_delete_is_not_in_the_way_of_the_next(
    source: tuple[str, Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory, _ = source
    again = directory.parent.parent.parent / "again"
    shutil.copytree(directory, again)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(catalog.shutil, "rmtree", fail)
        with pytest.raises(OSError, match="Input/output"):
            catalog.remove(catalog.read_entry(directory))
    directory.parent.mkdir()
    again.rename(directory)
    catalog.remove(catalog.read_entry(directory))
    assert catalog.look(directory.parent.parent) == catalog.Found((), ())
