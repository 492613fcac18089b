"""Sizes, rates and times as people write them: ``48 GB``, ``10 Gbps``, ``3 ms``."""

from __future__ import annotations

import math
import re

__all__ = ["read_bytes", "read_rate", "read_seconds"]

_NUMBER = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(.*?)\s*")
_THOUSANDS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARIES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_SIZES = {f"{prefix}B": float(factor) for prefix, factor in (_THOUSANDS | _BINARIES).items()} | {"": 1.0}
_RATES = (
    {f"{unit}/s": factor for unit, factor in _SIZES.items() if unit}
    | {f"{prefix}bps": factor / 8 for prefix, factor in _THOUSANDS.items()}
    | {f"{prefix}bit/s": factor / 8 for prefix, factor in _THOUSANDS.items()}
    | {"": 1.0}
)
_TIMES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}


def read_bytes(text: str) -> int | float:
    """Bytes of ``512 GiB``, ``48 GB`` or a plain number, whole if it is near a whole one. Raises ValueError."""
    return _whole(_read(text, _SIZES, "a size", "48 GB or 512 GiB"))


def read_rate(text: str) -> int | float:
    """Bytes per second of ``12 GB/s``, of ``10 Gbps`` (bits) or a plain number. Raises ValueError."""
    return _whole(_read(text, _RATES, "a rate", "12 GB/s or 10 Gbps"))


def read_seconds(text: str) -> float:
    """Seconds of ``3 ms``, ``2 h`` or a plain number. Raises ValueError."""
    return _read(text, _TIMES, "a time", "3 ms or 2 h")


def _read(text: str, units: dict[str, float], what: str, example: str) -> float:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not {what}; write a number with a unit, such as {example}")
    number, unit = match.groups()
    if unit not in units:
        known = ", ".join(name for name in units if name)
        raise ValueError(f"{text!r} is not {what}: the unit {unit!r} is none of {known}")
    value = float(number) * units[unit]
    if math.isinf(value):
        raise ValueError(f"{text!r} is beyond all measure")
    return value


def _whole(value: float) -> int | float:
    """Products such as 13.32 x 10**9 miss a whole number by rounding."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value
