"""Products of few tokens with 16-bit weights as they lie in memory, by the compiled few_tokens.c.

It is compiled where the package is built, on x86-64 and if there is gcc; where it is not, or the processor has none of its
instructions, `ways` is empty and torch multiplies, which takes longer.
"""

from __future__ import annotations

import ctypes
import enum
import sysconfig
from functools import cache
from pathlib import Path
from typing import Final

__all__ = ["STEP", "Way", "multiply", "ways"]

STEP: Final = 32
"""What the number of inputs must be a multiple of."""

_INTERFACE: Final = 1
"""Of the library, as few_tokens.c counts it."""
_BUILT: Final = Path(__file__).with_name(f"_few_tokens{sysconfig.get_config_var('EXT_SUFFIX')}")


class Way(enum.IntFlag):
    """How it multiplies: bfloat16 with bfloat16 tokens by their own instruction (AVX-512), or bfloat16 and float16 with float32
    tokens (AVX2). Sums are float32."""

    DOT = 1
    BFLOAT16 = 2
    FLOAT16 = 4


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_BUILT))
    except OSError:
        return None
    long, pointer = ctypes.c_long, ctypes.c_void_p
    library.sllm_few_tokens.argtypes = (
        ctypes.c_int, pointer, long, long, pointer, long, pointer, long, ctypes.c_int, ctypes.c_int,
    )  # fmt: skip
    library.sllm_few_tokens.restype = None
    return library


def ways() -> Way:
    """The ways that this processor has; none where nothing was compiled, or by another version. torch must have been imported:
    without the OpenMP library that it loads, whose threads share the work, there is none either."""
    library = _library()
    return Way(0 if library is None else library.sllm_few_tokens_ways(_INTERFACE))


def multiply(
    way: Way, weights: int, outputs: int, inputs: int, x: int, tokens: int, out: int, stride: int, *, adds: bool, threads: int
) -> None:
    """x W^T, written to ``out``, or added to what is there (``adds``), rounded once.

    All are addresses: of ``weights`` [outputs, inputs], of ``x`` [tokens, inputs], and of ``out``, whose tokens lie ``stride``
    numbers apart. ``way`` must be among `ways`, and says the types of weights, out and x; ``inputs`` is not 0.
    Nothing is checked.
    """
    library = _library()
    assert library is not None
    library.sllm_few_tokens(way, weights, outputs, inputs, x, tokens, out, stride, adds, threads)
