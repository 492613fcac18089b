"""The native runner's ways to multiply: as rows, as columns, by one vector; over fused weights and over separate ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agent.engine.build import build_engine
from agent.engine.weights import fused_view
from tests.agent.engine.models import kv_options, make_model, manifest_of, submit_of, tensors_of
from tests.agent.engine.test_determinism import record
from tests.agent.engine.test_engine import drive, prompts


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
