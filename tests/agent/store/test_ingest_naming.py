"""Ingest of models as transformers saves them: under older names than the model's, and each expert by itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from agent.engine.skeleton import build_skeleton
from agent.engine.weights import attach
from agent.store.ingest.convert import convert
from agent.store.ingest.files import SourceDirectory
from agent.store.ingest.headers import Sources, parse_json
from agent.store.ingest.model import check_runnable, read_facts
from schema.errors import InvalidCheckpoint
from tests.agent.engine.models import CONFIGS, VOCAB, make_model
from tests.agent.store.test_ingest import ingest, stored
from tests.examples import sampled


def save(model: Any, path: Path) -> Path:
    """A model directory as `save_pretrained` writes it, with a tokenizer of as many words as the model has."""
    model.save_pretrained(path)
    words = models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0")
    Tokenizer(words).save(str(path / "tokenizer.json"))
    return path


def strange(model: Any, directory: Path) -> list[str]:
    """What is not as the model has it once it was saved and ingested in a directory."""
    found = stored(*ingest(save(model, directory / "m"), directory))
    state = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    names = {each: (each, prefix + each, each.removeprefix(prefix)) for each in found}
    meant = {each: next((state[name] for name in names[each] if name in state), None) for each in found}
    wrong = [each for each, tensor in meant.items() if tensor is None or found[each] != tensor.contiguous().numpy().tobytes()]
    there = {tensor.data_ptr() for tensor in meant.values() if tensor is not None}
    return wrong + [name for name, tensor in state.items() if tensor.data_ptr() not in there]


@pytest.mark.parametrize("name", sampled(CONFIGS, "mixtral", "qwen3_moe", "gpt_neox"))
def test_what_transformers_saves_becomes_what_its_model_has(name: str, tmp_path: Path) -> None:
    assert not strange(make_model(name), tmp_path)


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("llama", {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("qwen3", {"model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(8, 4)}),
        ("opt", {"decoder.version": torch.tensor([3.0])}),
        ("falcon", {"transformer.h.0.self_attention.rotary_emb.inv_freq": torch.ones(4)}),
        ("gpt2", {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}),
        ("gpt_neo", {"transformer.h.0.attn.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}),
        ("gpt_neo", {"h.1.attn.attention.masked_bias": torch.tensor(-1e9)}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}),
    ],
)
def test_constants_that_were_once_saved_with_the_weights_are_left_out(
    name: str, constants: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = make_model(name)
    source = save(model, tmp_path / "m")
    manifest, _ = ingest(source, tmp_path)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | constants, source / "model.safetensors")
    again, directory = ingest(source, tmp_path)
    assert again.digest == manifest.digest
    assert not stored(again, directory).keys() & constants.keys()
    skeleton = build_skeleton(again)
    attach(skeleton, again, model.state_dict() | constants, "cpu")  # as a checkpoint has them that was ingested before
    meant = dict(model.named_buffers())
    assert all(torch.equal(buffer, meant[each]) for each, buffer in skeleton.named_buffers())


def test_experts_of_files_of_torch_save_are_put_together_too(tmp_path: Path) -> None:
    model = make_model("mixtral")
    source = save(model, tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    turned = {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    torch.save(turned, source / "pytorch_model.bin")
    found = stored(*ingest(source, tmp_path))
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        assert found[name] == model.state_dict()[name].contiguous().numpy().tobytes()


def test_any_part_of_what_is_put_together_can_be_read(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    dice = random.Random(seed)
    source = save(make_model("mixtral"), tmp_path / "m")
    with Sources(SourceDirectory(source)) as sources:
        config = parse_json((source / "config.json").read_bytes(), "config.json")
        tensors, _, _ = check_runnable(read_facts(config, sources.tensors), sources.tensors)
        tensor = tensors["model.layers.0.mlp.experts.gate_up_proj"]
        assert len(tensor.parts) == 8
        whole = sources.read(tensor, 0, tensor.size_bytes)
        for _ in range(100):
            start = dice.randint(0, tensor.size_bytes)
            size = dice.randint(0, tensor.size_bytes - start)
            assert sources.read(tensor, start, size) == whole[start : start + size]


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    tensors[name] = tensors[name][:-1].contiguous()


def _half(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    tensors[name] = tensors[name].half()


def _all_of_one(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("w1", "w2", "w3"):
        del tensors[f"model.layers.0.block_sparse_moe.experts.3.{part}.weight"]


def _twice(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    tensors[name.replace(".2.", ".02.")] = tensors[name].clone()


def _whole_too(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 64, 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, r"experts\.2\.w3\.weight' is missing"),
        (_narrow, r"experts\.2\.w3\.weight' is F32 \(63, 64\), which does not fit"),
        (_half, r"experts\.2\.w1\.weight' is F16"),
        (_all_of_one, r"experts\..*' has shape \(3, .*\); by config.json it has \(4, "),
        (_twice, r"experts\.0?2\.w1\.weight' is the model's"),
        (_whole_too, r"experts\.down_proj' is there whole and in parts"),
    ],
)
def test_experts_that_do_not_fit_together_are_refused_by_name(change: Any, said: str, tmp_path: Path) -> None:
    source = save(make_model("mixtral"), tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=said):
        ingest(source, tmp_path)


def test_parts_that_are_more_than_put_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(make_model("mixtral"), tmp_path / "m")
    real = conversion_mapping.get_model_conversion_mapping

    def turned(model: Any) -> Any:
        transforms = real(model)
        for each in transforms:
            if isinstance(each, WeightConverter):
                each.operations = [*each.operations, Transpose(1, 2)]
        return transforms

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", turned)
    with pytest.raises(InvalidCheckpoint, match=r"\('Transpose', None\)\], which this ingest does not do"):
        ingest(source, tmp_path)


@pytest.mark.parametrize(("name", "fits"), [("gpt_neox", True), ("mixtral", False)])
def test_in_place_names_may_differ_and_parts_must_not_lie_apart(name: str, fits: bool, tmp_path: Path) -> None:
    source = save(make_model(name), tmp_path / "m")

    def add(in_place: bool) -> str:
        return convert(source, tmp_path / "checkpoints", tmp_path / "tmp", lambda done, total: None, in_place=in_place)

    if fits:
        assert add(True) == add(False)
    else:
        with pytest.raises(InvalidCheckpoint, match=r"which cannot be loaded in place; have it copied"):
            add(True)
