"""What lies in the arena: who keeps it there, what goes first, and that nothing of it is remembered when it has gone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent.native.arena import Arena
from agent.store.residency import OF_NO_USE, Residency
from schema.errors import Conflict, NotFound, OutOfSpace

CHUNK = 2 << 20


class Held:
    """A residency over six chunks, what went of it, and what is being compared."""

    def __init__(self) -> None:
        self.arena = Arena.create(6 * CHUNK, CHUNK)
        self.gone: list[str] = []
        self.why: list[tuple[str, str]] = []
        self.compared: set[str] = set()
        self.residency = Residency(self.arena, self._went, lambda: self.compared)

    def put(self, number: int, chunks: int) -> str:
        digest = f"{number:064x}"
        assert self.residency.make_room(digest, chunks * CHUNK, ())
        self.residency.commit(self.residency.begin(digest, "0" * 32, chunks * CHUNK))
        return digest

    def _went(self, digest: str, why: str, for_digest: str) -> None:
        self.gone.append(digest)
        self.why.append((why, for_digest))


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.arena.close()


def test_what_was_used_longest_ago_goes_first_and_no_more_than_must(held: Held) -> None:
    first, second, third = held.put(1, 2), held.put(2, 2), held.put(3, 2)
    occupant = held.residency.get(first)
    assert occupant is not None
    held.residency.use(occupant)
    fourth = held.put(4, 1)
    assert (held.gone, held.why) == ([second], [("to make room", fourth)])
    assert held.residency.used_chunks == 5
    assert third in held.residency


@pytest.mark.parametrize("kept", ["users", "pinned", "lent", "compared"])
def test_what_is_kept_stays_and_nothing_goes_in_vain(held: Held, kept: str) -> None:
    one, other = held.put(1, 3), held.put(2, 3)
    if kept == "users":
        held.residency.count(one, 1)
        occupant = held.residency.get(one)
        assert occupant is not None
        held.residency.use(occupant)
    elif kept == "pinned":
        held.residency.pin([one])
    elif kept == "lent":
        held.residency.lend(one)
    else:
        held.compared.add(one)
    with pytest.raises(OutOfSpace) as refused:
        held.residency.make_room("3" * 64, 4 * CHUNK, ())
    assert ("unpin" in str(refused.value)) is (kept == "pinned")
    with pytest.raises(Conflict):
        held.residency.drop(one)
    assert held.gone == []
    held.residency.drop(other)
    with pytest.raises(NotFound):
        held.residency.drop(other)


def test_an_image_that_is_named_is_dropped_whoever_is_counted_or_pinned_it(held: Held) -> None:
    one = held.put(1, 3)
    held.residency.pin([one])
    with pytest.raises(NotFound):
        held.residency.drop(one, "1" * 32)
    held.residency.count(one, 1)
    occupant = held.residency.get(one)
    assert occupant is not None
    held.residency.use(occupant)
    held.residency.lend(one)
    with pytest.raises(Conflict, match="copied"):
        held.residency.drop(one, "0" * 32)
    held.residency.give_back(one)
    assert (held.gone, held.why) == ([one], [(OF_NO_USE, "")])
    assert held.residency.has_users(one), "they wait for another"
    one = held.put(1, 3)
    held.residency.drop(one, "0" * 32)
    assert one not in held.residency
    assert (held.gone, held.why) == ([one] * 2, [(OF_NO_USE, "")] * 2), "nobody has asked for that by its name"
    other = held.put(2, 1)
    occupant = held.residency.get(other)
    assert occupant is not None
    held.residency.use(occupant)
    held.residency.condemn(occupant, "a byte is wrong")
    held.residency.drop(other, "0" * 32)
    assert held.why[2:] == [("a byte is wrong", "")]


def test_room_that_will_be_free_is_waited_for(held: Held) -> None:
    ending = held.residency.begin("1" * 64, "0" * 32, 4 * CHUNK)
    assert not held.residency.make_room("2" * 64, 3 * CHUNK, [ending])
    held.residency.release(ending)
    assert held.residency.make_room("2" * 64, 3 * CHUNK, ())


def test_what_was_found_wrong_goes_with_the_last_who_needs_it_and_is_forgotten(held: Held) -> None:
    digest = held.put(1, 2)
    occupant = held.residency.get(digest)
    assert occupant is not None
    held.residency.lend(digest)
    held.residency.condemn(occupant, "a byte is wrong")
    assert not held.residency.drop_condemned(occupant)
    held.residency.give_back(digest)
    assert (held.gone, held.why) == ([digest], [("a byte is wrong", "")])
    assert held.residency.condemned(digest) is None
    again = held.residency.get(held.put(1, 2))
    assert again is not None
    held.residency.condemn(again, "a byte is wrong")
    held.residency.drop(digest)
    assert held.residency.condemned(digest) is None, "whoever brings it anew has another image"
