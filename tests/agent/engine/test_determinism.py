"""Deterministic models: the same bits whatever the batch, the chunks and the attempt, also in bfloat16."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from agent.engine.build import build_engine
from agent.engine.engine import BatchEngine
from agent.engine.invariant import RowInvariant
from schema.errors import InvalidCheckpoint
from tests.agent.engine.models import VOCAB, kv_options, make_model, manifest_of, submit_of, tensors_of
from tests.agent.engine.test_engine import drive
from tests.examples import sampled

NEW = 14
REQUESTS = 10
KINDS = ("llama", "qwen3", "mistral-window", "opt", "falcon", "falcon-alibi", "gpt2", "gemma2", "mixtral", "gpt_oss")


def deterministic(model: Any, dtype: str, tokens: int, prefill_tokens: int) -> BatchEngine:
    manifest = manifest_of(model, dtype)
    options = msgspec.structs.replace(kv_options(manifest, tokens), deterministic=True)
    return build_engine(manifest, tensors_of(model), options, prefill_tokens=prefill_tokens)


def record(engine: BatchEngine) -> dict[tuple[int, int], Tensor]:
    """Every row of logits by attempt and position, as they come."""
    seen: dict[tuple[int, int], Tensor] = {}
    runner: Any = engine._runner
    forward = runner.forward

    def watched(plan: Any) -> Any:
        logits, sequences, others = forward(plan)
        for row, sequence in zip(logits, [*sequences, *others], strict=True):
            seen[sequence.attempt, sequence.position] = row.clone()
        return logits, sequences, others

    runner.forward = watched
    return seen


def diverged(model: Any, dtype: str, dice: random.Random) -> list[tuple[int, int]]:
    """Requests and positions at which logits are other bits, or requests (at -1) that give other tokens, once they are stopped
    at random and resumed in an engine with less memory, smaller chunks and another order."""
    prompts = [[dice.randrange(VOCAB) for _ in range(dice.randrange(1, 48))] for _ in range(REQUESTS)]
    params: list[dict[str, Any]] = [{"temperature": 0.9 * (i % 2), "seed": i, "top_p": 0.95} for i in range(REQUESTS)]
    engine = deterministic(model, dtype, 1024, 512)
    bits = record(engine)
    whole = drive(engine, [submit_of(i + 1, prompts[i], NEW, **params[i]) for i in range(REQUESTS)]).tokens
    other = deterministic(model, dtype, 160, 20)
    resumed_bits = record(other)
    stops = [dice.randrange(NEW) for _ in range(REQUESTS)]
    again = [submit_of(i + 1, prompts[i], NEW, whole[i + 1][: stops[i]], **params[i]) for i in reversed(range(REQUESTS))]
    resumed = drive(other, again).tokens
    assert len(resumed_bits) > REQUESTS
    return [(request, -1) for request in whole if resumed[request] != whole[request]] + [
        place for place, row in resumed_bits.items() if not torch.equal(row, bits[place])
    ]


@pytest.mark.usefixtures("attends")
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", sampled(KINDS, "llama", "mistral-window", "falcon-alibi"))
def test_stopped_and_resumed_elsewhere_the_bits_are_the_same(name: str, dtype: str) -> None:
    model = make_model(name, dtype=torch.float32 if dtype == "F32" else torch.bfloat16)
    seed = random.randrange(1 << 30)
    print("seed", seed)
    assert not diverged(model, dtype, random.Random(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 33, 576, 1024])
def test_what_passes_reduces_each_row_by_itself(width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(130, width, dtype=dtype, generator=torch.Generator().manual_seed(width))
    weight = torch.ones(width, dtype=dtype)
    reductions = (
        lambda x: x.float().pow(2).mean(-1),
        lambda x: x.sum(-1),
        lambda x: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32),
        lambda x: layer_norm(x, (width,), weight, weight),
        lambda x: rms_norm(x, (width,), weight, 1e-5),
        lambda x: x.float().rsqrt(),
        lambda x: x.topk(3).values,
    )
    for index, reduce in enumerate(reductions):
        whole = reduce(rows)
        for at in (0, 1, 64, 129):
            assert torch.equal(reduce(rows[at : at + 1])[0].nan_to_num(), whole[at].nan_to_num()), index


@pytest.mark.parametrize("width", [3, 33, 100])
def test_half_precision_rounds_a_row_as_it_does_among_others(width: int) -> None:
    rows = torch.rand(70, width, generator=torch.Generator().manual_seed(width)).mul_(5).add_(0.1).bfloat16()
    functions = (
        torch.rsqrt,
        lambda x: x.clone().rsqrt_(),
        lambda x: torch.add(x, x * 3, alpha=0.3),
        lambda x: torch.sub(x, x * 3, alpha=0.3),
    )
    for index, function in enumerate(functions):
        with RowInvariant():
            whole, alone = function(rows), [function(rows[at : at + 1])[0] for at in range(len(rows))]
        assert torch.equal(whole, torch.stack(alone)), index


def test_what_is_not_known_to_be_invariant_is_refused_by_name() -> None:
    with RowInvariant(), pytest.raises(InvalidCheckpoint, match="cumsum"):
        torch.ones(3).cumsum(0)
    with RowInvariant(), pytest.raises(InvalidCheckpoint, match="softmax"):
        torch.ones(3, 3).softmax(dim=0)
    with RowInvariant(), pytest.raises(InvalidCheckpoint, match="mean"):
        torch.ones(3, 3).mean(0)
    with RowInvariant(), pytest.raises(InvalidCheckpoint, match="max"):
        torch.ones(3, 3).max()
    with RowInvariant():
        assert torch.ones(3, 3).sum([1]).tolist() == torch.ones(3, 3).max(dim=-1).values.mul(3).tolist()
        assert torch.ones(3, 3, dtype=torch.long).sum((0, 1)) == 9
    with RowInvariant(), pytest.raises(InvalidCheckpoint, match="outside of attention"):
        torch.ones(2, 3, 3) @ torch.ones(2, 3, 3)
