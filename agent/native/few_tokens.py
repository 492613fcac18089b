"""Products of few tokens with 16-bit weights as they lie in memory, by the compiled few_tokens.c.

Where it is not compiled, or the processor has none of its instructions, `ways` is empty and torch multiplies, which takes
longer.
"""

from __future__ import annotations

import enum
from typing import Final

from agent.native.compiled import library

__all__ = ["STEP", "Way", "multiply", "ways"]

STEP: Final = 32
"""What the number of inputs must be a multiple of."""


class Way(enum.IntFlag):
    """How it multiplies: bfloat16 with bfloat16 tokens by their own instruction (AVX-512), or bfloat16 and float16 with float32
    tokens (AVX2). Sums are float32."""

    DOT = 1
    BFLOAT16 = 2
    FLOAT16 = 4


def ways() -> Way:
    """The ways that this processor has; none where there is no `library`."""
    compiled = library()
    return Way(0 if compiled is None else compiled.sllm_few_tokens_ways())


def multiply(
    way: Way, weights: int, outputs: int, inputs: int, x: int, tokens: int, out: int, stride: int, *, adds: bool, threads: int
) -> None:
    """x W^T, written to ``out``, or added to what is there (``adds``), rounded once.

    All are addresses: of ``weights`` [outputs, inputs], of ``x`` [tokens, inputs], and of ``out``, whose tokens lie ``stride``
    numbers apart. ``way`` must be among `ways`, and says the types of weights, out and x; ``inputs`` is not 0.
    Nothing is checked.
    """
    compiled = library()
    assert compiled is not None
    compiled.sllm_few_tokens(way, weights, outputs, inputs, x, tokens, out, stride, adds, threads)
