"""Attention of single tokens over paged KV memory, read where it lies, by the compiled paged_attention.c.

Where it is not compiled, or the processor has none of its instructions, `widths` is empty and torch attends, over blocks that
are gathered first.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Final

from agent.native.compiled import library

__all__ = ["BLOCK_TOKENS", "HEAD_STEP", "MOST_HEAD_DIM", "Job", "Kind", "Width", "attend", "widths"]

BLOCK_TOKENS: Final = 16
"""Tokens of a block."""
HEAD_STEP: Final = 16
"""What the numbers of a head must be a multiple of."""
MOST_HEAD_DIM: Final = 512
"""Numbers of a head at most."""


class Width(enum.IntFlag):
    """How many numbers go at once: eight (AVX2) or sixteen (AVX-512)."""

    EIGHT = 1
    SIXTEEN = 2


class Kind(enum.IntEnum):
    """What queries, keys, values and the answer are made of. All is computed in float32."""

    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 4


class Job(ctypes.Structure):
    """``tokens`` tokens of one layer, each with ``heads`` queries, to attend as `agent.engine.attention.LayerAttention` says.

    Addresses: of ``query`` [tokens, heads, head_dim], its tokens ``query_stride`` numbers apart; of ``layer`` [blocks,
    BLOCK_TOKENS, 2 * kv_heads, head_dim], keys first; of ``out`` [tokens, heads, head_dim]; of 64-bit ``tables`` [rows,
    table_stride] of block numbers, ``rows`` and ``positions`` [tokens]: a token sees its table's tokens up to its position. A
    ``bias`` [heads, bias_stride], of the same kind, has whole blocks' numbers; ``sinks`` [heads] are float32; both may be None.
    """

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("layer", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("tokens", ctypes.c_long),
        ("heads", ctypes.c_long),
        ("kv_heads", ctypes.c_long),
        ("head_dim", ctypes.c_long),
        ("query_stride", ctypes.c_long),
        ("table_stride", ctypes.c_long),
        ("bias_stride", ctypes.c_long),
        ("window", ctypes.c_long),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("kind", ctypes.c_int),
    )


def widths() -> Width:
    """Those that this processor has; none where there is no `library`."""
    compiled = library()
    return Width(0 if compiled is None else compiled.sllm_attention_widths())


def attend(job: Job, width: Width, threads: int) -> None:
    """Do it. ``width`` must be among `widths`. Nothing is checked."""
    compiled = library()
    assert compiled is not None
    compiled.sllm_attend(ctypes.addressof(job), width, threads)
