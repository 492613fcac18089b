"""What lies in the arena, who keeps it there, and what goes when room is needed: the part of the DRAM tier that reads nothing.

Nothing goes that has users, is pinned, lent to a device's copy, or being compared with its checksums. What was found wrong goes
as soon as none of its users, loans and comparisons is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Final

from agent.native.arena import Arena
from agent.native.chunk_table import Occupant
from agent.store.room import FreeChunks
from schema.errors import Conflict, NotFound, OutOfSpace
from schema.link import Resident

__all__ = ["OF_NO_USE", "Residency"]

_CONDEMNED_BEFORE: Final = "its image in memory was found wrong before the store was started"
OF_NO_USE: Final = "another image of it is wanted, or no copy on the disk can be used with it any more"
"""Why an image goes that nobody asked to drop by its checkpoint's name."""
_MAKE_ROOM: Final = "to make room"


class Residency:
    """The residents of one arena, and its free chunks and slots. One thread calls it.

    ``evicted`` hears of what went without being dropped by its name, why, and for which other if it was for one, before its
    chunks are given away. ``compared`` says what must stay where it is since it is being compared.
    """

    def __init__(self, arena: Arena, evicted: Callable[[str, str, str], None], compared: Callable[[], Collection[str]]) -> None:
        self._arena = arena
        self._evicted = evicted
        self._compared = compared
        self._residents = {occupant.digest: occupant for occupant in arena.occupants}
        self._users = {occupant.digest: occupant.users for occupant in arena.occupants if occupant.users}
        self._condemned = {each.digest: _CONDEMNED_BEFORE for each in arena.occupants if each.condemned}
        self._pinned: frozenset[str] = frozenset()
        self._lent: Counter[str] = Counter()
        self._leaving: set[str] = set()
        taken = [chunk for occupant in arena.occupants for chunk in occupant.chunks]
        self._free = FreeChunks(arena.chunks, (*taken, *arena.table.lost_chunks))
        self._free_slots = set(range(arena.slots)) - {each.slot for each in arena.occupants}
        self._stamp = max((occupant.stamp for occupant in arena.occupants), default=0)

    def __contains__(self, digest: str) -> bool:
        return digest in self._residents

    @property
    def used_chunks(self) -> int:
        """Chunks that are not free."""
        return self._arena.chunks - len(self._free)

    def get(self, digest: str) -> Occupant | None:
        return self._residents.get(digest)

    def told(self) -> tuple[Resident, ...]:
        """All residents, as they are stated on a link."""
        return tuple(self.tell(occupant) for occupant in self._residents.values())

    def tell(self, occupant: Occupant, op: str = "", read_bytes: int = 0) -> Resident:
        """A resident as it is stated on a link, in answer to ``op``."""
        return Resident(
            digest=occupant.digest,
            image_id=occupant.image_id,
            extents=self._arena.extents(occupant.chunks),
            image_bytes=occupant.image_bytes,
            users=occupant.users,
            op=op,
            read_bytes=read_bytes,
            condemned=self._condemned.get(occupant.digest, ""),
        )

    # --- who keeps it there

    def count(self, digest: str, users: int) -> None:
        """The agent's last word on who uses a checkpoint counts, wherever that is by now."""
        if users:
            self._users[digest] = users
        else:
            self._users.pop(digest, None)

    def has_users(self, digest: str) -> bool:
        return digest in self._users

    def forget_others(self) -> None:
        """Of what does not lie here it is not known any more who uses it."""
        self._users = {digest: users for digest, users in self._users.items() if digest in self._residents}

    def use(self, occupant: Occupant) -> None:
        """It is used now, by those who were counted."""
        self._stamp += 1
        occupant.users, occupant.stamp = self._users.get(occupant.digest, 0), self._stamp
        self._arena.table.note(occupant)

    def pin(self, digests: Iterable[str]) -> None:
        """All that is kept, once it is there."""
        self._pinned = frozenset(digests)

    def lend(self, digest: str) -> None:
        """A copy reads from it, until `give_back`."""
        self._lent[digest] += 1

    def give_back(self, digest: str) -> None:
        self._lent[digest] -= 1
        if not self._lent[digest]:
            del self._lent[digest]
            if (occupant := self._residents.get(digest)) is not None:
                self.drop_condemned(occupant)

    # --- what was found wrong, or is of no use

    def condemned(self, digest: str) -> str | None:
        """Why an image must not be used any more, or None."""
        return self._condemned.get(digest)

    def condemn(self, occupant: Occupant, why: str) -> None:
        """It was found wrong: nobody new gets it."""
        self._condemned[occupant.digest] = why
        self._arena.table.condemn(occupant)

    def leaves(self, digest: str) -> bool:
        """True while an image is to go as soon as it is neither lent nor compared."""
        return digest in self._leaving

    def stays(self, digest: str) -> None:
        """It is of use after all."""
        self._leaving.discard(digest)

    def drop_condemned(self, occupant: Occupant) -> bool:
        """Free an image that was found wrong, if nobody uses it any more, or that is of no use."""
        digest = occupant.digest
        if digest not in self._leaving and (digest not in self._condemned or occupant.users):
            return False
        if digest in self._compared() or self._lent[digest]:
            return False
        self._evict(occupant, self._condemned.get(digest, OF_NO_USE))
        return True

    # --- room

    def make_room(self, digest: str, image_bytes: int, ending: Collection[Occupant]) -> bool:
        """True when chunks and a slot for an image of this checkpoint are free now, evicting what must go; False when they will
        be, once what is ``ending`` has ended. Raises OutOfSpace, nothing evicted, when they will not."""
        needed = self._arena.chunks_for(image_bytes)
        kept = self._pinned.union(self._compared(), self._lent)
        free = (each for each in self._residents.values() if not each.users and each.digest not in kept)
        idle = sorted(free, key=lambda each: each.stamp)
        chunks, slots = len(self._free), len(self._free_slots)
        victims: list[Occupant] = []
        for occupant in idle:
            if chunks >= needed and slots:
                break
            victims.append(occupant)
            chunks += len(occupant.chunks)
            slots += 1
        if chunks < needed or not slots:
            if chunks + sum(len(each.chunks) for each in ending) >= needed and slots + len(ending):
                return False
            whole, pinned = self._arena.chunks * self._arena.chunk_bytes, self._pinned & self._residents.keys()
            raise OutOfSpace(
                f"the arena has no room for {image_bytes} bytes: of {whole} bytes {chunks * self._arena.chunk_bytes} are free "
                f"or idle; stop an instance,{' unpin a checkpoint,' if pinned else ''} or give the node a larger arena"
            )
        for occupant in victims:
            self._evict(occupant, _MAKE_ROOM, digest)
        return True

    def begin(self, digest: str, image_id: str, image_bytes: int) -> Occupant:
        """Chunks and a slot for an image that is to be filled, for which `make_room` has made room."""
        chunks = self._free.take(self._arena.chunks_for(image_bytes))
        return self._arena.table.begin(self._free_slots.pop(), digest, image_id, image_bytes, chunks)

    def commit(self, occupant: Occupant) -> None:
        """All of it is there and right."""
        self._arena.table.commit(occupant)
        self._residents[occupant.digest] = occupant
        self.use(occupant)

    def release(self, occupant: Occupant) -> None:
        """Free the chunks of what is no resident, and that nothing reads into any more."""
        self._arena.table.release(occupant)
        self._free.give(occupant.chunks)
        self._free_slots.add(occupant.slot)

    def drop(self, digest: str, image_id: str = "") -> None:
        """Free a resident's chunks. Raises Conflict when it has users, is pinned, lent or being compared, NotFound. With
        ``image_id`` those of this one image, whoever is counted or pinned it, since they wait for another: one that is lent or
        being compared goes after that."""
        occupant = self._residents.get(digest)
        if occupant is None or image_id not in ("", occupant.image_id):
            raise NotFound(f"checkpoint {digest} is not in this node's memory")
        if occupant.users and not image_id:
            raise Conflict(f"checkpoint {digest} has {occupant.users} users; stop its instances first")
        if digest in self._pinned and not image_id:
            raise Conflict(f"checkpoint {digest} is pinned in memory; unpin it first")
        if self._lent[digest] or digest in self._compared():
            what = "copied to a device" if self._lent[digest] else "verified"
            if image_id:
                self._leaving.add(digest)
            then = "it goes after that" if image_id else "wait until that has ended"
            raise Conflict(f"checkpoint {digest} is just being {what}; {then}")
        if image_id:
            self._evict(occupant, self._condemned.get(digest, OF_NO_USE))
            return
        self._forget(occupant)
        self.release(occupant)

    def _evict(self, occupant: Occupant, why: str, for_digest: str = "") -> None:
        self._forget(occupant)
        self._evicted(occupant.digest, why, for_digest)
        self.release(occupant)

    def _forget(self, occupant: Occupant) -> None:
        del self._residents[occupant.digest]
        self._condemned.pop(occupant.digest, None)
        self._leaving.discard(occupant.digest)
