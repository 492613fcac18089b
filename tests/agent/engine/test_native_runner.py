"""The native runner's ways to multiply: as rows, as columns, by one vector; over fused weights and over separate ones."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from agent.engine import attention_sdpa
from agent.engine.build import build_engine, can_follow
from agent.engine.dtypes import torch_dtype
from agent.engine.skeleton import build_skeleton
from agent.engine.weights import fused_view
from agent.store.index import TensorIndex, index_of
from schema.checkpoint import Manifest, Partition, TensorEntry
from tests.agent.engine.coming import ComingWeights
from tests.agent.engine.models import CONFIGS, kv_options, make_model, manifest_of, submit_of, tensors_of
from tests.agent.engine.test_determinism import record
from tests.agent.engine.test_engine import drive, prompts, reference


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in one memory, in their order: q, k, v and gate, up lie behind one another."""
    memory = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = memory.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_bfloat16_is_as_near_to_float32_in_every_way_to_multiply(name: str, count: int) -> None:
    model = make_model(name, dtype=torch.bfloat16)
    manifest = manifest_of(model, "BF16")
    tensors = fused(tensors_of(model))
    together = [tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert fused_view(together) is not None
    engine = build_engine(manifest, tensors, kv_options(manifest, 1024))
    seen = record(engine)
    submits = [submit_of(i + 1, prompt, 4) for i, prompt in enumerate(prompts()[:count])]
    outcome = drive(engine, submits)
    exact = make_model(name)
    exact.load_state_dict({key: tensor.float() for key, tensor in model.state_dict().items()})
    for submit in submits:
        tokens = [*submit.prompt, *outcome.tokens[submit.attempt]]
        with torch.inference_mode():
            wanted = exact(torch.tensor([tokens])).logits[0]
        for position in range(4):
            row = seen[submit.attempt, position].float()
            assert torch.cosine_similarity(row, wanted[len(submit.prompt) + position - 1], dim=0) > 0.998


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_first_step_reads_no_weight_before_it_has_come(dtype: str, deterministic: bool) -> None:
    model = make_model("qwen3", dtype=torch_dtype(dtype))
    manifest = manifest_of(model, dtype)
    options = msgspec.structs.replace(kv_options(manifest, 1024), deterministic=deterministic)
    right = tensors_of(model)
    submit = submit_of(1, prompts()[1], 6)
    wanted = drive(build_engine(manifest, right, options), [submit]).tokens

    coming = ComingWeights(model, dtype)
    engine = coming.engine(options)
    assert not coming.asked
    assert drive(engine, [submit]).tokens == wanted
    assert list(dict.fromkeys(coming.asked)) == list(range(manifest.kv.layers + 1))
    asked = len(coming.asked)
    assert drive(engine, [submit_of(2, prompts()[1], 6)]).tokens[2] == wanted[1]
    assert len(coming.asked) == asked, "what has come is not asked for again"


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_step_that_is_computed_again_waits_for_a_load_that_was_begun_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(name)
    submits = [submit_of(1, prompts()[1], 6), submit_of(2, prompts()[2], 6)]
    coming = ComingWeights(model)
    options = kv_options(coming.manifest, 1024)
    wanted = drive(build_engine(coming.manifest, tensors_of(model), options), submits).tokens
    come, failed = coming.await_layer, False

    def interrupted(layer: int) -> None:
        nonlocal failed
        if layer == 1 and not failed:
            failed = True
            coming.begin_anew()
            raise MemoryError("computed again, sequence by sequence")
        come(layer)

    monkeypatch.setattr(coming, "await_layer", interrupted)
    assert drive(coming.engine(options), submits).tokens == wanted
    assert failed


def test_waiting_for_weights_is_no_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes far on wherever a step waits for a layer. A second prompt has its turn in a later step."""
    model = make_model("qwen3")
    manifest = manifest_of(model)
    clocks = {name: getattr(time, name) for name in ("monotonic", "perf_counter")}
    ahead_s = 0.0
    coming = ComingWeights(model)
    come = coming.await_layer

    def slow(layer: int) -> None:
        nonlocal ahead_s
        come(layer)
        ahead_s += 1000.0
        if layer == 1 and ahead_s < 3000.0:
            raise MemoryError("computed again, sequence by sequence")

    for name, clock in clocks.items():
        monkeypatch.setattr(time, name, lambda clock=clock: clock() + ahead_s)
    monkeypatch.setattr(coming, "await_layer", slow)
    engine = coming.engine(kv_options(manifest, 1024), prefill_tokens=24)
    short, longer, longest = prompts()[1], prompts()[2], prompts()[4]
    cold = drive(engine, [submit_of(1, short, 2), submit_of(2, longest, 2), submit_of(3, longer, 2)]).ends
    warm = drive(engine, [submit_of(4, short, 2)]).ends
    for end in (*cold.values(), *warm.values()):
        timing = end.timing
        assert timing is not None
        assert timing.weights_s == pytest.approx(ahead_s if end.attempt in cold else 0.0, abs=500.0)
        assert 0 < timing.prefill_s < 500.0
        assert timing.first_token_s == pytest.approx(timing.queued_s + timing.weights_s + timing.prefill_s)
    assert 0 < engine.counts.prefill.total_s < 500.0


@pytest.mark.parametrize("model_type", ["llama", "seed_oss"])
def test_a_window_that_the_model_knows_nothing_of_is_not_applied(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the modules themselves: `generate` would crop its cache to the config's window, which no layer asks for."""
    config = {**CONFIGS["llama"], "model_type": model_type, "head_dim": 8, "sliding_window": 24}
    monkeypatch.setitem(CONFIGS, "stray", config)
    model = make_model("stray")
    manifest = manifest_of(model)
    submit = submit_of(1, prompts()[3], 6)
    outcome = drive(build_engine(manifest, tensors_of(model), kv_options(manifest, 1024)), [submit])
    tokens = list(submit.prompt)
    for _ in range(6):
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    assert outcome.tokens[1] == tokens[len(submit.prompt) :]


def listed(manifest: Manifest, names: list[str], dtype: str = "F32") -> tuple[Manifest, TensorIndex]:
    """A checkpoint of tensors of one size, in this order."""
    entries = tuple(
        TensorEntry(name, dtype, (64,), 0, at * 256, 256 if dtype == "F32" else 128) for at, name in enumerate(names)
    )
    whole = Partition("p0", 0, 4096, (0,))
    manifest = msgspec.structs.replace(manifest, tensors=entries, partitions=(whole,))
    return manifest, index_of(entries, manifest)


def test_only_what_reads_its_weights_in_their_order_follows_them() -> None:
    manifest = manifest_of(make_model("llama"))
    skeleton = build_skeleton(manifest)
    names = ["model.embed_tokens.weight", "model.layers.0.w", "model.layers.1.w", "model.norm.weight", "lm_head.weight"]
    assert can_follow(skeleton, *listed(manifest, names))
    assert not can_follow(skeleton, *listed(manifest, [*names[1:], names[0]])), "embeddings come last"
    assert not can_follow(skeleton, *listed(manifest, names[:2] + names[3:])), "layers are not known by their names"
    assert not can_follow(skeleton, *listed(manifest, names, "F16")), "weights are converted"
    other = manifest_of(make_model("gpt2"))
    assert can_follow(build_skeleton(other), *listed(other, [*names[1:], names[0]])), "modules wait for what they hold"
    assert not can_follow(build_skeleton(other), *listed(other, names, "F16"))


@pytest.mark.parametrize("together", [0, 1 << 20])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_chunks_attend_alike_by_head_and_with_their_heads_together(
    name: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_sdpa, "_ROWS_TOGETHER", together)
    model = make_model(name)
    manifest = manifest_of(model)
    prompt = [(3 * at * at + at) % 60 for at in range(90)]
    engine = build_engine(manifest, tensors_of(model), kv_options(manifest, 256), prefill_tokens=20)
    assert drive(engine, [submit_of(1, prompt, 12)]).tokens[1] == reference(model, prompt, 12)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gates_are_activated_where_they_lie(name: str) -> None:
    """transformers' SiLU is a class of its own, which takes new memory."""
    model = make_model(name)
    manifest = manifest_of(model)
    runner: Any = build_engine(manifest, tensors_of(model), kv_options(manifest, 256))._runner
    gate = torch.randn(3, 8)
    wanted = torch.nn.functional.silu(gate)
    assert runner._activation(gate) is gate
    assert torch.equal(gate, wanted)
