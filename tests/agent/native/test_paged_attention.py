from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from agent.native import paged_attention
from agent.native.paged_attention import BLOCK_TOKENS, MOST_HEAD_DIM, Job, Kind, Width

TYPES = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16, torch.float16: Kind.FLOAT16}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of an answer's own rounding: all before it is float32."""
pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(params=Width, ids=lambda width: width.name)
def width(request: pytest.FixtureRequest) -> Width:
    chosen: Width = request.param
    if chosen not in paged_attention.widths():
        pytest.skip("this processor has not the instructions")
    return chosen


@pytest.fixture(params=TYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@dataclass(frozen=True)
class Case:
    """Tokens at ``positions`` of sequences whose blocks lie scattered in ``layer``."""

    query: Tensor
    layer: Tensor
    tables: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    scale: float
    window: int = 0
    softcap: float = 0.0
    bias: Tensor | None = None
    sinks: Tensor | None = None

    def attend(self, width: Width, threads: int = 1) -> Tensor:
        tokens, heads, head_dim = self.query.shape
        kv_heads = self.layer.shape[2] // 2
        out = torch.full((tokens + 1, heads, head_dim), 7.0, dtype=self.query.dtype)
        job = Job(
            query=self.query.data_ptr(), layer=self.layer.data_ptr(), out=out.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            sinks=None if self.sinks is None else self.sinks.data_ptr(),
            tables=self.tables.ctypes.data, rows=self.rows.ctypes.data, positions=self.positions.ctypes.data,
            tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, query_stride=self.query.stride(0),
            table_stride=self.tables.shape[1], bias_stride=0 if self.bias is None else self.bias.shape[1],
            window=self.window, scale=self.scale, softcap=self.softcap, kind=TYPES[self.query.dtype],
        )  # fmt: skip
        before = self.layer.view(torch.uint8).clone()
        paged_attention.attend(job, width, threads)
        assert torch.equal(self.layer.view(torch.uint8), before)
        assert bool((out[tokens] == 7.0).all()), "it has written behind its answer"
        return out[:tokens]

    def of(self, *tokens: int) -> Case:
        chosen = list(tokens)
        return replace(self, query=self.query[chosen], rows=self.rows[chosen], positions=self.positions[chosen])

    def exact(self) -> Tensor:
        """By the definition, in float64."""
        kv_heads = self.layer.shape[2] // 2
        group = self.query.shape[1] // kv_heads
        answers = []
        for query, row, position in zip(self.query.double(), self.rows, self.positions, strict=True):
            first = max(0, position + 1 - self.window) if self.window else 0
            stored = self.layer[torch.from_numpy(self.tables[row])].flatten(0, 1)[first : position + 1].double()
            keys, values = (part.repeat_interleave(group, dim=1) for part in stored.split(kv_heads, dim=1))
            scores = torch.einsum("hd,thd->ht", query, keys) * self.scale
            if self.softcap:
                scores = torch.tanh(scores / self.softcap) * self.softcap
            if self.bias is not None:
                scores = scores + self.bias[:, first : position + 1].double()
            if self.sinks is not None:
                scores = torch.cat((scores, self.sinks.double().unsqueeze(1)), dim=1)
            weights = scores.softmax(dim=1)[:, : position + 1 - first]
            answers.append(torch.einsum("ht,thd->hd", weights, values))
        return torch.stack(answers)

    def check(self, width: Width, threads: int = 1) -> None:
        tolerance = TOLERANCE[self.query.dtype]
        torch.testing.assert_close(self.attend(width, threads).double(), self.exact(), rtol=tolerance, atol=tolerance)


def case(dtype: torch.dtype, lengths: list[int], heads: int = 4, kv_heads: int = 2, head_dim: int = 16) -> Case:
    torch.manual_seed(sum(lengths) + heads + head_dim)
    widest = -(-max(lengths) // BLOCK_TOKENS)
    blocks = torch.randperm(len(lengths) * widest).add(1).view(len(lengths), widest)
    layer = torch.randn(len(lengths) * widest + 1, BLOCK_TOKENS, 2 * kv_heads, head_dim).to(dtype)
    query = torch.randn(len(lengths), heads, head_dim).to(dtype)
    return Case(query, layer, blocks.numpy(), np.arange(len(lengths)), np.array(lengths) - 1, head_dim**-0.5)


LENGTHS = [1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 300]


@pytest.mark.parametrize("head_dim", [16, 32, 48, 80, 112, 128, MOST_HEAD_DIM])
def test_tokens_attend_to_what_their_tables_say(width: Width, dtype: torch.dtype, head_dim: int) -> None:
    case(dtype, LENGTHS, head_dim=head_dim).check(width)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1), (8, 1), (12, 4), (21, 3), (71, 1)])
def test_heads_share_kv_heads(width: Width, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    case(dtype, [140, 20, 3], heads, kv_heads).check(width)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 128, 299, 300, 1000])
def test_a_window_hides_what_lies_before_it(width: Width, dtype: torch.dtype, window: int) -> None:
    replace(case(dtype, LENGTHS), window=window).check(width)


def test_softcap_bias_and_sinks(width: Width, dtype: torch.dtype) -> None:
    plain = case(dtype, LENGTHS)
    bias = torch.randn(4, 304).to(dtype)
    sinks = torch.tensor([-3.0, 0.0, 2.0, 40.0])
    for softcap, use_bias, use_sinks, window in itertools.product((0.0, 0.7), (False, True), (False, True), (0, 20)):
        replace(
            plain, softcap=softcap, bias=bias if use_bias else None, sinks=sinks if use_sinks else None, window=window
        ).check(width)


def test_scores_that_lie_far_apart(width: Width, dtype: torch.dtype) -> None:
    """From tile to tile higher and lower ones come: what was summed before is brought to their measure."""
    for scale in (0.0, 3.0, -30.0, 100.0):
        replace(case(dtype, [700, 400, 1]), scale=scale).check(width)


def test_scores_of_minus_infinity_weigh_nothing(width: Width, dtype: torch.dtype) -> None:
    """Also where they fill whole tiles before the first score that is a number."""
    bias = torch.zeros(4, 304).to(dtype)
    bias[:2, :140] = -torch.inf
    bias[2, 150:] = -torch.inf
    replace(case(dtype, [300, 290]), bias=bias).check(width)


def test_of_a_prompt_each_token_sees_those_before_it(width: Width, dtype: torch.dtype) -> None:
    one = case(dtype, [40])
    query = torch.randn(40, 4, 16).to(dtype)
    replace(one, query=query, rows=np.zeros(40, dtype=np.int64), positions=np.arange(40)).check(width)


def test_a_token_has_the_same_bits_whatever_stands_beside_it(width: Width, dtype: torch.dtype) -> None:
    whole = case(dtype, LENGTHS, heads=10, kv_heads=2, head_dim=48)
    together = whole.attend(width)
    for token in range(len(LENGTHS)):
        assert torch.equal(whole.of(token).attend(width)[0], together[token])
    shuffled = [3, 9, 0, 10, 9]
    assert torch.equal(whole.of(*shuffled).attend(width), together[shuffled])


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_the_work(width: Width, dtype: torch.dtype, threads: int) -> None:
    for heads, kv_heads in ((4, 2), (1, 1), (18, 2)):
        whole = case(dtype, LENGTHS, heads, kv_heads)
        assert torch.equal(whole.attend(width, threads), whole.attend(width))
        assert torch.equal(whole.of(4).attend(width, threads), whole.of(4).attend(width))


def test_queries_stand_beside_what_was_made_with_them(width: Width, dtype: torch.dtype) -> None:
    whole = case(dtype, LENGTHS)
    beside = torch.randn(len(LENGTHS), 8, 16).to(dtype)
    beside[:, :4] = whole.query
    assert torch.equal(replace(whole, query=beside[:, :4]).attend(width), whole.attend(width))


def test_what_a_token_does_not_see_changes_no_bit(width: Width, dtype: torch.dtype) -> None:
    whole = replace(case(dtype, [100, 37]), window=20)
    before = whole.attend(width)
    seen = torch.zeros(whole.layer.shape[:2], dtype=torch.bool)
    for row, position in enumerate(whole.positions):
        for place in range(position - 19, position + 1):
            seen[whole.tables[row, place // BLOCK_TOKENS], place % BLOCK_TOKENS] = True
    whole.layer[~seen] = torch.nan
    assert torch.equal(whole.attend(width), before)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_no_number_stays_none(width: Width, dtype: torch.dtype, number: float, part: str) -> None:
    whole = case(dtype, [150, 20])
    if part == "query":
        whole.query[0, 2:, 5] = number
    else:
        whole.layer[whole.tables[0, 3], 4, 1 if part == "key" else 3, 5] = number
    answer = whole.attend(width).isfinite()
    assert bool(answer[1].all())
    assert bool(answer[0, :2].all())
    if part != "key":  # a score of minus infinity may hide a key
        assert not bool(answer[0, 2:].all())
    elif number is torch.nan:
        assert not bool(answer[0, 2:].any())
