"""Memory made present before it is needed: in the background, by threads that yield to loads, the chunks of a load first.

The first touch of a page costs its clearing, and on a virtual machine the host's as well: slower than most disks. A read into
pages that are not there pays it inside its system call, one page after another; several threads pay it side by side.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["Prefault"]

_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, Linux 5.14: faults pages in as a write would, and leaves their content
_log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Prefault:
    """Touches ``chunks`` of ``chunk_bytes`` from ``address`` on, which is ``offset`` in the descriptor.

    `done` chunks are there. What `hurry` names goes first; the rest waits while ``hold`` is set. ``changed`` is called from a
    thread after every chunk, with how many are there. Whatever else writes to the memory meanwhile may.
    """

    def __init__(
        self,
        descriptor: int,
        address: int,
        offset: int,
        chunks: int,
        chunk_bytes: int,
        *,
        threads: int,
        changed: Callable[[int], None],
    ) -> None:
        self._descriptor = descriptor
        self._address = address
        self._offset = offset
        self._chunk_bytes = chunk_bytes
        self._changed = changed
        self._condition = threading.Condition()
        self._present = bytearray(chunks)
        self._rest = deque(range(chunks))
        self._urgent: deque[int] = deque()
        self._held = False
        self._closed = False
        self._done = 0
        self._populates = True
        self._threads = [threading.Thread(target=self._run, name=f"fault-{each}", daemon=True) for each in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> int:
        """How many chunks are there."""
        return self._done

    def hurry(self, chunks: Sequence[int]) -> None:
        """These are about to be written."""
        with self._condition:
            self._urgent.extend(chunk for chunk in chunks if chunk < len(self._present) and not self._present[chunk])
            self._condition.notify_all()

    def hold(self, held: bool) -> None:
        """While something is loaded, only what it hurries for is touched."""
        with self._condition:
            self._held = held
            self._condition.notify_all()

    def close(self) -> None:
        """End the threads, each within a chunk's time. The memory may be unmapped then."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (chunk := self._next()) is not None:
            try:
                self._touch(chunk)
            except OSError as error:
                # Nothing is lost: pages come when they are written. Out of memory, it is better not to ask for more.
                _log.warning("the arena's memory is not made present ahead of need: %s", error)
                return
            with self._condition:
                self._done += 1
                done = self._done
            self._changed(done)

    def _next(self) -> int | None:
        with self._condition:
            while not self._closed:
                queue = self._urgent or (self._rest if not self._held else None)
                if queue:
                    chunk = queue.popleft()
                    if not self._present[chunk]:
                        self._present[chunk] = 1
                        return chunk
                elif not self._rest and self._done == len(self._present):
                    return None
                else:
                    self._condition.wait()
            return None

    def _touch(self, chunk: int) -> None:
        at = chunk * self._chunk_bytes
        while self._populates:
            if not _libc.madvise(self._address + at, self._chunk_bytes, _POPULATE_WRITE):
                return
            code = ctypes.get_errno()
            if code == errno.EINVAL:
                self._populates = False  # an older kernel
            elif code not in (errno.EAGAIN, errno.EINTR):
                raise OSError(code, os.strerror(code))
        os.posix_fallocate(self._descriptor, self._offset + at, self._chunk_bytes)  # takes and clears pages, keeps those there
