"""The interface of the checkpoint store: what lies in which tier of this node, who uses it, and how it gets there.

The store is a process of its own, spoken to over its link (`FillArena`, `HoldCheckpoint`, `DropResident`; `Resident`,
`Evicted`, `Progress`, `OperationDone`). This protocol is what stands behind that link; its owner calls it from one thread.
Fills run in the background and report through a `StoreListener`, on that same thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from agent.native.jobs import Priority, Unit
from schema.errors import Fault, SllmError
from schema.link import ArenaInfo, Arriving, LayersArrived, Resident

__all__ = ["FillSink", "Store", "StoreListener"]


class StoreListener(Protocol):
    """Who hears of background work. Every fill gets progress and then exactly one `filled` or `failed`."""

    def progress(self, op: str, done_bytes: int, total_bytes: int) -> None: ...

    def arriving(self, message: Arriving | LayersArrived) -> None:
        """So much of an image that soon is whole may be used: `Arriving` for each op, then `LayersArrived`."""

    def filled(self, op: str, resident: Resident) -> None: ...

    def failed(self, op: str, digest: str, fault: Fault) -> None: ...

    def verifying(self, op: str, stage: str, done_bytes: int, total_bytes: int) -> None: ...

    def verified(self, op: str, digest: str, fault: Fault | None) -> None:
        """A verification has ended; every one does, but those that were cancelled."""

    def condemned(self, resident: Resident) -> None:
        """An image that has users was found wrong."""

    def evicted(self, digest: str, why: str, for_digest: str) -> None:
        """The chunks of a checkpoint without users went to another, ``for_digest``, or are free since it must not be used. Said
        before they are overwritten."""


class FillSink(Protocol):
    """Who takes bytes on while a checkpoint comes into the arena. After `filled` the image is his until he gives it back."""

    def arrived(self, unit: Unit) -> None:
        """These bytes are in memory and right. Said on a reader's thread; must not block."""

    def filled(self, read_bytes: int) -> None:
        """All of it lies in the arena, ``read_bytes`` from disk; a sink that came late heard not of every unit."""

    def failed(self, error: SllmError) -> None: ...


class Store(Protocol):
    """The DRAM tier over one arena. Nothing that has users, or is being filled, is ever evicted."""

    @property
    def arena(self) -> ArenaInfo: ...

    def residents(self) -> tuple[Resident, ...]:
        """What lies whole in the arena, also after a restart, from the chunk table in the arena itself."""

    def fill(
        self,
        op: str,
        digest: str,
        directory: Path,
        users: int = 1,
        priority: Priority = Priority.REQUEST,
        image_id: str = "",
    ) -> None:
        """Bring a checkpoint into the arena, held by ``users`` from now on; one that is there, or being filled, is not read
        again, and every ``op`` is answered. What is asked for again more urgently is read more urgently from then on.

        Room is reserved before the first read: free chunks, then those of the least recently used without users. Fails
        with OutOfSpace when that is not enough, InvalidCheckpoint when a file is short or a checksum wrong, Conflict when
        another image of the digest than ``image_id`` ("" is any) lies there or comes. A failed or cancelled fill gives every
        chunk back.
        """

    def hold(self, digest: str, users: int, condemned: str = "") -> None:
        """Say how many use a checkpoint; it may be evicted only at 0. Holding also counts while it is being filled.

        ``condemned`` says why its image is wrong, as an earlier life of the store found.
        """

    def pin(self, digests: Iterable[str]) -> None:
        """All checkpoints that are kept in the arena, once they are there, whatever room is needed; unless found wrong."""

    def verify(self, op: str, digest: str, directory: Path) -> None:
        """Compare a copy on disk with its checksums, and its image if that is what lies in the arena of its digest.

        A bad copy is quarantined, a good one freed of that. A bad image is dropped at once, or with its last user.
        """

    def cancel_verify(self, op: str) -> None:
        """Nobody waits for a verification any more."""

    def drop(self, digest: str, image_id: str = "") -> None:
        """Free a checkpoint's chunks. Raises Conflict when it has users, is pinned or looked at, NotFound when it is gone. With
        ``image_id`` those of this one image, of which its users and its pin are not: Conflict when it is looked at or its copy
        on its way."""

    def close(self) -> None:
        """Stop the background work; the arena's content stays valid for the next life."""
