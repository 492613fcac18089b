"""The DRAM tier's memory: one memfd of chunks, in the largest pages the machine gives, with its chunk table inside.

The descriptor is the arena: the agent keeps a duplicate, so that the memory outlives the store, and hands it to the next
one; workers get read-only descriptors of it. Sealed against resizing, so that no holder can pull pages from under another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from agent.native.address import address_of
from agent.native.chunk_table import ChunkTable, Geometry, Occupant, table_bytes
from agent.native.numa import interleave
from agent.native.prefault import Prefault
from agent.native.renew import renew
from schema.errors import InvalidInput, OutOfSpace
from schema.link import ArenaInfo, Extent

__all__ = ["HUGE_BYTES", "Arena", "merge_extents"]

HUGE_BYTES: Final = 2 << 20
"""Size of a huge page: the data begins at, and chunks are multiples of, this."""

_MAX_SLOTS: Final = 4096
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MEMINFO = Path("/proc/meminfo")
_SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_log = logging.getLogger(__name__)


class Arena:
    """Memory for ``chunks`` chunks. Made by `create` or `adopt`; the caller decides which chunks go to whom."""

    def __init__(self, descriptor: int, memory: mmap.mmap, table: ChunkTable, pages: str, occupants: list[Occupant]) -> None:
        self.descriptor = descriptor
        self.id = table.arena
        self.chunk_bytes = table.geometry.chunk_bytes
        self.chunks = table.geometry.chunks
        self.slots = table.geometry.slots
        self.pages = pages
        self.occupants = occupants
        """What an adopted arena held; empty in a fresh one."""
        self.table = table
        self._memory = memory
        self._view = memoryview(memory)
        self._data_offset = table.geometry.data_offset
        self._prefault: Prefault | None = None

    @classmethod
    def create(cls, budget_bytes: int, chunk_bytes: int) -> Arena:
        """Fresh memory of at most ``budget_bytes`` of data. Pages are taken as they are first written.

        Raises OutOfSpace when the system refuses the memory.
        """
        geometry = _geometry(budget_bytes, chunk_bytes)
        descriptor, memory, pages = _allocate(geometry)
        interleave(memory)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        table = ChunkTable.create(memoryview(memory), secrets.token_hex(16), geometry)
        return cls(descriptor, memory, table, pages, [])

    @classmethod
    def adopt(cls, descriptor: int, budget_bytes: int, chunk_bytes: int) -> Arena:
        """The arena behind a descriptor that another life left, with all that lies whole in it. Takes the descriptor over.

        That life's process must be gone; what it was filling gets other pages, since its reads may not be over. Raises
        InvalidInput, the descriptor still the caller's, when it is no arena of this budget and chunk size.
        """
        geometry = _geometry(budget_bytes, chunk_bytes)
        try:
            status = os.fstat(descriptor)
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise InvalidInput("the memory handed over is not sealed: its size could change under us")
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
                raise InvalidInput("the memory handed over cannot be written")
            huge = os.fstatvfs(descriptor).f_bsize >= HUGE_BYTES
        except OSError as error:
            raise InvalidInput(f"what was handed over as an arena is no sealed memory: {error.strerror}") from error
        if status.st_size != _total_bytes(geometry):
            raise InvalidInput(f"the arena handed over has {status.st_size} bytes, not {_total_bytes(geometry)}")
        memory = _map(descriptor, geometry)
        view = memoryview(memory)
        try:
            table = ChunkTable.adopt(view, geometry)
        except InvalidInput:
            view.release()
            memory.close()
            raise
        pages = "hugetlb" if huge else _advise(memory)
        return cls(descriptor, memory, table, pages, table.recover(_renew(descriptor, table)))

    @property
    def memory(self) -> memoryview:
        """All of it, chunk table included, as copies to devices want it pinned."""
        return self._view

    def info(self, used_chunks: int) -> ArenaInfo:
        """The arena as it is stated on a link."""
        return ArenaInfo(
            id=self.id,
            budget_bytes=self.chunks * self.chunk_bytes,
            chunk_bytes=self.chunk_bytes,
            used_bytes=used_chunks * self.chunk_bytes,
            pages=self.pages,
            faulted_bytes=self._prefault.done * self.chunk_bytes if self._prefault is not None else 0,
        )

    @property
    def address(self) -> int:
        """Where chunk 0 begins in this process."""
        return address_of(self._view) + self._data_offset

    def steps(self, limit_bytes: int) -> list[tuple[int, int]]:
        """The data as (address, size) of at most ``limit_bytes`` each, for a driver that pins memory in steps: no chunk lies in
        two of them. A chunk longer than the limit is a step of its own."""
        step = max(1, limit_bytes // self.chunk_bytes) * self.chunk_bytes
        size = self.chunks * self.chunk_bytes
        return [(self.address + at, min(step, size - at)) for at in range(0, size, step)]

    def prefault(self, threads: int, changed: Callable[[int], None]) -> None:
        """Make all pages present in the background; a second call does nothing. ``changed`` hears, on a thread, how many are.

        Of pages that are not reserved already, no more than half of the memory that is available now: a budget that was set
        too large must not drive others out before it is used.
        """
        if self._prefault is None and self.chunks:
            chunks = self.chunks if self.pages == "hugetlb" else min(self.chunks, _half_available() // self.chunk_bytes)
            self._prefault = Prefault(
                self.descriptor, self.address, self._data_offset, chunks, self.chunk_bytes, threads=threads, changed=changed
            )

    def hurry(self, chunks: Sequence[int]) -> None:
        """These chunks are about to be written: make them present before others."""
        if self._prefault is not None:
            self._prefault.hurry(chunks)

    def hold_prefault(self, held: bool) -> None:
        """While something is loaded, only what it hurries for is made present."""
        if self._prefault is not None:
            self._prefault.hold(held)

    def chunks_for(self, image_bytes: int) -> int:
        """How many chunks an image takes."""
        return max(1, -(-image_bytes // self.chunk_bytes))

    def offset(self, chunk: int) -> int:
        """Where a chunk begins in the descriptor."""
        return self._data_offset + chunk * self.chunk_bytes

    def views(self, chunks: Sequence[int], start_bytes: int, size_bytes: int) -> list[memoryview]:
        """Writable memory of a range of the image that lies in ``chunks``, in as few pieces as it has."""
        pieces: list[tuple[int, int]] = []
        while size_bytes:
            index, within = divmod(start_bytes, self.chunk_bytes)
            length = min(size_bytes, self.chunk_bytes - within)
            at = self.offset(chunks[index]) + within
            if pieces and sum(pieces[-1]) == at:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + length)
            else:
                pieces.append((at, length))
            start_bytes += length
            size_bytes -= length
        return [self._view[at : at + length] for at, length in pieces]

    def extents(self, chunks: Sequence[int]) -> tuple[Extent, ...]:
        """The chunks in order, as a link states them: whole chunks, adjacent ones merged."""
        return tuple(merge_extents([Extent(self.offset(chunk), self.chunk_bytes) for chunk in chunks]))

    def close(self) -> None:
        """Unmap and close. The memory lives on while another holds a descriptor or mapping of it."""
        if self._prefault is not None:
            self._prefault.close()
        self._view.release()
        with contextlib.suppress(BufferError):  # the table's view dies with this object; the process ends anyway
            self._memory.close()
        os.close(self.descriptor)


def merge_extents(extents: Sequence[Extent]) -> list[Extent]:
    """The same bytes in the same order, adjacent extents joined."""
    merged: list[Extent] = []
    for extent in extents:
        if merged and merged[-1].offset_bytes + merged[-1].size_bytes == extent.offset_bytes:
            merged[-1] = Extent(merged[-1].offset_bytes, merged[-1].size_bytes + extent.size_bytes)
        else:
            merged.append(extent)
    return merged


def _renew(descriptor: int, table: ChunkTable) -> list[int]:
    """Give what was being filled other pages; the chunks for which there are none."""
    filling = table.filling()
    chunk_bytes, offset = table.geometry.chunk_bytes, table.geometry.data_offset
    lost: list[int] = []
    for run in merge_extents([Extent(offset + chunk * chunk_bytes, chunk_bytes) for chunk in filling]):
        try:
            renew(descriptor, run.offset_bytes, run.size_bytes)
        except OSError as error:
            _log.warning(
                "%d bytes of the arena stay unused, since reads of an ended store may reach them: %s", run.size_bytes, error
            )
            first = (run.offset_bytes - offset) // chunk_bytes
            lost += range(first, first + run.size_bytes // chunk_bytes)
    return lost


def _half_available() -> int:
    """Half of the memory that the system could give without swapping; all of it where it does not say."""
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError), _MEMINFO.open() as lines:
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024 // 2
    return 1 << 62


def _geometry(budget_bytes: int, chunk_bytes: int) -> Geometry:
    chunks = budget_bytes // chunk_bytes
    slots = max(1, min(chunks, _MAX_SLOTS))
    return Geometry(chunk_bytes, chunks, slots, -(-table_bytes(chunks, slots) // HUGE_BYTES) * HUGE_BYTES)


def _total_bytes(geometry: Geometry) -> int:
    return geometry.data_offset + geometry.chunks * geometry.chunk_bytes


def _allocate(geometry: Geometry) -> tuple[int, mmap.mmap, str]:
    # Mapping hugetlb memory reserves every page at once or fails, so that a later write never meets an empty pool.
    with contextlib.suppress(OSError):
        descriptor = os.memfd_create("sllmctl-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        try:
            os.ftruncate(descriptor, _total_bytes(geometry))
            return descriptor, mmap.mmap(descriptor, _total_bytes(geometry)), "hugetlb"
        except OSError:
            os.close(descriptor)
            raise
    descriptor = os.memfd_create("sllmctl-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, _total_bytes(geometry))
        memory = _map(descriptor, geometry)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG, errno.EINVAL):
            raise
        raise OutOfSpace(f"the system gives no arena of {_total_bytes(geometry)} bytes: {error.strerror}") from error
    return descriptor, memory, _advise(memory)


def _map(descriptor: int, geometry: Geometry) -> mmap.mmap:
    memory = mmap.mmap(descriptor, _total_bytes(geometry))
    memory.madvise(mmap.MADV_DONTDUMP)  # a core dump of the store must not be the size of its models
    return memory


def _advise(memory: mmap.mmap) -> str:
    """Ask for transparent huge pages; "thp" where shared memory is allowed to have them, else "small"."""
    try:
        allowed = _SHMEM_HUGE.read_text()
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return "small"
    return "small" if "[never]" in allowed or "[deny]" in allowed else "thp"
