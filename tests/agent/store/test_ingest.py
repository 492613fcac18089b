"""Ingest of sound models: every byte in its place, once, and the text side normalised."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file
from tokenizers import Tokenizer

from agent.engine.image import image_tensors
from agent.engine.weights import fused_view
from agent.store import catalog
from agent.store.index import read_index
from agent.store.ingest.convert import LAYOUT, convert
from agent.store.ingest.order import execution_key
from agent.store.layers import Layers
from schema.checkpoint import ALIGN_BYTES, PAD_BYTES, Manifest
from tests.checkpoints import CHAT_TEMPLATE, make_llama_dir, make_tokenizer, write_safetensors


def ingest(source: Path, data: Path) -> tuple[Manifest, Path]:
    digest = convert(source, data / "checkpoints", data / "tmp", lambda done, total: None)
    assert list((data / "tmp").iterdir()) == []
    entry = catalog.scan(data / "checkpoints")[digest]
    return entry.manifest, entry.directory


def edit(path: Path, **values: Any) -> None:
    """Changes keys of a JSON file; None takes one out."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings |= values
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def stored(manifest: Manifest, directory: Path) -> dict[str, bytes]:
    image = b"".join((directory / partition.file).read_bytes() for partition in manifest.partitions)
    assert len(image) == manifest.image_bytes
    index = read_index(directory, manifest)
    return {name: image[start : start + size] for name, start, size in zip(index.names, index.starts, index.sizes, strict=True)}


def expected(source: Path) -> dict[str, bytes]:
    tensors: dict[str, bytes] = {}
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            tensors[name] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_byte_arrives(tmp_path: Path, shards: int, dtype: str) -> None:
    source = make_llama_dir(tmp_path / "m", shards=shards, dtype=dtype)
    manifest, directory = ingest(source, tmp_path)
    assert stored(manifest, directory) == expected(source)
    assert manifest.kv.dtype == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert (manifest.architecture, manifest.layout, manifest.ties) == ("LlamaForCausalLM", LAYOUT, {})
    assert (manifest.vocab_size, manifest.max_context_tokens) == (384, 512)
    assert (manifest.kv.layers, manifest.kv.kv_heads, manifest.kv.head_dim) == (2, 2, 16)
    assert manifest.parameters == sum(np.prod(tensor.shape) for tensor in load_file_all(source).values())


def load_file_all(source: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("vocab", [259, 260, 384, 1031])
@pytest.mark.parametrize("hidden", [8, 24, 64])
def test_odd_sizes_are_aligned_padded_and_summed(tmp_path: Path, hidden: int, vocab: int) -> None:
    source = make_llama_dir(tmp_path / "m", hidden=hidden, vocab=vocab, heads=2, kv_heads=1, dtype="bfloat16", layers=1)
    manifest, directory = ingest(source, tmp_path)
    assert stored(manifest, directory) == expected(source)
    index = read_index(directory, manifest)
    followers = ("k_proj.weight", "v_proj.weight", "up_proj.weight")
    for name, start in zip(index.names, index.starts, strict=True):
        assert start % (2 if name.endswith(followers) else ALIGN_BYTES) == 0
    (partition,) = manifest.partitions
    data = (directory / partition.file).read_bytes()
    assert len(data) == partition.size_bytes
    assert len(data) % PAD_BYTES == 0
    end = index.starts[-1] + index.sizes[-1]
    assert len(data) - end < PAD_BYTES
    assert not any(data[end:])


def test_checksums_over_several_chunks(tmp_path: Path) -> None:
    manifest, directory = ingest(make_llama_dir(tmp_path / "m", hidden=512, vocab=3001, heads=8), tmp_path)
    (partition,) = manifest.partitions
    data = (directory / partition.file).read_bytes()
    step = manifest.chunk_bytes
    assert partition.size_bytes > 3 * step
    assert partition.size_bytes % step
    assert partition.chunk_xxh3 == tuple(xxhash.xxh3_64_intdigest(data[at : at + step]) for at in range(0, len(data), step))
    assert stored(manifest, directory) == expected(tmp_path / "m")


def test_tied_head_is_stored_once_whether_it_was_there_or_not(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m", tie=True)
    manifest, directory = ingest(source, tmp_path)
    assert manifest.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    tensors: dict[str, Any] = {}
    names = {"float32": "F32"}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors[name] = (names["float32"], tuple(tensor.shape), tensor.numpy().tobytes())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_safetensors(source / "model.safetensors", tensors)
    again, _ = ingest(source, tmp_path)
    assert again == manifest
    dtype, shape, data = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = (dtype, shape, data[:-4] + b"\0\0\0\0")
    write_safetensors(source / "model.safetensors", tensors)
    untied, directory = ingest(source, tmp_path)
    assert untied.ties == {}
    assert untied.digest != manifest.digest
    assert stored(untied, directory) == expected(source)


def test_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    one, _ = ingest(make_llama_dir(tmp_path / "a"), tmp_path / "1")
    sharded, _ = ingest(make_llama_dir(tmp_path / "b", shards=4), tmp_path / "2")
    tuned, _ = ingest(make_llama_dir(tmp_path / "c", seed=1), tmp_path / "3")
    longer, _ = ingest(make_llama_dir(tmp_path / "d", context=1024), tmp_path / "4")
    assert one == sharded
    assert len({one.digest, tuned.digest, longer.digest}) == 3


def test_the_same_weights_with_another_text_side_are_another_checkpoint(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m")
    plain, _ = ingest(source, tmp_path)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    templated, directory = ingest(source, tmp_path)
    assert (directory / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    (source / "generation_config.json").write_text('{"temperature": 0.25}')
    cooler, _ = ingest(source, tmp_path)
    assert cooler.text.temperature == 0.25
    assert len({plain.digest, templated.digest, cooler.digest}) == 3
    assert plain.partitions == templated.partitions == cooler.partitions


def test_what_is_there_is_not_rewritten_unless_it_is_bad(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m")
    _, directory = ingest(source, tmp_path)

    def inodes() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in directory.iterdir()}

    before = inodes()
    ingest(source, tmp_path)
    assert inodes() == before
    catalog.quarantine(directory, "a chunk was wrong")
    ingest(source, tmp_path)
    assert catalog.quarantine_reason(directory) is None
    assert inodes() != before
    (directory / "partition_0.bin").write_bytes(b"short")
    manifest, _ = ingest(source, tmp_path)
    assert stored(manifest, directory) == expected(source)


def test_execution_order() -> None:
    layer = [
        "input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
        "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias", "self_attn.k_norm.weight",
        "self_attn.q_norm.weight", "self_attn.o_proj.weight", "post_attention_layernorm.weight", "mlp.gate.weight",
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    ]  # fmt: skip
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{number}.{name}" for number in (0, 2, 10) for name in layer),
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert sorted(sorted(names), key=execution_key) == names


def test_text_side(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m")
    manifest, directory = ingest(source, tmp_path)
    text = manifest.text
    assert (text.stop_token_ids, text.has_template) == ((1,), True)
    assert (text.temperature, text.top_p, text.top_k) == (0.7, 0.95, 40)
    assert text.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert (directory / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    for asset in manifest.assets:
        data = (directory / asset.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (asset.size_bytes, asset.sha256)
    words = "Hello, é 世界"
    assert Tokenizer.from_file(str(directory / "tokenizer.json")).encode(words).ids == make_tokenizer(384).encode(words).ids


def test_text_defaults_from_every_place(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m", eos=False)
    bare, _ = ingest(source, tmp_path / "0")
    assert bare.text.stop_token_ids == ()
    edit(source / "tokenizer_config.json", eos_token={"content": "<|end|>", "lstrip": False}, chat_template=None)
    named, _ = ingest(source, tmp_path / "1")
    assert (named.text.stop_token_ids, named.text.has_template) == ((1,), False)
    assert [asset.file for asset in named.text_assets] == ["tokenizer.json"]
    templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ yes }}"}]
    edit(source / "tokenizer_config.json", chat_template=templates)
    edit(source / "generation_config.json", eos_token_id=[2, 1, 5000, -1], temperature=None, min_p=0.05, repetition_penalty=1.1)
    listed, directory = ingest(source, tmp_path / "2")
    assert listed.text.stop_token_ids == (2, 1)
    assert listed.text.temperature is None
    assert (listed.text.min_p, listed.text.repetition_penalty) == (0.05, 1.1)
    assert (directory / "chat_template.jinja").read_text() == "{{ yes }}"
    (source / "chat_template.jinja").write_text("{{ file }}")
    (source / "generation_config.json").unlink()
    edit(source / "config.json", eos_token_id=2)
    _, directory = ingest(source, tmp_path / "3")
    assert (directory / "chat_template.jinja").read_text() == "{{ file }}"


def test_tokenizer_without_json_is_converted(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    (source / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    edit(source / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    _, directory = ingest(source, tmp_path)
    words = "The store reads a checkpoint"
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(words, add_special_tokens=False).ids
    assert ids == make_tokenizer(384).encode(words).ids


def test_removed_checkpoint_is_gone(tmp_path: Path) -> None:
    manifest, _ = ingest(make_llama_dir(tmp_path / "m"), tmp_path)
    catalog.remove(catalog.scan(tmp_path / "checkpoints")[manifest.digest])
    assert catalog.scan(tmp_path / "checkpoints") == {}
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_unreadable_entries_are_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest, directory = ingest(make_llama_dir(tmp_path / "m"), tmp_path)
    other = tmp_path / "checkpoints" / ("0" * 64) / LAYOUT
    other.mkdir(parents=True)
    (other / "manifest.json").write_bytes((directory / "manifest.json").read_bytes())
    assert list(catalog.scan(tmp_path / "checkpoints")) == [manifest.digest]
    assert [str(other) in record.getMessage() for record in caplog.records] == [True]


def test_what_is_multiplied_together_is_one_view(tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "m", hidden=24, heads=2, kv_heads=1, dtype="bfloat16", layers=2)
    manifest, directory = ingest(source, tmp_path)
    image = b"".join((directory / partition.file).read_bytes() for partition in manifest.partitions)
    tensors = image_tensors(read_index(directory, manifest), image)
    assert list(manifest.layer_ends) == sorted(manifest.layer_ends)
    assert len(Layers(manifest)) == 2
    assert [Layers(manifest).usable(end) for end in (0, manifest.layer_ends[0], manifest.image_bytes)] == [0, 1, 2]
    for layer in range(2):
        for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            group = [tensors[f"model.layers.{layer}.{part}.weight"] for part in parts]
            fused = fused_view(group)
            assert fused is not None
            assert torch.equal(fused, torch.cat(group))
