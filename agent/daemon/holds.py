"""Who uses which checkpoint in the arena: counted by user, told to the store as a number."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Holds"]


class Holds:
    """Users per digest. A user is an instance's life, until its process is proven dead, or a load that is under way."""

    def __init__(self, changed: Callable[[str, int], None]) -> None:
        self._users: dict[str, dict[str, bool]] = {}
        self._changed = changed

    def add(self, digest: str, user: str, *, waits: bool = False) -> None:
        """Count a user. One that ``waits`` has not asked for weights yet, and so does not use what lies there until it is
        added again without."""
        users = self._users.setdefault(digest, {})
        known = user in users
        users[user] = waits
        if not known:
            self._changed(digest, len(users))

    def release(self, digest: str, user: str) -> None:
        """The user is gone; one that is not counted changes nothing."""
        users = self._users.get(digest)
        if users is None or user not in users:
            return
        del users[user]
        if not users:
            del self._users[digest]
        self._changed(digest, len(users))

    def count(self, digest: str) -> int:
        return len(self._users.get(digest, ()))

    def idle(self, digest: str) -> bool:
        """True when nobody uses what lies there now, though some may wait."""
        return all(self._users.get(digest, {}).values())

    def users(self, digest: str) -> tuple[str, ...]:
        return tuple(sorted(self._users.get(digest, ())))

    def counts(self) -> dict[str, int]:
        return {digest: len(users) for digest, users in self._users.items()}
