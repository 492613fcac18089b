"""Ingest of damaged and hostile models: each is refused by name, and nothing is left behind."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.engine.skeleton import build_skeleton
from agent.store.catalog import scan
from agent.store.ingest.convert import convert
from schema.errors import InvalidCheckpoint, NotFound, OutOfSpace, SllmError
from tests.checkpoints import framed_tokenizer, make_llama_dir

Header = dict[str, Any]


def ingest(source: Path, data: Path) -> str:
    return convert(source, data / "checkpoints", data / "tmp", lambda done, total: None)


def refused(source: Path, data: Path, match: str, error: type[SllmError] = InvalidCheckpoint) -> None:
    with pytest.raises(error, match=match):
        ingest(source, data)
    assert not (data / "checkpoints").exists()
    assert not (data / "tmp").exists() or list((data / "tmp").iterdir()) == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_llama_dir(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_llama_dir(tmp_path / "sharded", shards=2)


def read_header(file: Path) -> tuple[Header, bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def first(header: Header) -> Header:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def last(header: Header) -> Header:
    return list(header.values())[-1]


def overlap(header: Header) -> None:
    second = list(header.values())[2]
    begin, end = second["data_offsets"]
    second["data_offsets"] = [begin - 4, end - 4]


def beyond(header: Header) -> None:
    entry = last(header)
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = [begin + (1 << 40), end + (1 << 40)]


def mismatch(header: Header) -> None:
    first(header)["shape"][0] += 1


def overflow(header: Header) -> None:
    first(header)["shape"] = [1 << 40, 1 << 40, 1 << 40]


def too_large(header: Header) -> None:
    first(header)["shape"] = [1 << 70]


def negative(header: Header) -> None:
    first(header)["shape"] = [-384, -64]


def boolean(header: Header) -> None:
    first(header)["shape"] = [True, 384 * 64]


def reversed_extent(header: Header) -> None:
    first(header)["data_offsets"].reverse()


def unknown_dtype(header: Header) -> None:
    first(header)["dtype"] = "F7"


def no_dtype(header: Header) -> None:
    del first(header)["dtype"]


def many_dimensions(header: Header) -> None:
    first(header)["shape"] += [1] * 1000


def no_object(header: Header) -> None:
    header["extra"] = [1, 2]


def hole(header: Header) -> None:
    del header["model.norm.weight"]


def long_name(header: Header) -> None:
    header["x" * 5000] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def odd_name(header: Header) -> None:
    header["a\nb"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (overlap, "overlaps"),
        (beyond, "belong to nothing"),
        (mismatch, "does not make"),
        (overflow, "does not make"),
        (too_large, "no valid shape"),
        (negative, "no valid shape"),
        (boolean, "no valid shape"),
        (reversed_extent, "no valid data_offsets"),
        (unknown_dtype, "'F7', which is not known"),
        (no_dtype, "not described by"),
        (many_dimensions, "no valid shape"),
        (no_object, "not described by"),
        (hole, "belong to nothing"),
        (long_name, "too long or not printable"),
        (odd_name, "too long or not printable"),
    ],
)
def test_header_that_lies(source: Path, tmp_path: Path, damage: Callable[[Header], None], match: str) -> None:
    file = source / "model.safetensors"
    header, data = read_header(file)
    damage(header)
    write_header(file, json.dumps(header).encode(), data)
    refused(source, tmp_path, match)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"\xff\xfe", "not readable JSON"),
        (b"[1, 2]", "no JSON object"),
        (b"[" * 200_000, "not readable JSON"),
        (b'{"a":' * 100_000, "not readable JSON"),
        (b'{"a": NaN}', "not readable JSON"),
        (b'{"a": 1, "a": 2}', "a key is repeated"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable JSON"),
        (b"{}", "belong to nothing"),
    ],
)
def test_header_that_is_none(source: Path, tmp_path: Path, header: bytes, match: str) -> None:
    _, data = read_header(source / "model.safetensors")
    write_header(source / "model.safetensors", header, data)
    refused(source, tmp_path, match)


@pytest.mark.parametrize("length", [1 << 33, 1 << 63, (1 << 64) - 1])
def test_header_length_bomb(source: Path, tmp_path: Path, length: int) -> None:
    file = source / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused(source, tmp_path, f"announces a header of {length} bytes")


def test_header_length_bomb_in_a_sparse_file(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 32))
    os.truncate(file, 1 << 33)
    refused(source, tmp_path, "announces a header")


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1, -4096])
def test_truncated_file(source: Path, tmp_path: Path, size: int) -> None:
    file = source / "model.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    refused(source, tmp_path, "truncated|too few|announces")


def test_file_that_grew(source: Path, tmp_path: Path) -> None:
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused(source, tmp_path, "has bytes that belong to nothing")


@pytest.mark.parametrize(
    "name",
    [
        "../model/model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        ".hidden",
        "a\0b",
        "x" * 300,
        "~root",
    ],
)
def test_shard_name_that_climbs_out(sharded: Path, tmp_path: Path, source: Path, name: str) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(value))
    refused(sharded, tmp_path, "no plain file name")


@pytest.mark.parametrize("value", ["[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "{"])
def test_index_that_is_none(sharded: Path, tmp_path: Path, value: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(value)
    refused(sharded, tmp_path, "weight_map|no JSON object|not readable JSON|holds no tensors")


def test_missing_shard(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, tmp_path, "model-00002-of-00002.safetensors: No such file")


def test_tensor_in_two_shards(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "copy.safetensors")
    value["weight_map"]["another"] = "copy.safetensors"
    index.write_text(json.dumps(value))
    refused(sharded, tmp_path, "is in copy.safetensors and in model-00001-of-00002.safetensors")


def test_index_that_names_the_wrong_shard(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    files = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    name, file = next(iter(value["weight_map"].items()))
    value["weight_map"][name] = (files - {file}).pop()
    index.write_text(json.dumps(value))
    refused(sharded, tmp_path, "it is not")


def test_tensor_that_the_index_does_not_list(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    del value["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(value))
    refused(sharded, tmp_path, "does not list")


def test_what_is_no_model_directory_is_said_to_be_none(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    refused(source, tmp_path, "is no Hugging Face model directory: it has no config.json")


def test_a_directory_that_may_not_be_looked_into_is_not_said_to_lack_anything(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lstat = os.lstat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if Path(path).parent == source:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", refuse)
    refused(source, tmp_path, "cannot open .*/config.json: Permission denied")


def test_what_the_checkpoint_cannot_be_written_to_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(SllmError, match=f"ingesting .*: {tmp_path / 'checkpoints'}.*: (File exists|Not a directory)"):
        ingest(source, tmp_path)


def test_weights_that_no_index_names_are_named(sharded: Path, source: Path, tmp_path: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    refused(sharded, tmp_path, f"none of .*, and nothing says how to read {', '.join(shards)}$")
    (source / "model.safetensors").unlink()
    refused(source, tmp_path, r"pytorch_model\.bin\.index\.json$")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_link_that_leads_out(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).rename(tmp_path / "outside")
    (source / name).symlink_to(tmp_path / "outside")
    refused(source, tmp_path, "leads out of the model's directory")


def test_link_within_the_directory_is_followed(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "weights")
    (source / "model.safetensors").symlink_to("weights")
    assert ingest(source, tmp_path)


def test_hub_cache_snapshot_is_read_through_its_links(source: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    digest = ingest(snapshot, tmp_path)
    other = tmp_path / "hub" / "models--org--other"
    shutil.copytree(repo, other, symlinks=True)
    weights = other / "snapshots" / "abc" / "model.safetensors"
    target = (repo / "snapshots" / "abc" / "model.safetensors").resolve()
    weights.unlink()
    weights.symlink_to(target)
    with pytest.raises(InvalidCheckpoint, match="leads out"):
        ingest(other / "snapshots" / "abc", tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [digest]


def test_fifo_in_a_files_place_does_not_hang(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")
    refused(source, tmp_path, "no regular file")


def test_directory_in_a_files_place(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").mkdir()
    refused(source, tmp_path, "no regular file")


def test_no_such_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path, "is no directory", NotFound)
    refused(tmp_path / ("long" * 100), tmp_path, "is no directory", NotFound)


def test_pickled_weights(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path, r"pytorch_model\.bin: its magic number uses the opcode")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}, "model_type": "evil"}, r"'evil'.*own code \(auto_map\)"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}, "architectures": ["EvilForCausalLM"]}, r"Evil.*own code"),
        ({"architectures": ["BertModel"]}, "'BertModel' is no decoder"),
        ({"architectures": ["MadeUpForCausalLM"]}, "MadeUpForCausalLM"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": None}, "names no architecture"),
        ({"model_type": "madeup"}, "madeup"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "qwen3"}, "LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"num_hidden_layers": 10**9}, "layers; there are"),
        ({"num_hidden_layers": -1}, "not a sensible number"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"num_hidden_layers": 1}, "is none of LlamaForCausalLM's"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 128}, "has shape"),
        ({"vocab_size": 1 << 39}, "has shape"),
        ({"vocab_size": 385}, "has shape"),
        ({"max_position_embeddings": None}, "no max_position_embeddings"),
        ({"head_dim": 1 << 20}, "head_dim"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"eos_token_id": "end"}, "eos_token_id"),
        ({"num_labels": 1 << 24}, "over 512 MiB"),
        ({"pad_token_id": 1 << 31}, "cannot be built from its config: Padding_idx"),
    ],
)
def test_config_that_cannot_be_run(source: Path, tmp_path: Path, values: dict[str, Any], match: str) -> None:
    config = json.loads((source / "config.json").read_text()) | values
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").unlink()
    refused(source, tmp_path, match)


def test_code_of_a_model_that_transformers_has_itself_is_left_alone(source: Path, tmp_path: Path) -> None:
    """The hub's Falcon and Phi-3 name code of their own, though transformers has their classes."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}))
    (source / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    data = tmp_path / "data"
    for name in ("checkpoints", "tmp"):
        (data / name).mkdir(parents=True)
    digest = convert(source, data / "checkpoints", data / "tmp", lambda done, total: None)
    entry = scan(data / "checkpoints")[digest]
    build_skeleton(entry.manifest)
    assert not (tmp_path / "ran").exists()
    assert not list(entry.directory.glob("*.py"))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"{" * 100_000])
def test_config_that_is_none(source: Path, tmp_path: Path, data: bytes) -> None:
    (source / "config.json").write_bytes(data)
    refused(source, tmp_path, "config.json is")


def test_weights_that_cannot_be_run(source: Path, tmp_path: Path) -> None:
    header, data = read_header(source / "model.safetensors")
    for name, entry in header.items():
        if name != "__metadata__":
            entry["dtype"] = "I32"
    write_header(source / "model.safetensors", json.dumps(header).encode(), data)
    refused(source, tmp_path, "the weights are I32")


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is not readable"),
        ("tokenizer.json", None, "no tokenizer.json, and nothing"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Evil", null]}}', "auto_map"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is no text"),
        ("tokenizer_config.json", '{"chat_template": "\\ud800"}', "not readable JSON"),
        ("config.json", '{"half a character": "\\uDC00"}', "not readable JSON"),
        ("tokenizer_config.json", json.dumps({"chat_template": "x" * (1 << 20) + "y"}), "chat_template is no text"),
        ("chat_template.jinja", "x" * (1 << 20) + "y", "at most"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature"),
        ("generation_config.json", '{"temperature": -1}', "temperature"),
        ("generation_config.json", '{"top_p": 1.5}', "top_p"),
        ("generation_config.json", '{"top_k": -3}', "top_k"),
        ("generation_config.json", '{"repetition_penalty": 0}', "repetition_penalty"),
        ("generation_config.json", '{"eos_token_id": [1, "x"]}', "eos_token_id"),
    ],
)
def test_text_side_that_makes_no_sense(source: Path, tmp_path: Path, file: str, content: str | None, match: str) -> None:
    if content is None:
        (source / file).unlink()
    else:
        (source / file).write_text(content)
    refused(source, tmp_path, match)


@pytest.mark.parametrize(
    ("ids", "match"), [(None, "cannot frame a text"), ([384], "id 384, beyond"), ([4_000_000_000], "id 4000000000, beyond")]
)
def test_tokenizer_whose_frame_cannot_be(source: Path, tmp_path: Path, ids: list[int] | None, match: str) -> None:
    path = source / "tokenizer.json"
    path.write_text(framed_tokenizer(path.read_text(), ids))
    refused(source, tmp_path, match)


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(*mapped: bytes) -> dict[str, Any]:
    """A SentencePiece table that finds nothing, and these texts that it could put in place of what it finds."""
    data = (4).to_bytes(4, "little") + bytes(4) + b"".join(each + b"\0" for each in mapped)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("normalizer", [replace("aa", String="a")] * 9),
        ("normalizer", [replace("a" * 300, String="b")]),
        ("normalizer", [replace("aaaaaaa", Regex="z*"), replace("a" * 40, String="a")]),
        ("normalizer", [{"type": "Prepend", "prepend": "a" * 256}]),
        ("normalizer", [charsmap(b"a", b"b" * (64 * 257))]),
        ("normalizer", [{"type": "Sequence", "normalizers": [replace("a" * 20, String="a")]}, replace("a" * 20, String="a")]),
        ("decoder", [replace("aa", String="a")] * 9),
    ],
)
def test_a_tokenizer_that_would_fill_the_memory_of_who_reads_a_text(
    source: Path, tmp_path: Path, kind: str, steps: list[Any]
) -> None:
    path = source / "tokenizer.json"
    part = {"type": "Sequence", f"{kind}s": steps}
    path.write_text(json.dumps(json.loads(path.read_text()) | {kind: part}))
    refused(source, tmp_path, f"its {kind} may make a text .* times as long")


def test_replacements_as_tokenizers_of_today_have_them_are_taken(source: Path, tmp_path: Path) -> None:
    path = source / "tokenizer.json"
    steps = [
        {"type": "NFKD"}, replace('"', String="``"), replace('"', String="''"), charsmap(b"a", b"b" * 33),
        replace("\u2581", Regex=" {2,}"), {"type": "Prepend", "prepend": "\u2581"}, replace("\u2581", String=" "),
    ]  # fmt: skip
    decoder = [replace(" ", String="\u2581"), {"type": "ByteFallback"}, {"type": "Fuse"}]
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": decoder},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    convert(source, tmp_path / "checkpoints", tmp_path / "tmp", lambda done, total: None)


def test_tokenizer_that_cannot_be_converted(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"\x80\x04garbage")
    refused(source, tmp_path, "cannot be made a tokenizer.json")


def test_file_that_shrinks_while_it_is_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.store.ingest import convert as module

    real = module.read_text_side

    def shrink(*arguments: Any) -> Any:
        os.truncate(source / "model.safetensors", 4096)
        return real(*arguments)

    monkeypatch.setattr(module, "read_text_side", shrink)
    refused(source, tmp_path, "ended at byte 4096 while it was read")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    source = make_llama_dir(tmp_path / "m")

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(source, tmp_path, r"No space left on device; \S+ has \d+ free; free some", OutOfSpace)
