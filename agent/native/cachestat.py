"""Whether a range of a file lies in the page cache, asked without touching it (cachestat, Linux 6.5)."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
from typing import Final

__all__ = ["cached_pages"]

_CACHESTAT: Final = 451  # the same on every architecture
_RANGE = struct.Struct("=QQ")
_STAT = struct.Struct("=5Q")  # cached, dirty, under writeback, evicted, recently evicted: pages

_libc = ctypes.CDLL(None, use_errno=True)
_cachestat = ctypes.CFUNCTYPE(
    ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, use_errno=True
)(("syscall", _libc))


class _Buffers(threading.local):
    """Of each thread its own: this is called for every block."""

    def __init__(self) -> None:
        self.wanted = ctypes.create_string_buffer(_RANGE.size)
        self.found = ctypes.create_string_buffer(_STAT.size)
        self.wanted_at, self.found_at = ctypes.addressof(self.wanted), ctypes.addressof(self.found)


_buffers = _Buffers()


def cached_pages(descriptor: int, offset: int, length: int) -> tuple[int, int]:
    """How many pages of a range are in the page cache, and how many it has.

    Raises OSError: ENOSYS from older kernels, EPERM for files of others, EOPNOTSUPP for some file systems.
    """
    buffers = _buffers
    _RANGE.pack_into(buffers.wanted, 0, offset, length)
    if _cachestat(_CACHESTAT, descriptor, buffers.wanted_at, buffers.found_at, 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    pages = -(-(offset + length) // mmap.PAGESIZE) - offset // mmap.PAGESIZE
    return _STAT.unpack_from(buffers.found)[0], pages
