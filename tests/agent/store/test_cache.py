"""The DRAM tier: fills, sharing, eviction, giving up, faults, and the next life."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.native import threads
from agent.native.arena import Arena
from agent.native.reader import Priority, ReadJob, ReadPool
from agent.store import catalog
from schema.errors import Conflict, NotFound, SllmError
from schema.link import Arriving, LayersArrived
from tests.agent.native.clock import STALL_S, Clock
from tests.agent.store.images import CHUNK, Bench, Borrower, HandPool, commit, read_image


@pytest.mark.parametrize("size_bytes", [1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 4096, 3 * CHUNK + 5])
def test_image_arrives_to_the_byte(bench: Bench, tmp_path: Path, size_bytes: int) -> None:
    digest, directory, image = commit(tmp_path, 1, size_bytes)
    bench.fill("a", digest, directory)
    resident = bench.told.resident["a"]
    assert resident.read_bytes == resident.image_bytes == len(image)
    assert read_image(bench.arena.descriptor, resident) == image
    assert bench.told.steps[-1] == ("a", len(image), len(image))


@pytest.mark.parametrize("checksum_bytes", [4096, 12288, CHUNK * 2, CHUNK * 4])
def test_partitions_and_checksums_need_not_match_chunks(bench: Bench, tmp_path: Path, checksum_bytes: int) -> None:
    digest, directory, image = commit(tmp_path, 1, CHUNK + 12345, partitions=3, checksum_bytes=checksum_bytes)
    bench.fill("a", digest, directory)
    assert read_image(bench.arena.descriptor, bench.told.resident["a"]) == image
    assert catalog.is_verified(directory)


def test_two_ops_share_one_fill_and_a_third_reads_nothing(bench: Bench, tmp_path: Path) -> None:
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK)
    bench.store.fill("a", digest, directory, users=1)
    bench.store.fill("b", digest, directory, users=2)
    assert bench.store.filling() == ("a", "b")
    bench.wait("a", "b")
    bench.store.fill("c", digest, directory, users=3)
    assert bench.told.resident["c"].read_bytes == 0
    assert bench.told.resident["c"].users == 3
    assert bench.store.arena.used_bytes == 2 * CHUNK


@pytest.fixture
def by_hand() -> Iterator[tuple[Bench, HandPool]]:
    pool = HandPool()
    bench = Bench(Arena.create(8 * CHUNK, CHUNK), pool=pool)
    yield bench, pool
    bench.close()


def test_layers_are_offered_as_they_come_and_where_they_lie(
    by_hand: tuple[Bench, HandPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.store.cache._SOON_S", 1e9)  # however long the machine takes for the first unit
    bench, pool = by_hand
    digest, directory, image = commit(tmp_path, 1, 4 * CHUNK, layer_ends=(2 * CHUNK, 3 * CHUNK))
    bench.store.fill("a", digest, directory)
    (job,) = pool.jobs
    told = bench.told.coming
    bench.store.pump()
    assert not told, "nothing has come, so nobody knows when the rest will"
    pool.arrive(job, 0)
    bench.store.pump()
    (first,) = told
    assert isinstance(first, Arriving)
    assert (first.op, first.digest, first.image_bytes, first.layers) == ("a", digest, len(image), 0)
    pool.arrive(job, 2)  # not without a gap
    bench.store.fill("b", digest, directory)
    bench.store.pump()
    second = told.pop()
    assert isinstance(second, Arriving)
    assert (second.op, second.extents, second.layers) == ("b", first.extents, 0)
    pool.arrive(job, 1)
    bench.store.pump()
    assert told[1:] == [LayersArrived(op="a", layers=2), LayersArrived(op="b", layers=2)]
    bench.store.pump()
    assert len(told) == 3
    pool.finish(job)
    bench.store.pump()
    assert bench.told.resident["a"].extents == first.extents
    bench.store.fill("c", digest, directory)
    assert "c" in bench.told.resident
    assert len(told) == 3


def test_what_is_not_soon_there_is_not_offered(
    by_hand: tuple[Bench, HandPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, pool = by_hand
    digest, directory, _ = commit(tmp_path, 1, 4 * CHUNK, layer_ends=(CHUNK, 3 * CHUNK))
    bench.store.fill("a", digest, directory)
    monkeypatch.setattr("agent.store.cache._SOON_S", 0.0)
    pool.arrive(pool.jobs[0], 0, 1)
    bench.store.pump()
    assert not bench.told.coming
    monkeypatch.setattr("agent.store.cache._SOON_S", 1e9)
    bench.store.pump()
    assert [message.layers for message in bench.told.coming] == [1]
    pool.finish(pool.jobs[0], SllmError("the disk has gone"))
    bench.store.pump()
    assert bench.told.faults["a"].message == "the disk has gone"
    assert len(bench.told.coming) == 1


def test_a_prefetch_that_a_start_waits_for_is_raised(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[tuple[Priority, Priority]] = []
    real = ReadPool.raise_priority

    def seen(pool: ReadPool, job: ReadJob, priority: Priority) -> None:
        before = job.priority
        real(pool, job, priority)
        raised.append((before, job.priority))

    monkeypatch.setattr(ReadPool, "raise_priority", seen)
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK)
    bench.store.fill("a", digest, directory, priority=Priority.PREFETCH)
    bench.store.fill("b", digest, directory, users=2, priority=Priority.REQUEST)
    assert raised == [(Priority.PREFETCH, Priority.REQUEST)]
    bench.wait("a", "b")


def test_least_recently_used_goes_first_and_users_stay(bench: Bench, tmp_path: Path) -> None:
    made = [commit(tmp_path, number, 3 * CHUNK) for number in range(4)]
    for number in (0, 1):
        bench.fill(f"op{number}", made[number][0], made[number][1])
        bench.store.hold(made[number][0], 0)
    bench.store.hold(made[0][0], 1)
    bench.fill("op2", made[2][0], made[2][1])
    assert bench.told.evictions == [(made[1][0], "to make room", made[2][0])]
    bench.store.fill("op3", made[3][0], made[3][1])
    assert bench.told.faults["op3"].code == "out_of_space"
    assert bench.told.gone == [made[1][0]]
    assert read_image(bench.arena.descriptor, bench.told.resident["op0"]) == made[0][2]


def test_what_is_pinned_is_neither_evicted_nor_dropped(bench: Bench, tmp_path: Path) -> None:
    made = [commit(tmp_path, number, 3 * CHUNK) for number in range(3)]
    bench.store.pin([made[0][0]])
    for number in (0, 1, 2):
        bench.fill(f"op{number}", made[number][0], made[number][1], users=0)
    assert bench.told.gone == [made[1][0]]
    with pytest.raises(Conflict, match="pinned"):
        bench.store.drop(made[0][0])
    bench.store.pin([made[0][0], made[2][0]])
    bench.store.fill("op3", made[1][0], made[1][1])
    assert bench.told.faults["op3"].code == "out_of_space"
    bench.store.pin([])
    bench.store.drop(made[0][0])
    assert {resident.digest for resident in bench.store.residents()} == {made[2][0]}


def test_image_larger_than_the_arena_is_refused_and_evicts_nothing(bench: Bench, tmp_path: Path) -> None:
    small, big = commit(tmp_path, 1, CHUNK), commit(tmp_path, 2, 9 * CHUNK)
    bench.fill("a", small[0], small[1], users=0)
    bench.store.fill("b", big[0], big[1])
    assert bench.told.faults["b"].code == "out_of_space"
    assert [resident.digest for resident in bench.store.residents()] == [small[0]]


def test_fill_that_nobody_waits_for_is_given_up_and_can_be_asked_for_again(bench: Bench, tmp_path: Path) -> None:
    digest, directory, image = commit(tmp_path, 1, 7 * CHUNK)
    other = commit(tmp_path, 2, 6 * CHUNK)
    bench.store.fill("a", digest, directory)
    bench.store.hold(digest, 0)
    bench.store.fill("b", digest, directory)  # while the first read still unwinds
    bench.store.fill("other", other[0], other[1])
    bench.wait("a", "b", "other")
    answered = {op: "faulted" if op in bench.told.faults else "filled" for op in ("a", "b", "other")}
    assert answered in (
        {"a": "faulted", "b": "filled", "other": "faulted"},
        {"a": "filled", "b": "filled", "other": "faulted"},  # the read was over before the cancel
    )
    assert read_image(bench.arena.descriptor, bench.told.resident["b"]) == image


def test_waiting_behind_a_given_up_read_ends_when_its_users_go(bench: Bench, tmp_path: Path) -> None:
    digest, directory, _ = commit(tmp_path, 1, 4 * CHUNK)
    bench.store.fill("a", digest, directory)
    bench.store.hold(digest, 0)
    bench.store.fill("b", digest, directory)
    bench.store.hold(digest, 0)
    assert bench.told.faults["b"].code == "cancelled"
    bench.wait("a")
    assert bench.store.filling() == ()


def test_wrong_chunk_names_file_and_offset_and_quarantines(bench: Bench, tmp_path: Path) -> None:
    digest, directory, image = commit(tmp_path, 1, 3 * CHUNK)
    damaged = bytearray(image)
    damaged[CHUNK + 77] ^= 1
    (directory / "partition_0.bin").write_bytes(damaged)
    bench.fill("a", digest, directory)
    fault = bench.told.faults["a"]
    assert fault.code == "invalid_checkpoint"
    assert str(directory / "partition_0.bin") in fault.message
    assert f"offset {CHUNK}" in fault.message
    assert bench.store.arena.used_bytes == 0
    assert catalog.scan(tmp_path)[digest].quarantined == fault.message
    bench.store.fill("b", digest, directory)
    assert bench.told.faults["b"].code == "invalid_checkpoint"


def test_checksums_are_looked_at_once(bench: Bench, tmp_path: Path) -> None:
    digest, directory, image = commit(tmp_path, 1, CHUNK)
    bench.fill("a", digest, directory, users=0)
    bench.store.drop(digest)
    (directory / "partition_0.bin").write_bytes(bytes(len(image)))
    bench.fill("b", digest, directory)
    assert read_image(bench.arena.descriptor, bench.told.resident["b"]) == bytes(len(image))


@pytest.mark.parametrize("damage", ["short", "long", "gone", "link", "no manifest", "moved"])
def test_damaged_copy_is_an_invalid_checkpoint_and_leaks_nothing(bench: Bench, tmp_path: Path, damage: str) -> None:
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK)
    file = directory / "partition_0.bin"
    if damage in ("short", "long"):
        os.truncate(file, 2 * CHUNK + (-4096 if damage == "short" else 4096))
    elif damage == "gone":
        file.unlink()
    elif damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "no manifest":
        (directory / "manifest.json").unlink()
    else:
        directory = directory.rename(directory.parent / "exec2")
    bench.store.fill("a", digest, directory)
    assert bench.told.faults["a"].code == "invalid_checkpoint"
    assert bench.store.arena.used_bytes == 0


def test_drop_refuses_what_is_used_or_on_its_way(bench: Bench, tmp_path: Path) -> None:
    digest, directory, _ = commit(tmp_path, 1, CHUNK)
    with pytest.raises(NotFound):
        bench.store.drop(digest)
    bench.store.fill("a", digest, directory)
    with pytest.raises(Conflict):
        bench.store.drop(digest)
    bench.wait("a")
    with pytest.raises(Conflict):
        bench.store.drop(digest)
    bench.store.hold(digest, 0)
    bench.store.drop(digest)
    assert bench.store.residents() == ()
    assert bench.store.arena.used_bytes == 0


def test_next_life_has_whole_checkpoints_with_their_users_and_drops_the_rest(tmp_path: Path) -> None:
    whole, partial = commit(tmp_path, 1, 3 * CHUNK), commit(tmp_path, 2, CHUNK)
    bench = Bench(Arena.create(8 * CHUNK, CHUNK))
    bench.fill("a", whole[0], whole[1], users=2)
    bench.arena.table.begin(5, partial[0], "0" * 32, CHUNK, [7])
    descriptor = os.dup(bench.arena.descriptor)
    bench.close()
    again = Bench(Arena.adopt(descriptor, 8 * CHUNK, CHUNK))
    (resident,) = again.store.residents()
    assert (resident.digest, resident.users) == (whole[0], 2)
    assert read_image(descriptor, resident) == whole[2]
    assert again.store.arena.used_bytes == 3 * CHUNK
    again.close()


@pytest.mark.parametrize("seed", range(12))
def test_nothing_leaks_and_all_is_answered_whatever_is_given_up(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    made = [commit(tmp_path, number, size * CHUNK) for number, size in enumerate((1, 2, 3, 4))]
    (made[1][1] / "partition_0.bin").write_bytes(bytes(2 * CHUNK))  # never right
    bench = Bench(Arena.create(6 * CHUNK, CHUNK))
    ops = []
    for number in range(60):
        digest, directory, _ = chance.choice(made)
        if chance.random() < 0.5:
            ops.append(f"op{number}")
            bench.store.fill(ops[-1], digest, directory, users=1)
        else:
            bench.store.hold(digest, chance.randrange(2))
        if chance.random() < 0.3:
            bench.store.pump()
        assert bench.store.arena.used_bytes <= 6 * CHUNK
    bench.wait(*ops)
    assert bench.store.filling() == ()
    for resident in bench.store.residents():
        assert read_image(bench.arena.descriptor, resident) == made[int(resident.digest, 16)][2]
        bench.store.hold(resident.digest, 0)
        bench.store.drop(resident.digest)
    assert bench.store.arena.used_bytes == 0
    bench.close()


def hold_reads(monkeypatch: pytest.MonkeyPatch, digest: str) -> tuple[threading.Event, threading.Event]:
    """Reads of a checkpoint say that they have begun by the first event, and come back after the second is set."""
    entered, leave = threading.Event(), threading.Event()
    real = os.preadv

    def held(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if digest in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            entered.set()
            assert leave.wait(100)
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(threads.os, "preadv", held)
    return entered, leave


def test_a_disk_that_stalls_is_answered_for_and_keeps_only_its_own_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    stuck, next_one, big = (commit(tmp_path, number, size * CHUNK) for number, size in ((1, 3), (2, 5), (3, 6)))
    entered, leave = hold_reads(monkeypatch, stuck[0])
    bench = Bench(Arena.create(8 * CHUNK, CHUNK), pool=ReadPool(2, backend="threads", stall_s=STALL_S))
    bench.store.fill("a", stuck[0], stuck[1])
    assert entered.wait(100)
    bench.store.hold(stuck[0], 0)
    bench.store.fill("b", stuck[0], stuck[1])
    bench.store.fill("big", big[0], big[1])
    clock.forward()
    bench.wait("a", "b", "big")
    assert bench.told.faults["a"].code == bench.told.faults["b"].code == "timed_out"
    assert f"{stuck[1] / 'partition_0.bin'} at byte" in bench.told.faults["a"].message
    assert bench.told.faults["big"].code == "out_of_space"
    bench.store.fill("c", stuck[0], stuck[1])
    assert bench.told.faults["c"].code == "timed_out"
    bench.fill("d", next_one[0], next_one[1])
    assert read_image(bench.arena.descriptor, bench.told.resident["d"]) == next_one[2]
    assert bench.store.arena.used_bytes == 8 * CHUNK
    bench.store.hold(next_one[0], 0)
    # A store that starts when this one is gone has other memory in the place of what the read may yet write into.
    with next_life(bench) as later:
        assert [resident.digest for resident in later.store.residents()] == [next_one[0]]
        assert later.store.arena.used_bytes == 5 * CHUNK
    leave.set()
    while bench.store.arena.used_bytes > 5 * CHUNK:
        bench.turn()
    bench.fill("e", stuck[0], stuck[1])
    assert read_image(bench.arena.descriptor, bench.told.resident["e"]) == stuck[2]
    bench.close()


def test_a_store_that_ends_under_a_read_leaves_its_memory_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, whole = commit(tmp_path, 1, 2 * CHUNK), commit(tmp_path, 2, CHUNK)
    entered, leave = hold_reads(monkeypatch, stuck[0])
    bench = Bench(Arena.create(4 * CHUNK, CHUNK), pool=(pool := ReadPool(2, backend="threads", stall_s=STALL_S)))
    bench.fill("whole", *whole[:2])
    bench.store.fill("stuck", *stuck[:2])
    assert entered.wait(100)
    pool._reader._stall_s = 0.1  # type: ignore[union-attr]
    bench.store.close()
    assert len(bench.arena.table.filling()) == 2
    leave.set()


def test_an_image_that_was_found_wrong_is_wrong_for_every_later_store(tmp_path: Path) -> None:
    digest, directory, _ = commit(tmp_path, 1, 2 * CHUNK)
    with contextlib.closing(Bench(Arena.create(4 * CHUNK, CHUNK))) as bench:
        bench.fill("a", digest, directory)
        bench.store.hold(digest, 1, condemned="a byte is wrong")
        with next_life(bench) as later:
            (resident,) = later.store.residents()
            assert resident.condemned
            later.store.fill("b", digest, directory)
            assert later.told.faults["b"].code == "invalid_checkpoint"
            later.store.hold(digest, 0)
            assert later.told.gone == [digest]
            later.store.fill("c", digest, directory)
            later.wait("c")
            assert not later.told.resident["c"].condemned
        with next_life(bench) as last:
            assert [resident.condemned for resident in last.store.residents()] == [""]


@contextlib.contextmanager
def next_life(bench: Bench) -> Iterator[Bench]:
    """The store that takes over the arena of one that was killed."""
    arena = bench.arena
    later = Bench(Arena.adopt(os.dup(arena.descriptor), arena.chunks * arena.chunk_bytes, arena.chunk_bytes))
    try:
        yield later
    finally:
        later.close()


def two_copies(tmp_path: Path) -> tuple[str, tuple[Path, str, bytes], tuple[Path, str, bytes]]:
    """One digest as two copies whose bytes lie differently: of each the directory, the image's id and the image."""
    digest, *first = commit(tmp_path / "one", 1, 2 * CHUNK)
    _, *second = commit(tmp_path / "other", 1, CHUNK, partitions=2)
    copies = [(directory, catalog.read_entry(directory).manifest.image_id, image) for directory, image in (first, second)]
    assert len({image_id for _, image_id, _ in copies}) == len({image for _, _, image in copies}) == 2
    return digest, copies[0], copies[1]


def test_a_copy_never_gets_the_image_of_another_of_the_same_digest(bench: Bench, tmp_path: Path) -> None:
    digest, (directory, image_id, _), (other, other_id, _) = two_copies(tmp_path)
    bench.store.fill("a", digest, directory, image_id=image_id)
    bench.store.fill("too early", digest, other, image_id=other_id)
    bench.wait("a", "too early")
    bench.store.fill("too late", digest, other, image_id=other_id)
    assert bench.told.resident["a"].image_id == image_id
    assert [bench.told.faults[op].code for op in ("too early", "too late")] == ["conflict", "conflict"]
    bench.store.close()
    bench.store = Bench(Arena.adopt(os.dup(bench.arena.descriptor), 8 * CHUNK, CHUNK)).store
    (resident,) = bench.store.residents()
    assert resident.image_id == image_id
    assert not bench.store.has_sound(digest, other_id)
    assert bench.store.has_sound(digest, image_id)


def test_once_an_image_has_gone_another_copy_of_its_digest_is_loaded(bench: Bench, tmp_path: Path) -> None:
    digest, (directory, image_id, _), (other, other_id, other_image) = two_copies(tmp_path)
    bench.fill("a", digest, directory, image_id=image_id)
    bench.store.hold(digest, 0)
    bench.store.pin([digest])  # which is of the checkpoint, not of an image that no copy has any more
    bench.store.drop(digest, image_id)
    bench.fill("b", digest, other, image_id=other_id)
    assert read_image(bench.arena.descriptor, bench.told.resident["b"]) == other_image


@pytest.mark.parametrize("why", ["verified", "lent"])
def test_an_image_that_is_looked_at_goes_after_that_and_what_is_to_take_its_place_waits(
    by_hand: tuple[Bench, HandPool], tmp_path: Path, why: str
) -> None:
    bench, pool = by_hand
    digest, (directory, image_id, _), (other, other_id, _) = two_copies(tmp_path)
    bench.store.fill("a", digest, directory, image_id=image_id)
    pool.finish(pool.jobs.pop())
    bench.wait("a")
    if why == "lent":
        bench.store.bring(Borrower(), digest, directory, Priority.REQUEST, image_id)
    else:
        bench.store.verify("v", digest, directory)
        deadline = time.monotonic() + 100
        while not pool.jobs:
            assert time.monotonic() < deadline, "its copy is not read"
            time.sleep(0.001)
    with pytest.raises(Conflict, match="goes after that"):
        bench.store.drop(digest, image_id)
    bench.store.fill("b", digest, other, image_id=other_id)
    assert (bench.told.faults, bench.told.gone) == ({}, [])
    if why == "lent":
        bench.store.give_back(digest)
    else:
        bench.store.cancel_verify("v")
        pool.finish(pool.jobs.pop())
        while not bench.told.gone:
            bench.turn()
    assert bench.told.gone == [digest]
    pool.finish(pool.jobs.pop())
    bench.wait("b")
    assert bench.told.resident["b"].image_id == other_id


def test_an_image_that_is_to_go_stays_if_it_is_asked_for_before(by_hand: tuple[Bench, HandPool], tmp_path: Path) -> None:
    bench, pool = by_hand
    digest, (directory, image_id, _), _ = two_copies(tmp_path)
    bench.store.bring(Borrower(), digest, directory, Priority.REQUEST, image_id)
    pool.finish(pool.jobs.pop())
    bench.turn()
    with pytest.raises(Conflict):
        bench.store.drop(digest, image_id)
    bench.store.fill("a", digest, directory, image_id=image_id)
    bench.store.give_back(digest)
    assert bench.told.gone == []
    assert bench.told.resident["a"].image_id == image_id


def test_what_was_replaced_since_it_was_looked_at_is_not_loaded(bench: Bench, tmp_path: Path) -> None:
    digest, (directory, _, _), (_, other_id, _) = two_copies(tmp_path)
    bench.store.fill("a", digest, directory, image_id=other_id)
    assert bench.told.faults["a"].code == "conflict"
    assert bench.store.arena.used_bytes == 0
