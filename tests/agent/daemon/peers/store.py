"""A store, played in the test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from schema.link import (
    ArenaInfo,
    CancelFetch,
    CancelVerify,
    Descriptors,
    DropResident,
    Extent,
    FetchStored,
    FillArena,
    HoldCheckpoint,
    OperationDone,
    Ping,
    PinResidents,
    Pong,
    Resident,
    Role,
    Shutdown,
    StoreTruth,
    ToStore,
    VerifyStored,
    Welcome,
)
from tests.agent.daemon.peers.base import WAIT_S, Hangup, Peer

if TYPE_CHECKING:
    from tests.agent.daemon.peers.node import Node


class Store:
    """A store in one test: answers fills with one extent, keeps count of what it was told."""

    def __init__(self, node: Node, pid: int, arena: str = "arena_1") -> None:
        self.node = node
        self.pid = pid
        self.arena = arena
        self.peer = Peer(ToStore)
        self.fills: list[FillArena] = []
        self.holds: dict[str, int] = {}
        self.condemned: dict[str, str] = {}
        self.verifies: list[VerifyStored] = []
        self.cancelled: list[str] = []
        self.kept: list[str] = []
        self.fetches: list[FetchStored] = []
        self.held_at_drops: list[int] = []
        self.pinned: tuple[str, ...] | None = None
        self.residents: dict[str, Resident] = {}
        self.answers = node.store_answers
        self.listens = True
        self.given: list[int] = []
        self.changed = asyncio.Condition()
        self.memory = os.memfd_create("test-arena")
        os.truncate(self.memory, 1 << 16)

    async def run(self) -> None:
        await self.peer.dial(self.node.config.socket_path, self.node.kin_hello(Role.STORE, pid=self.pid))
        welcome = await self.peer.take(Welcome)
        if welcome.descriptors:
            await self.peer.take(Descriptors)
            self.given = self.peer.descriptors
        else:
            self.peer.send(Descriptors(what="arena"), [self.memory])
        info = ArenaInfo(id=self.arena, budget_bytes=1 << 30, chunk_bytes=4 << 20)
        self.peer.send(StoreTruth(arena=info, residents=tuple(self.residents.values()), fetching=self.node.store_fetching))
        with contextlib.suppress(Hangup):
            while True:
                await self.heard(await self.peer.next())

    async def heard(self, message: Any) -> None:
        if isinstance(message, FillArena):
            self.fills.append(message)
            self.holds[message.digest] = message.users
            if self.answers:
                self.answer(message)
        elif isinstance(message, HoldCheckpoint):
            self.holds[message.digest] = message.users
            self.condemned[message.digest] = message.condemned
        elif isinstance(message, PinResidents):
            self.pinned = message.digests
        elif isinstance(message, VerifyStored):
            self.verifies.append(message)
        elif isinstance(message, FetchStored):
            self.fetches.append(message)
        elif isinstance(message, CancelVerify | CancelFetch):
            self.cancelled.append(message.op)
            self.kept += [message.op] if isinstance(message, CancelFetch) and message.keep else []
        elif isinstance(message, DropResident):
            self.held_at_drops.append(self.holds.get(message.digest, 0))
            self.residents.pop(message.digest, None)
            self.peer.send(OperationDone(op=message.op, digest=message.digest))
        elif isinstance(message, Ping) and self.listens:
            self.peer.send(Pong(nonce=message.nonce))
        elif isinstance(message, Shutdown):
            self.kill()
        async with self.changed:
            self.changed.notify_all()

    def answer(self, fill: FillArena) -> None:
        read = 0 if fill.digest in self.residents else 4096
        resident = Resident(
            digest=fill.digest,
            image_id=fill.image_id,
            extents=(Extent(0, 4096),),
            image_bytes=4096,
            op=fill.op,
            read_bytes=read,
        )
        self.residents[fill.digest] = resident
        self.peer.send(resident)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S), self.changed:
            await self.changed.wait_for(true)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self.peer.close()
        os.close(self.memory)
