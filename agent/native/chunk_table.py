"""The chunk table: who owns which chunk of an arena, kept inside the arena so that it outlives the store's process.

The table survives its writer being killed between any two instructions. One byte decides: a slot's state. It becomes
RESIDENT only after the slot's body, its checksum and its chunks' entries are written, and FREE before any of its chunks is
given to another. A chunk is FILLING from before the first read into it until all of them are over, however the job ends. What
a reader finds RESIDENT it still believes only if the checksums and every chunk's entry agree, so that a torn or hostile table
yields less, never something wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import xxhash

from schema.errors import InvalidInput

__all__ = ["ChunkTable", "Geometry", "Occupant", "table_bytes"]

_MAGIC: Final = b"sllmctl arena\x00\r\n"
_VERSION: Final = 2
_FREE, _FILLING, _RESIDENT = 0, 1, 2
_CONDEMNED_AT: Final = 1
"""A byte of a slot outside of its checksum: its image was found wrong."""

_HEADER = struct.Struct("<16sI4x32sQQQQ")  # magic, version, id, chunk bytes, chunks, slots, data offset
_HEADER_BYTES: Final = 4096
_CHECK = struct.Struct("<Q")
_SLOT_BYTES: Final = 128
_SLOT_HINTS = struct.Struct("<QQ")  # users, stamp: outside of the checksum, a torn one harms nothing
_SLOT_HINTS_AT: Final = 8
_SLOT_BODY = struct.Struct("<32s16sQQQQ")  # digest, image id, image bytes, chunks, generation, checksum of the chunks in order
_SLOT_BODY_AT: Final = 32
_CHUNK = struct.Struct("<B7xIIQ8x")  # state, slot, index in the image, generation
_CHUNK_OWNER = struct.Struct("<IIQ")
_CHUNK_OWNER_AT: Final = 8


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of an arena: ``data_offset`` is where chunk 0 begins; slots bound how many checkpoints it can name."""

    chunk_bytes: int
    chunks: int
    slots: int
    data_offset: int


@dataclass(slots=True)
class Occupant:
    """A checkpoint in the arena: its slot and its chunks in the order of the image. ``stamp`` is when it was last used."""

    slot: int
    digest: str
    image_id: str
    image_bytes: int
    chunks: tuple[int, ...]
    generation: int
    users: int = 0
    stamp: int = 0
    condemned: bool = False


def table_bytes(chunks: int, slots: int) -> int:
    """Room that header and table take."""
    return _HEADER_BYTES + slots * _SLOT_BYTES + chunks * _CHUNK.size


class ChunkTable:
    """Reads and writes the table at the beginning of ``memory``, which must hold `table_bytes`."""

    def __init__(self, memory: memoryview, arena: str, geometry: Geometry) -> None:
        self.arena = arena
        self.geometry = geometry
        self._memory = memory
        self._slots_at = _HEADER_BYTES
        self._chunks_at = _HEADER_BYTES + geometry.slots * _SLOT_BYTES
        self._generation = 0
        self.lost_chunks: frozenset[int] = frozenset()
        """What an earlier life was filling when it ended, and must not be touched."""

    @classmethod
    def create(cls, memory: memoryview, arena: str, geometry: Geometry) -> ChunkTable:
        """An empty table over zeroed memory; its magic is written last."""
        header = cls._header(arena, geometry)
        memory[16 : _HEADER.size] = header[16:]
        _CHECK.pack_into(memory, _HEADER.size, xxhash.xxh3_64_intdigest(header))
        memory[:16] = header[:16]
        return cls(memory, arena, geometry)

    @classmethod
    def adopt(cls, memory: memoryview, geometry: Geometry) -> ChunkTable:
        """The table that another life left. Raises InvalidInput when it is none, or of another version or geometry."""
        magic, version, arena, *shape = _HEADER.unpack_from(memory, 0)
        if magic != _MAGIC or version != _VERSION:
            raise InvalidInput("the memory handed over is no arena of this version")
        if _CHECK.unpack_from(memory, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(memory[: _HEADER.size]):
            raise InvalidInput("the header of the arena handed over is damaged")
        if Geometry(*shape) != geometry:
            raise InvalidInput(f"the arena handed over has another geometry: {Geometry(*shape)}, wanted {geometry}")
        if not arena.isalnum():
            raise InvalidInput("the id of the arena handed over is damaged")
        return cls(memory, arena.decode("ascii", "replace"), geometry)

    @staticmethod
    def _header(arena: str, geometry: Geometry) -> bytes:
        shape = (geometry.chunk_bytes, geometry.chunks, geometry.slots, geometry.data_offset)
        return _HEADER.pack(_MAGIC, _VERSION, arena.encode().ljust(32, b"0"), *shape)

    def filling(self) -> list[int]:
        """The chunks that an earlier life was filling when it ended, ascending: reads of it may yet write into them."""
        states = self._memory[self._chunks_at : self._chunks_at + self.geometry.chunks * _CHUNK.size : _CHUNK.size]
        return [chunk for chunk, state in enumerate(states) if state not in (_FREE, _RESIDENT)]

    def recover(self, lost: Collection[int] = ()) -> list[Occupant]:
        """What lies whole in the arena; everything else is marked free, but for ``lost`` chunks, which stay as they are. For a
        new life, before its first `begin`."""
        owned: dict[int, dict[int, tuple[int, int]]] = {}
        chunks_end = self._chunks_at + self.geometry.chunks * _CHUNK.size
        for chunk, entry in enumerate(_CHUNK.iter_unpack(self._memory[self._chunks_at : chunks_end])):
            state, slot, index, generation = entry
            self._generation = max(self._generation, min(generation, 1 << 62))
            if state == _RESIDENT and slot < self.geometry.slots:
                owned.setdefault(slot, {})[index] = (chunk, generation)
        occupants: dict[str, Occupant] = {}
        for slot in range(self.geometry.slots):
            if self._memory[self._slot(slot)] == _FREE:
                continue
            occupant = self._read_slot(slot, owned.get(slot, {}))
            if occupant is None or occupant.digest in occupants:
                self._memory[self._slot(slot)] = _FREE
            else:
                occupants[occupant.digest] = occupant
        kept = {chunk for occupant in occupants.values() for chunk in occupant.chunks}
        self.lost_chunks = frozenset(lost)
        for chunk in range(self.geometry.chunks):
            if chunk not in kept and chunk not in self.lost_chunks:
                self._memory[self._chunk(chunk)] = _FREE
        return list(occupants.values())

    def begin(self, slot: int, digest: str, image_id: str, image_bytes: int, chunks: Sequence[int]) -> Occupant:
        """Give free chunks to a slot, as being filled: a life that ends now leaves them free."""
        self._generation += 1
        occupant = Occupant(slot, digest, image_id, image_bytes, tuple(chunks), self._generation)
        self._memory[self._slot(slot) + _CONDEMNED_AT] = 0
        self._memory[self._slot(slot)] = _FILLING
        for index, chunk in enumerate(chunks):
            at = self._chunk(chunk)
            self._memory[at] = _FILLING
            _CHUNK_OWNER.pack_into(self._memory, at + _CHUNK_OWNER_AT, slot, index, self._generation)
        names = bytes.fromhex(digest), bytes.fromhex(image_id)
        body = _SLOT_BODY.pack(*names, image_bytes, len(chunks), self._generation, _chunks_check(chunks))
        at = self._slot(slot) + _SLOT_BODY_AT
        self._memory[at : at + len(body)] = body
        _CHECK.pack_into(self._memory, at + len(body), xxhash.xxh3_64_intdigest(body))
        return occupant

    def condemn(self, occupant: Occupant) -> None:
        """Its image was found wrong, which every later life must know."""
        occupant.condemned = True
        self._memory[self._slot(occupant.slot) + _CONDEMNED_AT] = 1

    def commit(self, occupant: Occupant) -> None:
        """The occupant's bytes are whole: from here on it survives the store."""
        self.note(occupant)
        for chunk in occupant.chunks:
            self._memory[self._chunk(chunk)] = _RESIDENT
        self._memory[self._slot(occupant.slot)] = _RESIDENT

    def release(self, occupant: Occupant) -> None:
        """Free an occupant's chunks, in whatever state they are."""
        self._memory[self._slot(occupant.slot)] = _FREE
        for chunk in occupant.chunks:
            self._memory[self._chunk(chunk)] = _FREE

    def note(self, occupant: Occupant) -> None:
        """Write down users and last use, so that the next life evicts neither the used nor the wrong one."""
        at = self._slot(occupant.slot) + _SLOT_HINTS_AT
        _SLOT_HINTS.pack_into(self._memory, at, occupant.users, occupant.stamp)

    def _read_slot(self, slot: int, owned: dict[int, tuple[int, int]]) -> Occupant | None:
        at = self._slot(slot)
        body = bytes(self._memory[at + _SLOT_BODY_AT : at + _SLOT_BODY_AT + _SLOT_BODY.size])
        (check,) = _CHECK.unpack_from(self._memory, at + _SLOT_BODY_AT + _SLOT_BODY.size)
        if self._memory[at] != _RESIDENT or check != xxhash.xxh3_64_intdigest(body):
            return None
        digest, image_id, image_bytes, count, generation, chunks_check = _SLOT_BODY.unpack(body)
        if (
            count != len(owned)
            or not (count - 1) * self.geometry.chunk_bytes < image_bytes <= count * self.geometry.chunk_bytes
        ):
            return None
        chunks = []
        for index in range(count):
            chunk, chunk_generation = owned.get(index, (-1, -1))
            if chunk_generation != generation:
                return None
            chunks.append(chunk)
        if _chunks_check(chunks) != chunks_check:
            return None
        users, stamp = _SLOT_HINTS.unpack_from(self._memory, at + _SLOT_HINTS_AT)
        condemned = self._memory[at + _CONDEMNED_AT] != 0
        names = digest.hex(), image_id.hex()
        return Occupant(slot, *names, image_bytes, tuple(chunks), generation, users, stamp, condemned)

    def _slot(self, slot: int) -> int:
        return self._slots_at + slot * _SLOT_BYTES

    def _chunk(self, chunk: int) -> int:
        return self._chunks_at + chunk * _CHUNK.size


def _chunks_check(chunks: Sequence[int]) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(chunks)}Q", *chunks))
