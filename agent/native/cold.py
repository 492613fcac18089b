"""Makes files cold or warm, for measurements: the page cache is asked to forget or hold them, and mincore says what it did."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Final

__all__ = ["BLOCK_BYTES", "cached_fraction", "forget", "remember"]

BLOCK_BYTES: Final = 4 << 20
_READINGS: Final = 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def forget(path: Path) -> float:
    """Ask the kernel to drop a file's pages; returns the share that it kept all the same (pages that others map)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)  # pages that are not yet written are not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return cached_fraction(path)


def remember(path: Path) -> float:
    """Read a file into the page cache; returns the share that is there afterwards. A kernel that reclaims pages ahead of need
    may take some away meanwhile, so it is read up to three times."""
    share = 0.0
    for _ in range(_READINGS):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, BLOCK_BYTES) as block:
                offset = 0
                while count := os.preadv(descriptor, [block], offset):
                    offset += count
        finally:
            os.close(descriptor)
        if (share := cached_fraction(path)) == 1:
            break
    return share


def cached_fraction(path: Path) -> float:
    """The share of a file's pages that is in the page cache, by mincore. 0 for an empty file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size_bytes = os.fstat(descriptor).st_size
        if not size_bytes:
            return 0.0
        address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), f"cannot map {path}")
    finally:
        os.close(descriptor)
    pages = -(-size_bytes // mmap.PAGESIZE)
    present = ctypes.create_string_buffer(pages)
    try:
        if _libc.mincore(address, size_bytes, present):
            raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
    finally:
        _libc.munmap(address, size_bytes)
    return sum(byte & 1 for byte in present.raw) / pages
