"""Nodes by room: for so many devices of so many bytes each, which nodes have them, the roomiest first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

__all__ = ["RoomIndex"]


class RoomIndex:
    """A node is indexed by the room on its k-th roomiest device, for every number k of devices that was ever asked for.

    A change costs O(log n) comparisons and one move in a list per k; a query yields nodes one by one.
    """

    def __init__(self) -> None:
        self._rooms: dict[str, list[int]] = {}
        self._by_count: dict[int, list[tuple[int, str]]] = {}

    def put(self, node: str, room_bytes: Sequence[int]) -> None:
        """The room on each of a node's devices, in any order; it replaces what was known."""
        rooms = sorted(room_bytes, reverse=True)
        old = self._rooms.get(node)
        if old == rooms:
            return
        self._rooms[node] = rooms
        for count, index in self._by_count.items():
            self._move(index, node, old, rooms, count)

    def drop(self, node: str) -> None:
        """The node takes nothing."""
        old = self._rooms.pop(node, None)
        for count, index in self._by_count.items():
            self._move(index, node, old, None, count)

    def nodes(self, count: int, least_bytes: int) -> Iterator[tuple[int, str]]:
        """(bytes, node) of the nodes that have ``count`` devices with ``least_bytes`` each, the roomiest first."""
        index = self._index(count)
        for place in range(len(index) - 1, -1, -1):
            if index[place][0] < least_bytes:
                return
            yield index[place]

    def room(self, node: str, count: int) -> int | None:
        """The room on the count-th roomiest device of a node; None if it has fewer, or takes nothing."""
        rooms = self._rooms.get(node)
        return rooms[count - 1] if rooms is not None and len(rooms) >= count else None

    def at(self, count: int, place: int) -> str:
        """The node at a place in the order of `nodes`, counted from 0."""
        return self._index(count)[-1 - place][1]

    def count(self, count: int, least_bytes: int) -> int:
        """How many nodes `nodes` would yield."""
        index = self._index(count)
        return len(index) - bisect_left(index, (least_bytes, ""))

    def _index(self, count: int) -> list[tuple[int, str]]:
        index = self._by_count.get(count)
        if index is None:
            found = ((rooms[count - 1], node) for node, rooms in self._rooms.items() if len(rooms) >= count)
            index = self._by_count[count] = sorted(found)
        return index

    @staticmethod
    def _move(index: list[tuple[int, str]], node: str, old: list[int] | None, new: list[int] | None, count: int) -> None:
        before = (old[count - 1], node) if old is not None and len(old) >= count else None
        after = (new[count - 1], node) if new is not None and len(new) >= count else None
        if before == after:
            return
        if before is not None:
            del index[bisect_left(index, before)]
        if after is not None:
            insort(index, after)
