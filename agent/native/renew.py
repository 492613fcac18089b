"""Fresh pages in the place of those that a dead process's reads may yet write into.

A process killed while io_uring reads for it is gone before its reads are: they go on into the pages that they were given, and
those of a memfd are the next process's too. (16 MiB at 2 MB/s came in full within 7.5 s after the process was reaped, Linux
6.18.) Pages that are punched out of the file are written to as well, and seen by nobody.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

__all__ = ["renew"]

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


def renew(descriptor: int, offset: int, size_bytes: int) -> None:
    """Give a range of whole pages of a memfd other pages, of zeros; mappings of it see those.

    Raises OSError where the system does not, or has no huge pages to spare for it: then the range must not be touched.
    """
    if _libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, size_bytes):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    # What reserves huge pages for a range is that it is mapped anew: a touch might else find the pool empty, and is killed.
    mmap.mmap(descriptor, size_bytes, offset=offset).close()
