"""The arena's memory and chunk table: hostile memory is refused, a killed writer leaves only what is whole."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from agent.native import arena as arenas
from agent.native.address import address_of
from agent.native.arena import Arena
from agent.native.mapping import ImageMapping, read_only
from agent.native.uring import NoRing, Ring
from schema.errors import InvalidInput, LinkError
from schema.link import Extent
from tests.examples import examples

CHUNK = 2 << 20
BUDGET = 6 * CHUNK
IMAGE = "0123456789abcdef" * 2


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(BUDGET, CHUNK)
    yield arena
    arena.close()


def digest_of(number: int) -> str:
    return f"{number:064x}"


def put(arena: Arena, number: int, chunks: list[int], image_bytes: int | None = None) -> None:
    occupant = arena.table.begin(number, digest_of(number), IMAGE, image_bytes or len(chunks) * CHUNK, chunks)
    for index, chunk in enumerate(chunks):
        arena.views([chunk], 0, CHUNK)[0][:] = bytes([number, index]) * (CHUNK // 2)
    arena.table.commit(occupant)


def adopt(arena: Arena) -> Arena:
    return Arena.adopt(os.dup(arena.descriptor), BUDGET, CHUNK)


def test_next_life_finds_what_was_committed(arena: Arena) -> None:
    put(arena, 1, [4, 0, 1], 2 * CHUNK + 1)
    arena.table.begin(2, digest_of(2), IMAGE, CHUNK, [2])
    again = adopt(arena)
    assert again.id == arena.id
    (occupant,) = again.occupants
    assert (occupant.digest, occupant.image_id, occupant.chunks) == (digest_of(1), IMAGE, (4, 0, 1))
    assert occupant.image_bytes == 2 * CHUNK + 1
    again.close()


def test_released_and_given_to_another_is_forgotten(arena: Arena) -> None:
    put(arena, 1, [0, 1])
    again = adopt(arena)
    arena.table.release(again.occupants[0])
    again.close()
    put(arena, 2, [1, 2])
    again = adopt(arena)
    assert [occupant.digest for occupant in again.occupants] == [digest_of(2)]
    again.close()


@pytest.mark.parametrize("seed", range(examples(200)))
def test_damaged_table_yields_less_and_never_something_wrong(arena: Arena, seed: int) -> None:
    put(arena, 0, [0, 3])
    put(arena, 1, [2, 1, 5])
    noise = random.Random(seed)
    whole = {(digest_of(0), (0, 3)), (digest_of(1), (2, 1, 5))}
    memory = mmap.mmap(arena.descriptor, CHUNK)
    table_end = 4096 + 6 * 128 + 6 * 32
    for _ in range(noise.choice((1, 3, 50))):
        memory[noise.randrange(4096, table_end)] = noise.randrange(256)
    again = adopt(arena)
    assert {(occupant.digest, occupant.chunks) for occupant in again.occupants} <= whole, f"seed {seed}"
    again.close()
    memory.close()


@pytest.mark.parametrize("at", [0, 17, 30, 50, 60, 70, 80])
def test_damaged_header_is_refused(arena: Arena, at: int) -> None:
    memory = mmap.mmap(arena.descriptor, CHUNK)
    memory[at] ^= 0x55
    memory.close()
    with pytest.raises(InvalidInput):
        Arena.adopt(arena.descriptor, BUDGET, CHUNK)


@pytest.mark.parametrize(("budget", "chunk"), [(BUDGET, 2 * CHUNK), (BUDGET + CHUNK, CHUNK), (BUDGET - CHUNK, CHUNK)])
def test_other_geometry_is_refused(arena: Arena, budget: int, chunk: int) -> None:
    with pytest.raises(InvalidInput):
        Arena.adopt(arena.descriptor, budget, chunk)


def test_memory_that_could_shrink_under_us_is_refused(arena: Arena) -> None:
    size = os.fstat(arena.descriptor).st_size
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, size)
    os.write(loose, os.pread(arena.descriptor, CHUNK, 0))
    with pytest.raises(InvalidInput, match="sealed"):
        Arena.adopt(loose, BUDGET, CHUNK)
    os.close(loose)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.descriptor, CHUNK)  # whole huge pages, so that only the seal is in the way


def test_pipes_and_read_only_descriptors_are_no_arena(arena: Arena) -> None:
    ends = os.pipe()
    reader = read_only(arena.descriptor)
    for descriptor in (*ends, reader):
        with pytest.raises(InvalidInput):
            Arena.adopt(descriptor, BUDGET, CHUNK)
        os.close(descriptor)


def test_empty_budget_makes_an_arena_without_room() -> None:
    arena = Arena.create(0, CHUNK)
    assert arena.info(0).budget_bytes == 0
    arena.close()


WRITER = """
import os, random, sys
sys.path.insert(0, os.getcwd())
from agent.native.arena import Arena
arena = Arena.adopt(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
chance = random.Random(int(sys.argv[4]))
held = {each.slot: each for each in arena.occupants}
free = set(range(arena.chunks)) - {chunk for each in held.values() for chunk in each.chunks}
while True:
    number = chance.randrange(4)
    if number in held:
        arena.table.release(held[number])
        free |= set(held.pop(number).chunks)
    else:
        chunks = chance.sample(sorted(free), min(len(free), chance.randrange(1, 4)))
        if chunks:
            free -= set(chunks)
            held[number] = arena.table.begin(number, f"{number:064x}", "0" * 32, len(chunks) * arena.chunk_bytes, chunks)
            for index, chunk in enumerate(chunks):
                arena.views([chunk], 0, 4096)[0][:] = bytes([number, index]) * 2048
            arena.table.commit(held[number])
    os.write(1, b".")
"""


@pytest.mark.slow
def test_writer_killed_anywhere_leaves_only_whole_checkpoints(arena: Arena) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for life in range(12):
        arguments = [sys.executable, "-c", WRITER, *map(str, (arena.descriptor, BUDGET, CHUNK, seed + life))]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, pass_fds=(arena.descriptor,)) as writer:
            assert writer.stdout is not None
            try:
                assert writer.stdout.read(chance.randrange(1, 400))
            finally:
                writer.kill()
        again = adopt(arena)
        for occupant in again.occupants:
            for index, chunk in enumerate(occupant.chunks):
                expected = bytes([int(occupant.digest, 16), index]) * 2048
                assert again.views([chunk], 0, 4096)[0] == expected
        again.close()


_REGISTER, _REGISTER_BUFFERS, _READ_FIXED = 427, 0, 4


def test_read_of_a_dead_life_that_comes_late_harms_nobody(arena: Arena) -> None:
    """As of a slow disk, whose reads go on when their process is gone: into the very pages, which are pinned for them."""
    arena.table.begin(1, digest_of(1), IMAGE, 2 * CHUNK, [1, 4])
    memory = arena.views([4], 0, CHUNK)[0]
    memory[:] = bytes([9]) * CHUNK
    late, end = os.pipe()
    try:
        ring = Ring(4)
    except NoRing as error:
        pytest.skip(str(error))
    vector = ctypes.create_string_buffer(struct.pack("<2Q", address_of(memory), CHUNK))
    register = ctypes.CDLL(None, use_errno=True).syscall
    assert register(_REGISTER, ring._descriptor, _REGISTER_BUFFERS, vector, 1) == 0
    ring._queue(_READ_FIXED, 0, late, 0, address_of(memory), 4096, 0, 1)
    ring.enter(0.0, 0)
    again = adopt(arena)
    assert again.table.lost_chunks == frozenset()
    put(again, 2, [4])
    os.write(end, bytes([9]) * 4096)
    ring.enter(60.0, 1)
    assert ring.completions() == [(1, 4096)]
    assert bytes(again.views([4], 0, CHUNK)[0]) == bytes([2, 0]) * (CHUNK // 2)
    ring.close()
    again.close()
    for descriptor in (late, end):
        os.close(descriptor)


def test_what_was_being_filled_stays_unused_while_there_are_no_other_pages_for_it(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(arena, 0, [0])
    arena.table.begin(1, digest_of(1), IMAGE, 3 * CHUNK, [1, 2, 4])
    refused: list[int] = []

    def refuse(descriptor: int, offset: int, size_bytes: int) -> None:
        refused.append(size_bytes)
        raise OSError(12, "no pages")

    monkeypatch.setattr(arenas, "renew", refuse)
    for _ in range(2):
        again = adopt(arena)
        assert again.table.lost_chunks == {1, 2, 4}
        assert [occupant.digest for occupant in again.occupants] == [digest_of(0)]
        again.close()
    assert refused == 2 * [2 * CHUNK, CHUNK]
    monkeypatch.undo()
    again = adopt(arena)
    assert again.table.lost_chunks == frozenset()
    assert again.table.filling() == []
    again.close()


def test_mapping_is_contiguous_over_scattered_chunks_and_read_only(arena: Arena) -> None:
    put(arena, 1, [4, 0, 1])
    extents = arena.extents([4, 0, 1])
    assert len(extents) == 2
    descriptor = read_only(arena.descriptor)
    mapping = ImageMapping(descriptor, extents, 2 * CHUNK + 4097)
    os.close(descriptor)
    assert len(mapping.buffer) == 2 * CHUNK + 4097
    assert bytes(mapping.buffer[CHUNK - 2 : CHUNK + 2]) == bytes([1, 0, 1, 1])
    assert mapping.address % CHUNK == 0
    assert mapping.buffer.readonly
    mapping.close()
    mapping.close()
    with pytest.raises(ValueError, match="no longer"):
        _ = mapping.buffer


def test_read_only_descriptor_cannot_be_mapped_for_writing(arena: Arena) -> None:
    descriptor = read_only(arena.descriptor)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, CHUNK)
    os.close(descriptor)


@pytest.mark.parametrize(
    ("extents", "image_bytes"),
    [
        ([Extent(1, 4096)], 4096),
        ([Extent(0, 100)], 100),
        ([Extent(-4096, 4096)], 4096),
        ([Extent(0, 1 << 40)], 4096),
        ([Extent(0, 4096)], 4097),
        ([Extent(0, 4096)], 0),
        ([], 1),
    ],
)
def test_extents_that_are_not_the_image_are_refused(arena: Arena, extents: list[Extent], image_bytes: int) -> None:
    with pytest.raises(LinkError):
        ImageMapping(arena.descriptor, extents, image_bytes)
