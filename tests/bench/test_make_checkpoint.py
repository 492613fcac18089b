from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.make_checkpoint import ARCHITECTURES, make_checkpoint

TINY = [name for name in ARCHITECTURES if name.startswith("tiny-")]


def digests(directory: Path) -> dict[str, str]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                data = file.get_tensor(name).contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.parametrize("name", TINY)
def test_transformers_loads_every_tensor_of_a_tiny_checkpoint(tmp_path: Path, name: str) -> None:
    total = make_checkpoint(name, tmp_path / "model")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert total == sum(p.numel() * p.element_size() for p in model.parameters())
    assert str(model.dtype).removeprefix("torch.") == ARCHITECTURES[name]["dtype"]
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    make_checkpoint("tiny-qwen3", tmp_path / "a", seed=1)
    make_checkpoint("tiny-qwen3", tmp_path / "b", seed=1, shard_bytes=100_000)
    make_checkpoint("tiny-qwen3", tmp_path / "c", seed=2)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_shards_have_an_index_that_transformers_follows(tmp_path: Path) -> None:
    make_checkpoint("tiny-llama", tmp_path / "model", shard_bytes=200_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(digests(tmp_path / "model"))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]


def test_every_id_of_a_padded_vocabulary_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "padded", {**ARCHITECTURES["tiny-qwen3"], "vocab_size": 1500})
    make_checkpoint("padded", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode([1400, 1499]) == " w1400 w1499"
    text = "What is a cold start?"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        make_checkpoint("tiny-opt", tmp_path)


def test_the_large_shape_is_the_published_one() -> None:
    spec = ARCHITECTURES["qwen3-0.6b"]
    shape = [
        spec[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    ]
    assert shape == [1024, 28, 16, 8, 128]
    assert (spec["intermediate_size"], spec["vocab_size"], spec["tie_word_embeddings"]) == (3072, 151936, True)
