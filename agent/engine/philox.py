"""Philox4x32-10, the counter-based generator that makes sampling noise a pure function of where a token stands.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); checked against Random123's known answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["philox4x32"]

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter (c0..c3) under its key (k0, k1).

    All are int64 tensors that hold 32-bit words; counters broadcast against each other, keys against the counters. A product
    wraps modulo 2^64, which leaves the bits of its high word right; they only have to be masked after the arithmetic shift.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)  # type: ignore[no-untyped-call]
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0 = (product_1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c1 = product_1.bitwise_and_(_MASK)
        c2 = (product_0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c3 = product_0.bitwise_and_(_MASK)
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3
