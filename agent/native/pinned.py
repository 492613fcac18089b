"""Host memory that a device copies from at full speed: pinned step by step, and cut so that no copy crosses a step."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterator
from typing import Final

from agent.native.address import address_of
from agent.native.device import Driver
from schema.errors import SllmError

__all__ = ["STEP_BYTES", "HostMemory", "Ring", "is_present"]

STEP_BYTES: Final = 256 << 20
"""What one registration pins. A load that meets an unpinned step pays for this much at most: 10 ms where pages were touched."""
_log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


class HostMemory:
    """Ranges of this process's memory, pinned as they are first copied from, or ahead of that by `pin_next`.

    One thread uses it. Where the system refuses to pin, copies are slower and as right: that is logged once.
    """

    def __init__(self, driver: Driver, step_bytes: int = STEP_BYTES) -> None:
        self._driver = driver
        self._step_bytes = step_bytes
        self._ranges: list[tuple[int, int]] = []
        self._pinned: set[int] = set()
        self._waiting: list[tuple[int, int]] = []
        self.refused = False
        """The system would not pin; nothing more is tried."""

    @property
    def waiting(self) -> bool:
        """True while something could be pinned ahead of need, once its pages are there."""
        return bool(self._waiting) and not self.refused

    def add(self, address: int, size_bytes: int) -> None:
        """Whole pages that copies will come from."""
        self._ranges.append((address, size_bytes))
        for at in range(address, address + size_bytes, self._step_bytes):
            self._waiting.append((at, min(self._step_bytes, address + size_bytes - at)))

    def cut(self, address: int, size_bytes: int, limit_bytes: int) -> Iterator[tuple[int, int]]:
        """The range in pieces of at most ``limit_bytes``, none of which crosses from one step into the next."""
        while size_bytes:
            length = min(size_bytes, limit_bytes, self.step_end(address) - address)
            yield address, length
            address += length
            size_bytes -= length

    def step_end(self, address: int) -> int:
        """Where the step that holds this address ends."""
        start, size = self._range(address)
        return min(start + size, address + self._step_bytes - (address - start) % self._step_bytes)

    def pin(self, address: int) -> None:
        """Pin the step that holds this address, if that was not done yet."""
        start, size = self._range(address)
        at = address - (address - start) % self._step_bytes
        if at not in self._pinned and not self.refused:
            self._register(at, min(self._step_bytes, start + size - at))

    def pin_next(self) -> bool:
        """Pin one more step ahead of need; False when there is none whose pages are there: pinning would take them all, and how
        many may be taken ahead of need is not for this to say."""
        self._waiting = [(at, size) for at, size in self._waiting if at not in self._pinned]
        if self.refused:
            return False
        for step in self._waiting:
            if is_present(*step):
                self._waiting.remove(step)
                self._register(*step)
                return True
        return False

    def close(self) -> None:
        """Unpin everything."""
        for address in sorted(self._pinned):
            self._driver.unregister(address)
        self._pinned.clear()

    def _register(self, address: int, size_bytes: int) -> None:
        try:
            self._driver.register(address, size_bytes)
            self._pinned.add(address)
        except SllmError as error:
            self.refused = True
            _log.warning("host memory cannot be pinned, so copies to devices are slow: %s", error)

    def _range(self, address: int) -> tuple[int, int]:
        for start, size in self._ranges:
            if start <= address < start + size:
                return start, size
        raise ValueError(f"address {address:#x} is not in memory that copies may come from")


def is_present(address: int, size_bytes: int) -> bool:
    """True when every page of a range of this process's memory is there, by mincore."""
    present = ctypes.create_string_buffer(-(-size_bytes // mmap.PAGESIZE))
    if _libc.mincore(address, size_bytes, present):
        return False
    return all(byte & 1 for byte in present.raw)


class Ring:
    """Slots of one pinned area, for what passes through DRAM on its way to a device. The caller guards it."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.free = list(range(slots))
        self._memory = mmap.mmap(-1, slots * slot_bytes)
        self._view = memoryview(self._memory)
        self.address = address_of(self._view)

    @property
    def size_bytes(self) -> int:
        return self.slots * self.slot_bytes

    def slots_for(self, size_bytes: int) -> int:
        """How many slots a run of bytes takes."""
        return -(-size_bytes // self.slot_bytes)

    def take(self, size_bytes: int) -> tuple[tuple[int, ...], tuple[memoryview, ...]] | None:
        """Slots and their memory for so many bytes; None while too few are free."""
        count = self.slots_for(size_bytes)
        if count > len(self.free):
            return None
        taken = tuple(sorted(self.free)[:count])
        self.free = [slot for slot in self.free if slot not in taken]
        views = []
        for slot in taken:
            at = slot * self.slot_bytes
            views.append(self._view[at : at + min(self.slot_bytes, size_bytes)])
            size_bytes -= len(views[-1])
        return taken, tuple(views)

    def give(self, slots: tuple[int, ...]) -> None:
        """Take slots back."""
        self.free.extend(slots)
