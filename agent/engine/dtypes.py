"""The safetensors format's names of numeric types, as torch's."""

from __future__ import annotations

from typing import Final

import torch

from schema.checkpoint import tensor_bytes
from schema.errors import InvalidCheckpoint

__all__ = ["PACKED", "packed_shape", "torch_dtype"]

_DTYPES: Final[dict[str, torch.dtype]] = {
    "F4": torch.float4_e2m1fn_x2, "F6_E2M3": torch.uint8, "F6_E3M2": torch.uint8,
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


PACKED: Final = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""Types of which several elements share bytes; torch shows them by `packed_shape`, those of 6 bits as bare bytes."""


def packed_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that torch has for a PACKED tensor, whose manifest counts elements.

    As in safetensors, the last dimension of F4 halves; where it is odd, and for F6, it is the bytes in a row.
    """
    if dtype == "F4" and shape and shape[-1] % 2 == 0:
        return (*shape[:-1], shape[-1] // 2)
    return (tensor_bytes(dtype, shape) or 0,)


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a manifest's dtype. Raises InvalidCheckpoint for an unknown one."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise InvalidCheckpoint(f"numeric type {name!r} is not known") from None
