"""Biases and penalties against their definitions, one token at a time."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from agent.engine.adjust import adjusted
from agent.engine.counts import TokenCounts
from tests.agent.engine.rows import Row, row

VOCAB = 50


def _by_definition(logits: torch.Tensor, tokens: list[int], position: int, params: dict[str, Any]) -> list[float]:
    prompt, reply = tokens[: len(tokens) - position], tokens[len(tokens) - position :]
    biases = dict(params.get("logit_bias", ()))
    values = []
    for token, logit in enumerate(logits.float().tolist()):
        value = logit + biases.get(token, 0.0)
        if token in prompt or token in reply:
            factor = params.get("repetition_penalty", 1.0)
            value = value / factor if value > 0 else value * factor
        value -= params.get("frequency_penalty", 0.0) * reply.count(token)
        value -= params.get("presence_penalty", 0.0) * (token in reply)
        if position < params.get("min_tokens", 0) and token in params.get("stop_token_ids", ()):
            value = -math.inf
        values.append(value)
    return values


def _draw_params(rng: random.Random) -> dict[str, Any]:
    params: dict[str, Any] = {}
    if rng.random() < 0.5:
        params["logit_bias"] = tuple((token, rng.uniform(-9, 9)) for token in rng.sample(range(VOCAB), rng.randint(1, 8)))
    if rng.random() < 0.5:
        params["repetition_penalty"] = rng.uniform(0.5, 2)
    if rng.random() < 0.5:
        params["frequency_penalty"] = rng.uniform(-2, 2)
    if rng.random() < 0.5:
        params["presence_penalty"] = rng.uniform(-2, 2)
    if rng.random() < 0.3:
        params |= {"min_tokens": rng.randint(1, 20), "stop_token_ids": (3, 8, 3)}
    return params


def test_each_row_is_adjusted_as_defined_in_any_batch_and_after_any_history() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        size = rng.randint(1, 9)
        logits = torch.randn((size, VOCAB), generator=generator) * 4
        asked = [_draw_params(rng) for _ in range(size)]
        histories = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(size)]
        positions = [rng.randint(0, len(history) - 1) for history in histories]
        rows = [row(p, 0, h, **params) for p, h, params in zip(positions, histories, asked, strict=True)]
        together = adjusted(logits.clone(), rows)
        for at in range(size):
            alone = adjusted(logits[at : at + 1].clone(), [_grown(histories[at], positions[at], asked[at])])
            assert torch.equal(alone[0], together[at])
            expected = torch.tensor(_by_definition(logits[at], histories[at], positions[at], asked[at]))
            torch.testing.assert_close(together[at], expected, rtol=1e-5, atol=1e-5)


def _grown(history: list[int], position: int, params: dict[str, Any]) -> Row:
    """The same row, come to by appending one token after another to one that was looked at from its start."""
    grown = row(0, 0, history[: len(history) - position], **params)
    assert grown.counts is grown.counts
    for token in history[len(history) - position :]:
        grown.append(token)
    return grown


def test_rows_that_ask_for_nothing_keep_their_logits_where_they_are() -> None:
    logits = torch.randn(2, VOCAB)
    assert adjusted(logits, [row(), row(temperature=0.3, top_p=0.5)]) is logits


def test_counts_grow_beyond_what_they_began_with() -> None:
    rng = random.Random(4)
    prompt, reply = ([rng.randrange(300) for _ in range(count)] for count in (90, 900))
    counts = TokenCounts(prompt, reply)
    times = dict(zip(counts.ids.tolist(), counts.times.tolist(), strict=True))
    assert times == {token: reply.count(token) for token in {*prompt, *reply}}
