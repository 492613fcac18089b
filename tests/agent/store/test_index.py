"""The binary list of tensors: told and read back, and refused whatever it could lie about."""

import ctypes
import hashlib
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.engine.dtypes import PACKED, torch_dtype
from agent.engine.image import image_tensors
from agent.engine.weights import fused_view
from agent.store import index as index_module
from agent.store.index import encode_index, index_of, read_index
from schema.checkpoint import (
    DTYPE_BITS,
    FORMAT_VERSION,
    INDEX_FILE,
    AssetEntry,
    KvGeometry,
    Manifest,
    Partition,
    TensorEntry,
    TextDefaults,
    tensor_bytes,
)
from schema.errors import InvalidCheckpoint

TENSORS = (
    TensorEntry("a", "F32", (4, 16), 0, 0, 256),
    TensorEntry("b", "BF16", (32,), 0, 256, 64),
    TensorEntry("c", "F32", (0, 7), 1, 0, 0),
    TensorEntry("d", "F32", (), 1, 0, 4),
    TensorEntry("é", "BOOL", (3,), 1, 5, 3),
)


def write(directory: Path, data: bytes, ties: dict[str, str] | None = None) -> Manifest:
    (directory / INDEX_FILE).write_bytes(data)
    return Manifest(
        format_version=FORMAT_VERSION, digest="a" * 64, layout="exec2", architecture="LlamaForCausalLM", parameters=96,
        vocab_size=32, max_context_tokens=64, chunk_bytes=4096,
        partitions=(Partition("p0.bin", 0, 8192, (1, 2)), Partition("p1.bin", 8192, 4096, (3,))),
        tensors=(), ties={"lm_head": "a"} if ties is None else ties, kv=KvGeometry(2, 2, 16, "BF16"), config={},
        text=TextDefaults(), assets=(AssetEntry(INDEX_FILE, len(data), hashlib.sha256(data).hexdigest()),),
    )  # fmt: skip


def test_what_was_told_is_read_back(tmp_path: Path) -> None:
    manifest = write(tmp_path, encode_index(TENSORS))
    found = read_index(tmp_path, manifest)
    same = index_of(TENSORS, manifest)
    for index in (found, same):
        assert index.names == ["a", "b", "c", "d", "é"]
        assert index.starts.tolist() == [0, 256, 8192, 8192, 8197]
        assert index.sizes.tolist() == [256, 64, 0, 4, 3]
        assert index.shapes == [(4, 16), (32,), (0, 7), (), (3,)]
        assert index.dtypes == ["F32", "BF16", "F32", "F32", "BOOL"]


def test_kinds_are_few_and_told_apart_also_where_a_hash_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(1, 2), (2, 1), (2,), (1, 2), (2, 1)]
    dtypes = ["F32", "F32", "F32", "F32", "I32"]
    entries = [
        TensorEntry(str(at), dtype, shape, 0, at * 256, 8) for at, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True))
    ]
    manifest = write(tmp_path, encode_index(entries), ties={})
    for factor in (index_module._HASH, np.uint64(0)):
        monkeypatch.setattr(index_module, "_HASH", factor)
        found = read_index(tmp_path, manifest)
        assert found.shapes == shapes
        assert found.dtypes == dtypes
        assert len(found.kinds) == 4


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    assert len(read_index(tmp_path, write(tmp_path, encode_index(()), ties={}))) == 0


@pytest.mark.parametrize("shape", [(2, 12), (4, 2, 3), (8,), (0, 4), (4, 0), ()])
@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_and_shape_to_the_byte(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    size = tensor_bytes(dtype, shape)
    if size is None:
        assert (dtype[:2], shape) in {("F4", ()), ("F6", ())}
        return
    entry = TensorEntry("a", dtype, shape, 0, 8, size)
    image = random.Random(7).randbytes(12288)
    index = read_index(tmp_path, write(tmp_path, encode_index([entry]), ties={}))
    assert index.dtypes == [dtype]
    tensor = image_tensors(index, image)["a"]
    assert tensor.nbytes == size
    assert tensor.dtype == torch_dtype(dtype)
    if dtype not in PACKED:
        assert tensor.shape == shape
    if size:
        assert bytes((ctypes.c_ubyte * size).from_address(tensor.data_ptr())) == image[8 : 8 + size]


@pytest.mark.parametrize(
    ("dtype", "shape", "seen"),
    [
        ("F4", (3, 8), (3, 4)),
        ("F4", (2, 3), (3,)),
        ("F6_E2M3", (2, 4), (6,)),
        ("F6_E3M2", (4, 0), (0,)),
    ],
)
def test_packed_elements_are_seen_by_the_byte(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], seen: tuple[int, ...]
) -> None:
    size = tensor_bytes(dtype, shape)
    assert size is not None
    entry = TensorEntry("a", dtype, shape, 0, 3, size)
    index = read_index(tmp_path, write(tmp_path, encode_index([entry]), ties={}))
    assert image_tensors(index, bytes(12288))["a"].shape == seen


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("F4", (3,), 1), ("F4", (3,), 2), ("F6_E2M3", (2,), 1), ("F6_E3M2", (), 1)]
)
def test_packed_elements_must_fill_their_bytes(tmp_path: Path, dtype: str, shape: tuple[int, ...], size: int) -> None:
    manifest = write(tmp_path, encode_index([TensorEntry("a", dtype, shape, 0, 0, size)]), ties={})
    with pytest.raises(InvalidCheckpoint, match="do not make"):
        read_index(tmp_path, manifest)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"name": "a"}, "twice"),
        ({"offset_bytes": 128}, "overlap"),
        ({"offset_bytes": 8192}, "beyond"),
        ({"offset_bytes": 301}, "aligned"),
        ({"offset_bytes": (1 << 63) + 2}, "no place"),
        ({"partition": 2}, "does not exist"),
        ({"size_bytes": 65}, "do not make 65"),
        ({"shape": (1 << 32, 1 << 32), "size_bytes": 0}, "do not make"),
        ({"shape": (1 << 40, 1 << 24), "size_bytes": 0}, "do not make"),
        ({"shape": (1 << 51,)}, "dimension"),
        ({"shape": (0, 1 << 50, 1 << 50)}, "do not make"),
    ],
)
def test_a_hostile_list_is_refused(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    tensors = [*TENSORS]
    tensors[1] = msgspec.structs.replace(tensors[1], **changes)
    manifest = write(tmp_path, encode_index(tensors))
    with pytest.raises(InvalidCheckpoint, match=why):
        read_index(tmp_path, manifest)


@pytest.mark.parametrize("ties", [{"x": "nowhere"}, {"b": "a"}])
def test_a_tie_to_nowhere_is_refused(tmp_path: Path, ties: dict[str, str]) -> None:
    with pytest.raises(InvalidCheckpoint, match="tie"):
        read_index(tmp_path, write(tmp_path, encode_index(TENSORS), ties))


def test_a_list_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path, encode_index(TENSORS))
    (tmp_path / INDEX_FILE).write_bytes(encode_index(TENSORS[:-1]))
    with pytest.raises(InvalidCheckpoint, match="not what was ingested"):
        read_index(tmp_path, manifest)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(InvalidCheckpoint, match="cannot read"):
        read_index(tmp_path, manifest)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1000), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_list_is_refused_or_makes_sense(tmp_path: Path, at: int, byte: int, cut: bool) -> None:
    data = bytearray(encode_index(TENSORS))
    at %= len(data)
    data[at] = byte
    manifest = write(tmp_path, bytes(data[:at] if cut else data))
    try:
        found = read_index(tmp_path, manifest)
    except InvalidCheckpoint:
        return
    for start, size in zip(found.starts, found.sizes, strict=True):
        assert 0 <= start <= start + size <= manifest.image_bytes


def test_tensors_are_views_and_fused_groups_one_view(tmp_path: Path) -> None:
    image = bytes(range(256)) * 48
    entries = [
        TensorEntry("q", "BF16", (4, 8), 0, 256, 64),
        TensorEntry("k", "BF16", (2, 8), 0, 320, 32),
        TensorEntry("v", "BF16", (2, 8), 0, 352, 32),
        TensorEntry("far", "BF16", (2, 8), 0, 512, 32),
        TensorEntry("none", "F32", (0, 8), 0, 512, 0),
    ]
    tensors = image_tensors(read_index(tmp_path, write(tmp_path, encode_index(entries), ties={})), image)
    for entry in entries:
        data = image[entry.offset_bytes : entry.offset_bytes + entry.size_bytes]
        assert tensors[entry.name].contiguous().view(torch.uint8).numpy().tobytes() == data
        assert tensors[entry.name].shape == entry.shape
    fused = fused_view([tensors["q"], tensors["k"], tensors["v"]])
    assert fused is not None
    assert fused.data_ptr() == tensors["q"].data_ptr()
    assert torch.equal(fused.view(torch.int16), torch.cat([tensors[name] for name in "qkv"]).view(torch.int16))
    assert fused_view([tensors["q"], tensors["v"]]) is None
    assert fused_view([tensors["q"], tensors["far"]]) is None
    assert fused_view([tensors["q"], tensors["none"]]) is None


@pytest.mark.parametrize("changes", [{"name": "a\0b"}, {"name": ""}, {"shape": (1,) * 17}, {"dtype": "F12"}])
def test_an_entry_that_cannot_be_told_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidCheckpoint, match="cannot be listed"):
        encode_index([msgspec.structs.replace(TENSORS[1], **changes)])
