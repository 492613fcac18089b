"""Files of torch.save: read as torch reads them, to the digest of the same model as safetensors; hostile ones are refused."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agent.store.ingest import unpickle
from agent.store.ingest.convert import convert
from agent.store.ingest.files import SourceDirectory
from agent.store.ingest.headers import Sources
from agent.store.ingest.strided import gather
from agent.store.ingest.torchfile import find_tensors
from schema.errors import InvalidCheckpoint
from tests.checkpoints import make_llama_dir

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def ingest(source: Path, data: Path, **options: Any) -> str:
    return convert(source, data / "checkpoints", data / "tmp", lambda done, total: None, **options)


def save(value: Any, path: Path, *, zipped: bool = True, protocol: int = 2) -> None:
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def find(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return find_tensors(file.fileno(), path.name, path.stat().st_size)


def refused(path: Path, match: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=match):
        find(path)


def pickled_twin(source: Path, target: Path, *, shards: int = 1, zipped: bool = True) -> Path:
    """The same model with its weights as torch.save writes them."""
    target.mkdir()
    for file in source.iterdir():
        if "safetensors" not in file.name:
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    if shards == 1:
        save(tensors, target / "pytorch_model.bin", zipped=zipped)
        return target
    placed = {}
    for shard in range(shards):
        name = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = {key: tensors[key] for key in list(tensors)[shard::shards]}
        save(part, target / name, zipped=zipped)
        placed |= dict.fromkeys(part, name)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    return target


@FORMATS
def test_every_tensor_as_torch_loads_it(tmp_path: Path, zipped: bool) -> None:
    random = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for dtype in DTYPES if zipped else DTYPES[:-3]:  # torch itself does not read the last ones in the old format
        plain = torch.randint(0, 2, (7, 5), generator=random).to(dtype)
        tensors |= {f"{dtype}": plain, f"{dtype}.scalar": plain[0, 0].clone(), f"{dtype}.empty": plain[:0].clone()}
    base = torch.randn(300, 70, generator=random)
    tensors |= {"whole": base, "tied": base, "rows": base[5:90], "transposed": base.t(), "columns": base[:, 3:60:2]}
    tensors |= {"turned": torch.randn(4, 5, 6, generator=random).permute(2, 0, 1), "scalar view": base[7, 7]}
    value: Any = collections.OrderedDict(tensors)
    value["parameter"] = torch.nn.Parameter(torch.ones(80_000))
    value._metadata = collections.OrderedDict({"": {"version": 1}})
    save(value, tmp_path / "pytorch_model.bin", zipped=zipped)
    theirs = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    with Sources(SourceDirectory(tmp_path)) as sources:
        assert sources.tensors.keys() == theirs.keys()
        for name, tensor in sources.tensors.items():
            assert tensor.shape == tuple(theirs[name].shape)
            assert sources.read(tensor, 0, tensor.size_bytes) == bytes_of(theirs[name]), name
            middle = tensor.size_bytes // 16 * 8
            target = bytearray(tensor.size_bytes - middle)
            sources.read_into(tensor, middle, memoryview(target))
            assert target == bytes_of(theirs[name])[middle:], name
        assert sources.tensors["transposed"].strides == (1, 70)
        assert sources.tensors["rows"].strides is None


@FORMATS
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols_of_pickle(tmp_path: Path, zipped: bool, protocol: int) -> None:
    tensors = collections.OrderedDict(
        a=torch.ones(2, 3), b=torch.zeros(4, dtype=torch.int64), c=torch.nn.Parameter(torch.ones(5))
    )
    save(tensors, tmp_path / "x.bin", zipped=zipped, protocol=protocol)
    assert [(each.name, each.dtype, each.shape) for each in find(tmp_path / "x.bin")] == [
        ("a", "F32", (2, 3)), ("b", "I64", (4,)), ("c", "F32", (5,)),
    ]  # fmt: skip


def test_any_view_is_read_in_order_from_anywhere(tmp_path: Path) -> None:
    random = np.random.default_rng(23)
    base = random.integers(0, 1 << 16, 5000, np.uint16)
    for _ in range(300):
        shape = tuple(map(int, random.integers(1, 6, random.integers(0, 5))))
        strides = tuple(int(random.choice([0, 1, 2, 5, 6, 30, 120, 700])) for _ in shape)
        if sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) >= 4000:
            continue
        offset, size = int(random.integers(0, 900)), int(np.prod(shape, dtype=int))
        first = int(random.integers(0, size))
        count = int(random.integers(1, size - first + 1))
        view = np.lib.stride_tricks.as_strided(base[offset:], shape, tuple(2 * stride for stride in strides))

        def read(at: int, memory: memoryview) -> None:
            memory[:] = base.view(np.uint8)[at : at + len(memory)].data

        found = gather(read, 2 * offset, 2, shape, strides, first, count)
        assert bytes(found) == view.flatten()[first : first + count].tobytes(), (shape, strides, first, count)


def test_a_file_that_is_cut_short_while_a_view_is_read_is_named_with_the_byte(tmp_path: Path) -> None:
    save({"turned": torch.ones(300, 200).t(), "odd": torch.ones(300, 200)[:, ::2]}, tmp_path / "pytorch_model.bin")
    with Sources(SourceDirectory(tmp_path)) as sources:
        for tensor in sources.tensors.values():
            os.truncate(tmp_path / "pytorch_model.bin", tensor.offset_bytes + 150_001)
            with pytest.raises(
                InvalidCheckpoint, match=rf"pytorch_model\.bin ended at byte {tensor.offset_bytes + 150_001} while"
            ):
                sources.read(tensor, 0, tensor.size_bytes)


@pytest.mark.parametrize(("shards", "zipped", "tie"), [(1, True, False), (3, True, True), (2, False, False)])
def test_the_digest_is_that_of_the_same_model_as_safetensors(tmp_path: Path, shards: int, zipped: bool, tie: bool) -> None:
    source = make_llama_dir(tmp_path / "m", tie=tie, dtype="bfloat16")
    twin = pickled_twin(source, tmp_path / "twin", shards=shards, zipped=zipped)
    digest = ingest(source, tmp_path / "a")
    assert ingest(twin, tmp_path / "b") == digest
    images = [(tmp_path / each / "checkpoints" / digest / "exec2" / "partition_0.bin").read_bytes() for each in "ab"]
    assert images[0] == images[1]
    with pytest.raises(InvalidCheckpoint, match="cannot be loaded in place"):
        ingest(twin, tmp_path / "c", in_place=True)


def test_a_tied_head_that_is_there_twice_is_stored_once(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m", tie=True)
    twin = pickled_twin(source, tmp_path / "twin")
    tensors = torch.load(twin / "pytorch_model.bin", weights_only=True)
    save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, twin / "pytorch_model.bin")
    assert ingest(twin, tmp_path / "a") == ingest(source, tmp_path / "b")


def test_safetensors_come_first(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m")
    (source / "pytorch_model.bin").write_bytes(b"whatever")
    with Sources(SourceDirectory(source)) as sources:
        assert not sources.pickled


class Runs:
    """What a hostile pickle does: it would leave a mark if it were run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@FORMATS
def test_nothing_of_a_pickle_is_run(tmp_path: Path, zipped: bool) -> None:
    save({"a": torch.ones(2), "b": Runs(tmp_path / "mark")}, tmp_path / "x.bin", zipped=zipped)
    refused(tmp_path / "x.bin", r"asks for (posix|os)\.mkdir, which is never run")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"epoch": 3, "model": {"a": torch.ones(2)}}, "'epoch' is no tensor"),
        ([torch.ones(2)], "no state dict"),
        ({"a\n": torch.ones(2)}, "not printable"),
        ({7: torch.ones(2)}, "name is none"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "repeats bytes"),
        ({f"t{number}": tensor for number in range(100) for tensor in [torch.ones(100)]} | {}, None),
        ({"s": torch.eye(3).to_sparse()}, "_get_layout, which is never run"),
    ],
)
def test_what_is_no_state_dict_of_tensors(tmp_path: Path, value: Any, match: str | None) -> None:
    save(value, tmp_path / "x.bin")
    if match is not None:
        refused(tmp_path / "x.bin", match)
    else:
        assert len(find(tmp_path / "x.bin")) == 100


def test_one_storage_under_many_names_is_no_bomb(tmp_path: Path) -> None:
    base = torch.ones(100_000)
    save({f"t{number}": base for number in range(3)}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "claim 1200000 bytes")


def rezip(path: Path, change: Callable[[str, bytes], Iterator[tuple[str, bytes, int]]]) -> None:
    with zipfile.ZipFile(path) as old:
        entries = [(each.filename, old.read(each)) for each in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries:
            for renamed, changed, method in change(name, data):
                new.writestr(renamed, changed, method)


@pytest.mark.parametrize(
    ("ending", "change", "match"),
    [
        ("data/0", lambda data: (bytes(1 << 20), zipfile.ZIP_DEFLATED), "compressed"),
        ("data.pkl", lambda data: (data, zipfile.ZIP_DEFLATED), "compressed"),
        ("data/0", lambda data: (data[:-4], zipfile.ZIP_STORED), "its storage has 4796 bytes"),
        ("data/0", lambda data: (None, 0), "'0' is not in the file"),
        ("data.pkl", lambda data: (None, 0), "0 data.pkl"),
        ("byteorder", lambda data: (b"big", zipfile.ZIP_STORED), "another byte order"),
        ("data.pkl", lambda data: (data[:-30], zipfile.ZIP_STORED), "is damaged near byte"),
    ],
)
def test_zip_files_that_are_not_torchs(tmp_path: Path, ending: str, change: Callable[[bytes], Any], match: str) -> None:
    path = tmp_path / "x.bin"
    save({"a": torch.ones(30, 40)}, path)

    def each(name: str, data: bytes) -> Iterator[tuple[str, bytes, int]]:
        changed, method = change(data) if name.endswith(ending) else (data, zipfile.ZIP_STORED)
        if changed is not None:
            yield name, changed, method

    rezip(path, each)
    refused(path, match)


def test_entries_on_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    save({"a": torch.ones(8), "b": torch.zeros(8)}, path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    offsets = []
    while data[entry : entry + 4] == b"PK\x01\x02":
        lengths = struct.unpack_from("<3H", data, entry + 28)
        if bytes(data[entry + 46 : entry + 46 + lengths[0]]).endswith((b"data/0", b"data/1")):
            offsets.append(entry + 42)
        entry += 46 + sum(lengths)
    data[offsets[1] : offsets[1] + 4] = data[offsets[0] : offsets[0] + 4]
    path.write_bytes(data)
    refused(path, "on the same bytes")


@FORMATS
def test_cut_anywhere_or_changed_anywhere_it_is_refused_or_read_but_never_fails_otherwise(tmp_path: Path, zipped: bool) -> None:
    random = torch.Generator().manual_seed(11)
    path = tmp_path / "x.bin"
    save({"a": torch.ones(5, 4), "b": torch.ones(3).half()}, path, zipped=zipped)
    whole = path.read_bytes()
    for cut in torch.randint(0, len(whole), (40,), generator=random).tolist():
        path.write_bytes(whole[:cut])
        with pytest.raises(InvalidCheckpoint):
            find(path)
    for _ in range(400):
        data = bytearray(whole)
        for at in torch.randint(0, len(whole), (3,), generator=random).tolist():
            data[at] = int(torch.randint(0, 256, (1,), generator=random))
        path.write_bytes(data)
        try:
            found = find(path)
        except InvalidCheckpoint:
            continue
        assert all(tensor.offset_bytes + (tensor.size_bytes if tensor.strides is None else 0) <= len(whole) for tensor in found)


@pytest.mark.parametrize(
    ("pickled", "match"),
    [
        (b"\x80\x02}r\xff\xff\xff\xff.", "no file of torch.save"),  # a memo of four thousand million places
        (b"\x80\x02" + b"(" * 9 + b"K\x01" + b"t" * 9 + b"}\x85K\x01s.", "damaged"),
        (b"\x80\x02" + b")" + b"\x85" * 100_000 + b"}q\x00h\x00K\x01s.", "damaged"),
        (b"\x80\x02" + b"]" * 100_000 + b"Q.", "no storage"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f", "uses the opcode LONG4, which is not needed"),
        (b"\x80\x02\xff", "uses the opcode 0xff"),
        (b"cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "posix.system, which is never run"),
        (pickle.dumps(1 << 90, 2) * 2, "no file of torch.save"),
    ],
    ids=["memo", "tuples", "deep", "persistent", "long", "unknown", "call", "number"],
)
def test_pickles_that_aim_at_the_reader(tmp_path: Path, pickled: bytes, match: str) -> None:
    (tmp_path / "x.bin").write_bytes(pickled)
    refused(tmp_path / "x.bin", match)


def test_a_pickle_without_an_end_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "_MAX_STEPS", 40_000)
    (tmp_path / "x.bin").write_bytes(b"\x80\x02" + b"N" * 50_000)
    refused(tmp_path / "x.bin", "more than 40000 steps")


def test_the_old_format_with_a_count_that_lies(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    save({"a": torch.ones(8)}, path, zipped=False)
    data = io.BytesIO(path.read_bytes())
    data.seek(-40, io.SEEK_END)
    data.write(struct.pack("<Q", 1 << 62))
    path.write_bytes(data.getvalue())
    refused(path, "does not lie in it")
