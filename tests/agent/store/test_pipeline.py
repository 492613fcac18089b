"""Partition files written on several threads: every byte and every checksum, and an end for every error."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors import deserialize

from agent.native.address import address_of
from agent.native.blocks import block_memory
from agent.store.ingest.files import SourceDirectory
from agent.store.ingest.headers import Sources, SourceTensor
from agent.store.ingest.pipeline import CHUNK_BYTES
from agent.store.ingest.reading import SourceReader
from agent.store.ingest.writer import Written, write_partition
from schema.checkpoint import DTYPE_BITS, PAD_BYTES, tensor_bytes
from schema.errors import InvalidCheckpoint, OutOfSpace, SllmError
from tests.checkpoints import write_safetensors

SEED = 20260713


def sizes() -> list[int]:
    """Around chunk borders, far beyond, nothing at all, and many small ones."""
    random = np.random.default_rng(SEED)
    around = [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 0, 3 * CHUNK_BYTES + 777, 1, 5 * CHUNK_BYTES]
    return around + random.integers(0, 5000, 600).tolist() + [2 * CHUNK_BYTES + 255, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random = np.random.default_rng(SEED)
    tensors = {f"t{number:04}": ("U8", (size,), random.bytes(size)) for number, size in enumerate(sizes())}
    write_safetensors(path / "model.safetensors", tensors)
    return path


@pytest.fixture
def sources(model: Path) -> Iterator[Sources]:
    with Sources(SourceDirectory(model)) as found:
        yield found


def write(path: Path, sources: Sources, progress: Callable[[int], None] = lambda done: None) -> Written:
    return write_partition(path, sources, sources.tensors.values(), progress)


def test_every_byte_and_every_checksum(tmp_path: Path, sources: Sources) -> None:
    heard: list[int] = []
    written = write(tmp_path / "p.bin", sources, heard.append)
    data = (tmp_path / "p.bin").read_bytes()
    expected = bytearray(len(data))
    for entry in written.tensors:
        tensor = sources.read(sources.tensors[entry.name], 0, entry.size_bytes)
        expected[entry.offset_bytes : entry.offset_bytes + entry.size_bytes] = tensor
        assert written.sha256[entry.name] == hashlib.sha256(tensor).digest()
    assert data == expected
    assert len(data) == written.partition.size_bytes
    assert len(data) % PAD_BYTES == 0
    starts = range(0, len(data), CHUNK_BYTES)
    assert written.partition.chunk_xxh3 == tuple(xxhash.xxh3_64_intdigest(data[at : at + CHUNK_BYTES]) for at in starts)
    assert heard == sorted(heard)
    assert heard[-1] == sum(sizes())


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_as_safetensors_itself_reads_it(tmp_path: Path, dtype: str) -> None:
    shapes = [(4, 6), (0, 3), (8,)] + ([] if dtype.startswith(("F4", "F6")) else [(), (7,)])
    tensors = {}
    for number, shape in enumerate(shapes):
        size = tensor_bytes(dtype, shape)
        assert size is not None
        tensors[f"t{number}"] = (dtype, shape, bytes(range(size)))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with Sources(SourceDirectory(tmp_path)) as sources:
        entries = write(tmp_path / "p.bin", sources).tensors
    theirs = dict(deserialize((tmp_path / "model.safetensors").read_bytes()))
    image = (tmp_path / "p.bin").read_bytes()
    assert {entry.name for entry in entries} == theirs.keys()
    for entry in entries:
        assert [*entry.shape] == theirs[entry.name]["shape"]
        assert image[entry.offset_bytes : entry.offset_bytes + entry.size_bytes] == bytes(theirs[entry.name]["data"])


def test_a_partition_of_nothing(tmp_path: Path, sources: Sources) -> None:
    written = write_partition(tmp_path / "p.bin", sources, [], lambda done: None)
    assert (tmp_path / "p.bin").read_bytes() == bytes(PAD_BYTES)
    assert written.partition.chunk_xxh3 == (xxhash.xxh3_64_intdigest(bytes(PAD_BYTES)),)


@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_source_that_fails_ends_every_thread(
    tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    real = sources.read_into
    calls = iter(range(1 << 30))

    def failing(tensor: SourceTensor, start: int, target: memoryview) -> None:
        if next(calls) == at:
            raise InvalidCheckpoint("ended while it was read")
        real(tensor, start, target)

    monkeypatch.setattr(sources, "read_into", failing)
    with pytest.raises(InvalidCheckpoint, match="ended while"):
        write(tmp_path / "p.bin", sources)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ingest")]


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, OutOfSpace), (errno.EIO, SllmError)])
def test_a_disk_that_fails(
    tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[SllmError]
) -> None:
    real = os.pwrite

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= 4 * CHUNK_BYTES:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    room = f"; {tmp_path} has [0-9]+ free; " if kind is OutOfSpace else "$"
    with pytest.raises(kind, match=rf"p\.bin: {os.strerror(code)}{room}"):
        write(tmp_path / "p.bin", sources)


@pytest.mark.parametrize("count", [4096 * 3, 1000])
def test_writes_that_are_cut_short(tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    whole = write(tmp_path / "whole.bin", sources)
    real = os.pwrite

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        return real(descriptor, data[:count] if offset == CHUNK_BYTES else data, offset)

    monkeypatch.setattr(os, "pwrite", short)
    assert write(tmp_path / "short.bin", sources).partition.chunk_xxh3 == whole.partition.chunk_xxh3
    assert (tmp_path / "short.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_what_passes_the_cache_lies_in_huge_pages(tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    begins: list[int] = []
    write_real, read_real = os.pwrite, os.preadv

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        begins.append(address_of(data))
        return write_real(descriptor, data, offset)

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            begins.append(address_of(buffers[0]))
        return read_real(descriptor, buffers, offset)

    monkeypatch.setattr(SourceReader, "_in_cache", lambda self, at, length: False)
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "preadv", preadv)
    write(tmp_path / "p.bin", sources)
    assert begins
    assert {address % (2 << 20) for address in begins} == {0}


def test_a_caller_that_gives_up_ends_every_thread(tmp_path: Path, sources: Sources) -> None:
    class GivenUp(BaseException):
        pass

    def stop(done: int) -> None:
        raise GivenUp

    with pytest.raises(GivenUp):
        write(tmp_path / "p.bin", sources, stop)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ingest")]


@pytest.mark.parametrize("way", ["past the cache", "out of the cache", "no direct reads", "cut short"])
def test_a_source_is_read_the_same_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    data = np.random.default_rng(SEED).bytes(2 * CHUNK_BYTES + 12345)
    file = tmp_path / "file"
    file.write_bytes(data)
    real = os.preadv
    direct: list[int] = []
    addresses: list[int] = []

    def preadv(descriptor: int, buffers: list[memoryview], at: int) -> int:
        addresses.append(address_of(buffers[0]))
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(at)
            if way == "no direct reads":
                raise OSError(errno.EINVAL, "no")
            if way == "cut short":
                return real(descriptor, [buffers[0][:8192]], at)
        return real(descriptor, buffers, at)

    descriptor = os.open(file, os.O_RDONLY)
    reader = SourceReader(descriptor)
    try:
        if way != "out of the cache":
            os.fsync(descriptor)
            monkeypatch.setattr(reader, "_in_cache", lambda at, length: False)
        monkeypatch.setattr(os, "preadv", preadv)
        for start, size in ((0, len(data)), (777, CHUNK_BYTES), (4096, 300_000), (1, 5), (len(data) - 270_001, 270_001)):
            target = bytearray(size)
            assert reader.read_into(start, memoryview(target)) == size
            assert target == data[start : start + size]
        aligned = block_memory(CHUNK_BYTES)
        assert reader.read_into(CHUNK_BYTES, aligned) == CHUNK_BYTES
        assert aligned == data[CHUNK_BYTES : 2 * CHUNK_BYTES]
        assert way == "cut short" or addresses[-1] == address_of(aligned)
        beyond = bytearray(CHUNK_BYTES)
        assert reader.read_into(len(data) - 300_000, memoryview(beyond)) == 300_000
        assert beyond[:300_000] == data[-300_000:]
        assert reader.read_into(len(data) + 5, memoryview(beyond)) == 0
    finally:
        reader.close()
        os.close(descriptor)
    if way in ("past the cache", "cut short") and reader._direct >= 0:
        assert direct
