"""A picture of the cluster with a memory of what changed last: what the event stream's readers are told is read off it.

Every thing has the number of the change that made it as it is. A reader is one number, its cursor: what is newer is what it has
not been told, however long it was away, so that slow readers cost nothing and bursts run together.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

from msgspec.structs import replace

from schema.admin import StreamFrame, StreamKind

__all__ = ["KINDS", "Key", "News", "Picture"]

KINDS: tuple[StreamKind, ...] = get_args(StreamKind)
_LOGS: tuple[StreamKind, ...] = ("events", "logs")
_START = 0


class Key(NamedTuple):
    kind: StreamKind
    name: str


class _Entry(NamedTuple):
    change: int
    view: Any
    """None for what is gone."""


class News(NamedTuple):
    """What a reader has not been told; ``cursor`` is its own once it has been."""

    cursor: int
    fresh: bool
    gap: bool
    entries: Sequence[tuple[Key, Any]]

    def frames(self, name: str, at: float, part: int) -> Iterator[StreamFrame]:
        """In parts of at most ``part`` things; only the last carries the cursor, which begins with the picture's ``name``."""
        count = max(1, -(-len(self.entries) // part))
        for index in range(count):
            by_kind: dict[str, list[Any]] = {}
            gone: dict[StreamKind, list[str]] = {}
            for key, view in self.entries[index * part : (index + 1) * part]:
                if view is None:
                    gone.setdefault(key.kind, []).append(key.name)
                else:
                    by_kind.setdefault(key.kind, []).append(view)
            last = index == count - 1
            frame = StreamFrame(
                cursor=f"{name}-{self.cursor}" if last else "",
                at=at,
                fresh=self.fresh and index == 0,
                more=not last,
                gap=self.gap and index == 0,
                gone={kind: tuple(names) for kind, names in gone.items()},
            )
            yield replace(frame, **{kind: tuple(views) for kind, views in by_kind.items()})


class Picture:
    """``keep`` bounds events and log lines each, ``gone`` the removed things that are remembered. No more is ever held than
    that and the things themselves."""

    def __init__(self, name: str, *, keep: int, gone: int) -> None:
        self.name = name
        self._keep, self._most_gone = keep, gone
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._names: dict[StreamKind, dict[str, Any]] = {kind: {} for kind in KINDS}
        self._gone: deque[tuple[Key, int]] = deque()
        self._change = _START
        self._forgotten = _START
        self._left_out: dict[StreamKind, int] = dict.fromkeys(_LOGS, _START)

    @property
    def cursor(self) -> int:
        return self._change

    def views(self, kind: StreamKind) -> dict[str, Any]:
        """The things of a kind, by key; not to be changed."""
        return self._names[kind]

    def put(self, kind: StreamKind, name: str, view: Any) -> bool:
        """True if that is new."""
        names = self._names[kind]
        if names.get(name) == view:
            return False
        names[name] = view
        self._note(Key(kind, name), view)
        if kind in _LOGS and len(names) > self._keep:
            oldest = next(iter(names))
            del names[oldest]
            self._left_out[kind] = self._entries.pop(Key(kind, oldest)).change
        return True

    def drop(self, kind: StreamKind, name: str) -> None:
        if self._names[kind].pop(name, None) is None:
            return
        key = Key(kind, name)
        self._note(key, None)
        self._gone.append((key, self._change))
        while len(self._gone) > self._most_gone:
            key, change = self._gone.popleft()
            entry = self._entries.get(key)
            if entry is not None and entry.change == change:
                del self._entries[key]
            self._forgotten = change

    def since(self, cursor: int | None, kinds: frozenset[StreamKind]) -> News:
        """What came after ``cursor``; the whole picture for None, and for one that is too old or not of this picture."""
        if cursor is None or not self._forgotten <= cursor <= self._change:
            whole = [(key, entry.view) for key, entry in self._entries.items() if entry.view is not None and key.kind in kinds]
            return News(self._change, True, False, whole)
        new: list[tuple[Key, Any]] = []
        for key, entry in reversed(self._entries.items()):
            if entry.change <= cursor:
                break
            if key.kind in kinds:
                new.append((key, entry.view))
        new.reverse()
        gap = any(change > cursor for kind, change in self._left_out.items() if kind in kinds)
        return News(self._change, False, gap, new)

    def _note(self, key: Key, view: Any) -> None:
        self._change += 1
        self._entries[key] = _Entry(self._change, view)
        self._entries.move_to_end(key)
