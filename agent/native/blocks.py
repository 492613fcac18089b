"""Memory for direct reads and writes, of huge pages where the system gives them.

The kernel pins every page of a direct transfer and hands the disk each run of adjacent ones. A block of 4 MiB is two runs of
huge pages, or a thousand of small ones, which here cost three to six times the processor time and up to half of the bandwidth.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Final

from agent.native.address import address_of

__all__ = ["block_memory"]

_HUGE_BYTES: Final = 2 << 20


def block_memory(size_bytes: int, *, huge: bool = True) -> memoryview:
    """Private memory that begins at a huge page, and is unmapped with the last view of it. ``huge`` False: of small pages."""
    area = mmap.mmap(-1, size_bytes + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    view = memoryview(area)
    start = -address_of(view) % _HUGE_BYTES
    return view[start : start + size_bytes]
