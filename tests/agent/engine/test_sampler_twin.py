"""The sampler against a twin that follows the definitions one row at a time, under any parameters together."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agent.engine.philox import philox4x32
from agent.engine.sampler import gumbel, sample
from schema.sampling import SamplingParams
from tests.agent.engine.rows import Row, row

_LEAST = 5e-324
_RANGES: dict[str, list[Any]] = {
    "top_p": [0.0, _LEAST, 1e-9, 0.5, 0.999, 1 - 1e-16],
    "min_p": [_LEAST, 1e-9, 0.05, 1.0],
    "repetition_penalty": [0.01, 1.3, 100.0],
    "presence_penalty": [-2.0, 0.5],
    "frequency_penalty": [-2.0, 2.0],
    "min_tokens": [1, 9],
}


def _noise(params: SamplingParams, each: Row, size: int) -> NDArray[np.float64]:
    blocks = torch.arange(-(-size // 4))
    zero = torch.zeros_like(blocks)
    low, high = torch.tensor(params.seed & 0xFFFFFFFF), torch.tensor(params.seed >> 32)
    words = philox4x32(zero + each.position, blocks, zero + each.choice, zero, low, high)
    return gumbel(torch.stack(words, dim=1).flatten()[:size]).numpy()


def _wanted(logits: NDArray[np.float32], each: Row) -> NDArray[np.float32]:
    """Biases, penalties, and no end yet."""
    params, tokens = each.params, each.tokens
    wanted = logits.copy()
    for token, bias in params.logit_bias:
        wanted[token] += np.float32(bias)
    reply = tokens[len(tokens) - each.position :]
    penalty = np.float32(params.repetition_penalty)
    for token in set(tokens) if penalty != 1 else ():
        wanted[token] = wanted[token] / penalty if wanted[token] > 0 else wanted[token] * penalty
    for token in set(reply):
        wanted[token] -= np.float32(reply.count(token) * params.frequency_penalty + params.presence_penalty)
    if each.position < params.min_tokens:
        wanted[list(params.stop_token_ids)] = -np.inf
    return wanted


def _twin(logits: NDArray[np.float32], each: Row) -> int | None:
    """The token; None where rounding alone decides what top_p keeps."""
    params, wanted = each.params, _wanted(logits, each)
    if not params.temperature:
        return int(wanted.argmax())
    with np.errstate(over="ignore"):
        scores = (wanted.astype(np.float64) - wanted.max()) / params.temperature
    kept = scores >= (math.log(params.min_p) - 1e-7 if params.min_p else -np.inf)
    if params.top_k:
        kept &= wanted >= np.sort(wanted)[::-1][min(params.top_k, len(wanted)) - 1]
    if params.top_p < 1:
        values, weights = np.sort(wanted[kept])[::-1], np.sort(np.exp(scores[kept]))[::-1]
        before = np.cumsum(weights) - weights
        share = params.top_p * weights.sum()
        if (abs(before - share)[1:] < 1e-9 * weights.sum()).any():
            return None
        kept &= wanted >= values[max(0, int((before < share).sum()) - 1)]
    return int(np.where(kept, scores + _noise(params, each, len(wanted)), -np.inf).argmax())


def test_any_parameters_together_draw_what_their_definitions_say() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    dice = random.Random(seed)
    compared = 0
    for _ in range(80):
        size, count = dice.choice([1, 2, 33, 193, 1500]), dice.randint(1, 6)
        logits = torch.randn(count, size, generator=torch.Generator().manual_seed(dice.randrange(1 << 30)))
        logits = logits * dice.choice([0.1, 1, 8, 50])
        logits = dice.choice([logits, logits.round(), logits.bfloat16()])
        rows = []
        for _ in range(count):
            chosen = {name: dice.choice(values) for name, values in _RANGES.items() if dice.random() < 0.3}
            chosen["temperature"] = dice.choice([0, _LEAST, 1e-3, 0.7, 1, 100.0])
            chosen["top_k"] = dice.choice([0, 0, 1, 7, size, (1 << 31) - 1])
            chosen["seed"] = dice.randrange(1 << 63)
            chosen["logit_bias"] = tuple(
                (token, dice.choice([-100.0, 3.0, 100.0]))
                for token in dice.sample(range(size), min(size, 3) * dice.randint(0, 1))
            )
            chosen["stop_token_ids"] = tuple(dice.sample(range(size), min(size - 1, 20)))
            tokens = [dice.randrange(size) for _ in range(dice.randint(1, 30))]
            each = row(dice.randrange(len(tokens)), dice.choice([0, 9]), tokens, **chosen)
            each.params.check()
            rows.append(each)
        drawn = sample(logits.clone(), rows)
        for at, each in enumerate(rows):
            twin = _twin(logits[at].float().numpy(), each)
            assert twin in (None, drawn[at]), each.params
            compared += twin is not None
    assert compared > 100
