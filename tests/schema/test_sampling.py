from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from schema.errors import InvalidInput
from schema.sampling import SamplingParams


def test_the_edges_of_every_range_are_taken() -> None:
    SamplingParams(max_tokens=1).check()
    SamplingParams(
        max_tokens=5, temperature=0.0, top_p=1e-9, top_k=0, min_p=1.0, seed=(1 << 63) - 1, repetition_penalty=0.01,
        presence_penalty=-2.0, frequency_penalty=2.0, logit_bias=((0, -100.0), (1, 100.0)), logprobs=20,
    ).check()  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("top_p", -1.0), ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", 1.1), ("min_p", math.nan), ("seed", 1 << 63), ("seed", -1), ("min_tokens", -1), ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf), ("presence_penalty", 2.1), ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1), ("frequency_penalty", math.nan), ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, math.nan),)), ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", tuple((token, 1.0) for token in range(1025))), ("logprobs", -1), ("logprobs", 21),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_by_name_but_decodes(name: str, value: Any) -> None:
    params = SamplingParams(**{"max_tokens": 5, name: value})
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    with pytest.raises(InvalidInput, match=name) as caught:
        read.check()
    assert caught.value.param == name


def test_log_probabilities_are_bounded_by_what_a_frame_holds() -> None:
    SamplingParams(max_tokens=49_932, logprobs=20).check()
    with pytest.raises(InvalidInput, match="at most 49932 tokens"):
        SamplingParams(max_tokens=49_933, logprobs=20).check()
