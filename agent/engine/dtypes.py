"""The safetensors format's names of numeric types, as torch's."""

from __future__ import annotations

from typing import Final

import torch

from schema.errors import InvalidCheckpoint

__all__ = ["torch_dtype"]

_DTYPES: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a manifest's dtype. Raises InvalidCheckpoint for an unknown one."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise InvalidCheckpoint(f"numeric type {name!r} is not known") from None
