"""Models loaded from the user's own files: to the byte, under the digest of an ingested copy, and never once they changed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from agent.engine.image import image_tensors
from agent.native.arena import Arena
from agent.store import catalog
from agent.store.cache import ArenaStore
from agent.store.catalog import CatalogEntry
from agent.store.index import read_index
from agent.store.ingest.convert import convert
from agent.store.ingest.reading import SourceReader
from agent.store.remote.open import open_remote
from agent.store.remote.publish import publish
from agent.store.trial import TrialStore
from schema.checkpoint import IN_PLACE, PAD_BYTES, decode_manifest, encode_manifest
from schema.errors import InvalidCheckpoint, InvalidInput, SllmError
from schema.remote import RemoteSettings
from tests.agent.store.fetching import FetchBench
from tests.checkpoints import make_llama_dir


def add(source: Path, data: Path, *, in_place: bool = True) -> str:
    digest = convert(source, data / "checkpoints", data / "tmp", lambda done, total: None, in_place=in_place)
    assert list((data / "tmp").iterdir()) == []
    return digest


def entry_of(digest: str, data: Path, layout: str = IN_PLACE) -> CatalogEntry:
    return catalog.read_entry(data / "checkpoints" / digest / layout)


def load(entry: CatalogEntry) -> bytes:
    store = TrialStore(entry.manifest.image_bytes, chunk_bytes=4 << 20, reader_threads=2)
    try:
        resident, _ = store.fill(entry)
        pieces = store.open_store().views(entry.digest, 0, resident.image_bytes)
        return b"".join(bytes(piece) for piece in pieces)
    finally:
        store.close()


def tree(path: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(each.relative_to(path)): (each.stat().st_ino, each.stat().st_mtime_ns, each.read_bytes())
        for each in path.rglob("*")
        if each.is_file()
    }


def test_files_are_read_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_llama_dir(tmp_path / "m", hidden=64, vocab=8192)
    (file,) = source.glob("*.safetensors")
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct reads")
    monkeypatch.setattr(SourceReader, "_in_cache", lambda self, at, length: False)
    real, direct = os.preadv, 0

    def preadv(descriptor: int, buffers: list[memoryview], at: int) -> int:
        nonlocal direct
        count = real(descriptor, buffers, at)
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct += count
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    add(source, tmp_path / "data")
    assert direct == file.stat().st_size


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_tensors_to_the_byte_under_the_digest_of_a_copy(tmp_path: Path, shards: int, dtype: str, padding: int) -> None:
    source = make_llama_dir(tmp_path / "m", shards=shards, dtype=dtype, hidden=24, heads=2, kv_heads=1, vocab=1031)
    for file in source.glob("*.safetensors"):
        shift(file, padding)
    before = tree(source)
    digest = add(source, tmp_path / "data")
    entry = entry_of(digest, tmp_path / "data")
    assert add(source, tmp_path / "copied", in_place=False) == digest
    assert tree(source) == before
    assert sum(file.stat().st_size for file in entry.directory.iterdir()) < 60_000  # the text side, and no weights
    assert len(entry.manifest.partitions) == shards
    files = sorted(source.glob("*.safetensors"))
    for file, partition in zip(files, entry.manifest.partitions, strict=True):
        assert partition.size_bytes == file.stat().st_size
        assert partition.start_bytes % PAD_BYTES == 0
        assert partition.chunk_xxh3 == (xxhash.xxh3_64_intdigest(file.read_bytes()),)
    tensors = image_tensors(read_index(entry.directory, entry.manifest), memoryview(bytearray(load(entry))))
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].data_ptr() % tensor.dtype.itemsize == 0
        assert torch.equal(tensors[name], tensor), name


def shift(file: Path, count: int) -> None:
    """Moves all data of a safetensors file by so many bytes, with spaces at the end of its header, as the format allows."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * count
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_chunks_of_files_that_are_longer_than_one(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m", hidden=512, vocab=3001, heads=8)
    entry = entry_of(add(source, tmp_path), tmp_path)
    (partition,) = entry.manifest.partitions
    data = (source / "model.safetensors").read_bytes()
    step = entry.manifest.chunk_bytes
    assert len(data) > 3 * step
    assert len(data) % PAD_BYTES
    assert partition.chunk_xxh3 == tuple(xxhash.xxh3_64_intdigest(data[at : at + step]) for at in range(0, len(data), step))
    assert add(source, tmp_path / "copied", in_place=False) == entry.digest
    assert load(entry)[: len(data)] == data


def test_a_tied_head_has_the_digest_of_a_copy(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m", tie=True)
    digest = add(source, tmp_path)
    assert entry_of(digest, tmp_path).manifest.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert add(source, tmp_path, in_place=False) == digest


def test_a_sound_copy_is_preferred_and_the_files_stand_in_for_a_bad_one(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m")
    digest = add(source, tmp_path)
    assert catalog.scan(tmp_path / "checkpoints")[digest].manifest.layout == IN_PLACE
    add(source, tmp_path, in_place=False)
    copied = catalog.scan(tmp_path / "checkpoints")[digest]
    assert copied.manifest.layout != IN_PLACE
    catalog.quarantine(copied.directory, "a chunk was wrong")
    assert catalog.scan(tmp_path / "checkpoints")[digest].manifest.layout == IN_PLACE


def test_removing_leaves_the_users_files(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m", shards=2)
    before = tree(source)
    entry = entry_of(add(source, tmp_path), tmp_path)
    catalog.remove(entry)
    assert not entry.directory.parent.exists()
    assert tree(source) == before


def _shrink(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _write_over(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x55")


def _replace(file: Path) -> None:
    """By a file of the same bytes and times."""
    other = file.with_name("other")
    shutil.copy2(file, other)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.rename(file)


def _link(file: Path) -> None:
    moved = file.rename(file.with_name("elsewhere"))
    file.symlink_to(moved)


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_shrink, "bytes since it was added"),
        (_write_over, "was written to"),
        (_replace, "was replaced by another file"),
        (_link, "is no regular file any more"),
        (_fifo, "is no regular file any more"),
        (Path.unlink, "cannot be read any more"),
    ],
)
def test_files_that_changed_are_in_quarantine_until_they_are_added_again(
    tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    source = make_llama_dir(tmp_path / "m")
    kept = shutil.copytree(source, tmp_path / "kept")
    entry = entry_of(add(source, tmp_path), tmp_path)
    load(entry)
    change(source / "model.safetensors")
    changed = catalog.scan(tmp_path / "checkpoints")[entry.digest]
    assert changed.quarantined is not None
    assert said in changed.quarantined
    assert str(source / "model.safetensors") in changed.quarantined
    with pytest.raises(InvalidCheckpoint, match=said):
        load(changed)
    assert add(kept, tmp_path) == entry.digest
    again = entry_of(entry.digest, tmp_path)
    assert again.quarantined is None
    load(again)


def test_a_link_on_the_way_that_leads_elsewhere_later_is_not_followed(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "one")
    make_llama_dir(tmp_path / "two", seed=1)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    entry = entry_of(add(tmp_path / "link", tmp_path), tmp_path)
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "two")
    assert (
        load(entry_of(entry.digest, tmp_path))[: (source / "model.safetensors").stat().st_size]
        == (source / "model.safetensors").read_bytes()
    )


def test_bytes_that_changed_behind_the_same_times_are_found_by_their_checksums(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m")
    entry = entry_of(add(source, tmp_path), tmp_path)
    file = source / "model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    _write_over(file)
    os.utime(file, ns=times)
    with pytest.raises(InvalidCheckpoint, match="are not what was ingested"):
        load(entry)
    assert catalog.quarantine_reason(entry.directory) is not None


class _Told:
    """A StoreListener that changes a file as soon as it is being read."""

    def __init__(self, change: Callable[[], None]) -> None:
        self.change: Callable[[], None] | None = change
        self.ends: list[object] = []

    def progress(self, op: str, done_bytes: int, total_bytes: int) -> None:
        if self.change is not None:
            self.change()
            self.change = None

    def filled(self, op: str, resident: object) -> None:
        self.ends.append(resident)

    def evicted(self, digest: str, why: str, for_digest: str) -> None: ...

    def failed(self, op: str, digest: str, fault: object) -> None:
        self.ends.append(fault)


def test_a_file_that_is_written_to_while_it_is_loaded(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m")
    entry = entry_of(add(source, tmp_path), tmp_path)
    catalog.mark_verified(entry.directory)
    told = _Told(lambda: _write_over(source / "model.safetensors"))
    awake = threading.Event()
    arena = Arena.create(8 << 20, 4 << 20)
    store = ArenaStore(arena, told, reader_threads=1, wake=awake.set)  # type: ignore[arg-type]
    try:
        store.fill("op", entry.digest, entry.directory)
        while not told.ends:
            assert awake.wait(100)
            awake.clear()
            store.pump()
        assert "was written to since it was added in place" in str(told.ends)
        assert store.residents() == ()
        assert store.arena.used_bytes == 0
    finally:
        store.close()
        arena.close()


def test_such_a_layout_neither_goes_to_a_remote_nor_comes_from_one(tmp_path: Path) -> None:
    entry = entry_of(add(make_llama_dir(tmp_path / "m"), tmp_path), tmp_path)
    (tmp_path / "remote").mkdir()
    settings = RemoteSettings()
    remote = open_remote(f"file://{tmp_path}/remote", settings)
    with pytest.raises(InvalidInput, match="not published"):
        publish(entry, remote, settings, lambda done, total: None)
    assert list((tmp_path / "remote").iterdir()) == []


def test_files_in_their_place_on_another_machine_are_not_fetched(tmp_path: Path) -> None:
    entry = entry_of(add(make_llama_dir(tmp_path / "model"), tmp_path), tmp_path)
    remote = tmp_path / "remote" / entry.digest / IN_PLACE
    remote.mkdir(parents=True)
    for file in entry.directory.iterdir():
        shutil.copy(file, remote)
    with contextlib.closing(FetchBench(tmp_path / "node")) as bench:
        fault = bench.get(entry.digest, f"file://{tmp_path}/remote")
        assert fault is not None
        assert (fault.code, "names files of another machine" in fault.message) == ("invalid_checkpoint", True)
        assert bench.leftovers == []
        assert not (bench.data / "checkpoints").exists()


def test_manifests_that_point_at_files_elsewhere_under_another_layout(tmp_path: Path) -> None:
    manifest = entry_of(add(make_llama_dir(tmp_path / "m"), tmp_path), tmp_path).manifest
    assert decode_manifest(encode_manifest(manifest)) == manifest
    with pytest.raises(SllmError, match="belong to the layout inplace1"):
        decode_manifest(encode_manifest(msgspec.structs.replace(manifest, layout="exec1")))
    (partition,) = manifest.partitions
    bare = msgspec.structs.replace(partition, source=None)
    with pytest.raises(SllmError, match="belong to the layout inplace1"):
        decode_manifest(encode_manifest(msgspec.structs.replace(manifest, partitions=(bare,))))
