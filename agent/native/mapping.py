"""An image in the arena as one contiguous read-only range of a worker's address space."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from typing import Final

from agent.native.arena import HUGE_BYTES, merge_extents
from schema.errors import LinkError, OutOfSpace
from schema.link import Extent

__all__ = ["ImageMapping", "read_only"]

_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def read_only(descriptor: int) -> int:
    """Another descriptor of the same memory that can never be mapped for writing; the caller owns it."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


class ImageMapping:
    """The first ``image_bytes`` of the extents in order, mapped read-only and shared. The descriptor may be closed after.

    Raises LinkError for extents that are unaligned, leave the descriptor's memory or are shorter than the image, and
    OutOfSpace when the address space is used up.
    """

    def __init__(self, descriptor: int, extents: Sequence[Extent], image_bytes: int) -> None:
        self.image_bytes = image_bytes
        _cut(extents, image_bytes, os.fstat(descriptor).st_size)  # raises before anything is reserved
        # Aligned to huge pages, as chunks are in the arena, so that those can be mapped whole.
        self._reserved_bytes = -(-image_bytes // HUGE_BYTES) * HUGE_BYTES + HUGE_BYTES
        self._reserved = _map(None, self._reserved_bytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.address = -(-self._reserved // HUGE_BYTES) * HUGE_BYTES
        self._buffer: memoryview | None = None
        try:
            self.remap(descriptor, extents)
        except (LinkError, OutOfSpace):
            self.close()
            raise
        self._buffer = memoryview((ctypes.c_char * image_bytes).from_address(self.address)).cast("B").toreadonly()

    def remap(self, descriptor: int, extents: Sequence[Extent]) -> None:
        """Map these extents in the place of what is mapped, for an image that has come to lie elsewhere. Raises as the making
        does; after OutOfSpace it is not defined which memory is seen."""
        at = self.address
        # Without MAP_POPULATE: for 1.2 GB it would take 100 ms at once, where mapping takes 0.3 ms and the faults (64 KiB of
        # neighbours each) cost the first pass over the weights 80 ms, shared by its threads.
        for piece in _cut(extents, self.image_bytes, os.fstat(descriptor).st_size):
            _map(at, piece.size_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, piece.offset_bytes)
            at += piece.size_bytes

    @property
    def buffer(self) -> memoryview:
        """The image, read-only. Whoever holds it, or an array over it, must be gone before `close`."""
        if self._buffer is None:
            raise ValueError("the image is no longer mapped")
        return self._buffer

    def close(self) -> None:
        """Unmap the image; may be called again."""
        self._buffer = None
        if self._reserved:
            _libc.munmap(self._reserved, self._reserved_bytes)
            self._reserved = 0


def _cut(extents: Sequence[Extent], image_bytes: int, size_bytes: int) -> list[Extent]:
    """The merged extents, cut to the image (rounded up to a page) and checked against the memory's size."""
    left = -(-image_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pieces: list[Extent] = []
    for extent in merge_extents(extents):
        if extent.offset_bytes % mmap.PAGESIZE or extent.size_bytes % mmap.PAGESIZE or extent.size_bytes <= 0:
            raise LinkError(f"extent {extent} is not made of whole pages")
        if extent.offset_bytes < 0 or extent.offset_bytes + extent.size_bytes > size_bytes:
            raise LinkError(f"extent {extent} leaves the arena of {size_bytes} bytes")
        if left > 0:
            pieces.append(Extent(extent.offset_bytes, min(extent.size_bytes, left)))
            left -= pieces[-1].size_bytes
    if left > 0 or image_bytes <= 0:
        raise LinkError(f"the extents are {left} bytes short of an image of {image_bytes}")
    return pieces


def _map(address: int | None, length: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    result = _libc.mmap(address, length, protection, flags, descriptor, offset)
    if result is None or result == _MAP_FAILED:
        raise OutOfSpace(f"cannot map {length} bytes of the arena: {os.strerror(ctypes.get_errno())}")
    return int(result)
