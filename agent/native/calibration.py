"""Which block size and depth a disk reads fastest with: a short race of a few of them over io_uring, past the page cache."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from agent.native.address import address_of
from agent.native.blocks import block_memory
from agent.native.uring import NoRing, Ring

__all__ = ["LEAST_FILE_BYTES", "Tuning", "calibrate"]

LEAST_FILE_BYTES: Final = 64 << 20
"""A shorter file is over before it says anything of depth."""
_CLEARLY: Final = 1.05
"""By so much another must be faster than the usual one: less is noise."""
_ROUNDS: Final = 2


class Tuning(msgspec.Struct, frozen=True):
    """How to read: blocks of ``block_bytes``, ``depth`` of them at a time."""

    block_bytes: Annotated[int, Meta(ge=1 << 16, le=1 << 26, multiple_of=4096)]
    depth: Annotated[int, Meta(ge=1, le=64)]


_USUAL: Final = Tuning(4 << 20, 32)
_CANDIDATES: Final = (
    _USUAL,
    Tuning(1 << 20, 64), Tuning(2 << 20, 32), Tuning(4 << 20, 8), Tuning(4 << 20, 64), Tuning(8 << 20, 16), Tuning(16 << 20, 8),
)  # fmt: skip


def calibrate(file: Path, *, huge: bool, limit_s: float, stop: threading.Event) -> Tuning | None:
    """The fastest way to read ``file``, into huge pages or small ones, within about ``limit_s``.

    None where that cannot be said: ``stop`` was set, the file is short, there is no io_uring, or no direct I/O. Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
        stack.callback(os.close, descriptor)
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes < LEAST_FILE_BYTES:
            return None
        memory = block_memory(max(each.block_bytes for each in _CANDIDATES), huge=huge)
        try:
            ring = Ring(max(each.depth for each in _CANDIDATES))
        except NoRing:
            return None
        stack.callback(ring.close)
        race = _Race(ring, descriptor, size_bytes, address_of(memory))
        best: dict[Tuning, float] = dict.fromkeys(_CANDIDATES, 0.0)
        for _ in range(_ROUNDS):
            for each in _CANDIDATES:
                best[each] = max(best[each], race.run(each, limit_s / len(_CANDIDATES) / _ROUNDS, stop))
                if stop.is_set() or race.refused:
                    return None
        fastest = max(best, key=best.__getitem__)
        return fastest if best[fastest] > _CLEARLY * best[_USUAL] else _USUAL


class _Race:
    """Reads on and on through a file, all blocks into the same memory: nobody wants the bytes."""

    def __init__(self, ring: Ring, descriptor: int, size_bytes: int, address: int) -> None:
        self.refused = False
        """A read failed: the file system wants none past the cache, or the disk has an error, which a load will name."""
        self._ring = ring
        self._descriptor = descriptor
        self._size_bytes = size_bytes
        self._address = address
        self._offset = 0

    def run(self, tuning: Tuning, limit_s: float, stop: threading.Event) -> float:
        """Bytes per second. Returns when nothing is under way any more, soon after it is told to stop."""
        began = time.monotonic()
        flying = done_bytes = 0
        while True:
            ends = self.refused or stop.is_set() or time.monotonic() - began >= limit_s
            while flying < tuning.depth and not ends:
                if self._offset + tuning.block_bytes > self._size_bytes:
                    self._offset = 0
                self._ring.read(self._descriptor, self._address, tuning.block_bytes, self._offset, 1)
                self._offset += tuning.block_bytes
                flying += 1
            if not flying:
                return done_bytes / (time.monotonic() - began)
            self._ring.enter(1.0)
            for _, result in self._ring.completions():
                flying -= 1
                self.refused = self.refused or result <= 0
                done_bytes += max(0, result)
