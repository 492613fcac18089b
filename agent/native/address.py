"""Where memory lies in this process."""

from __future__ import annotations

import ctypes

__all__ = ["address_of"]


def address_of(memory: memoryview) -> int:
    """Where writable memory begins. The caller keeps it alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
