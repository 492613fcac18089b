"""A worker, played in the test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from schema.ids import Epoch
from schema.link import (
    Acked,
    Attach,
    AttemptTruth,
    Cancel,
    Descriptors,
    Ended,
    Fork,
    InstanceTruth,
    InstanceUpdate,
    Ping,
    Pong,
    Role,
    Shutdown,
    StartInstance,
    StartPhases,
    StartWorker,
    StopInstance,
    Submit,
    TokenRun,
    Tokens,
    ToWorker,
    TruthEnd,
    Welcome,
    WorkerTruth,
)
from schema.states import EndReason, InstanceState
from tests.agent.daemon.peers.base import WAIT_S, Hangup, Peer, T

if TYPE_CHECKING:
    from tests.agent.daemon.peers.node import Node


class Worker:
    """A worker in one test: ready once attached; tokens come when the test says so."""

    def __init__(self, node: Node, pid: int, fork: Fork) -> None:
        self.node = node
        self.pid = pid
        self.fork = fork
        self.peer = Peer(ToWorker)
        self.start: StartInstance | None = None
        self.directories: tuple[str, ...] = ()
        self.attach: Attach | None = None
        self.memory: int | None = None
        self.becomes_ready = node.worker_becomes_ready
        self.obeys = True
        self.answers = True
        self.submits: dict[Epoch, Submit] = {}
        self.generated: dict[Epoch, list[int]] = {}
        self.ends: dict[Epoch, Ended] = {}
        self.heard: asyncio.Queue[Any] = asyncio.Queue()
        self.frame = 0
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self.frame = 0
        fork = self.fork
        words = self.node.kin_hello(Role.WORKER, pid=self.pid, instance=fork.instance, epoch=fork.epoch, nonce=fork.nonce)
        await self.peer.dial(self.node.config.socket_path, words)
        first = await self.peer.next()
        if not isinstance(first, Welcome):
            self.heard.put_nowait(first)
            return
        truth = self.truth(InstanceState.READY if self.attach else InstanceState.STARTING) if self.start else None
        arena = self.attach.arena if self.attach else ""
        self.peer.send(WorkerTruth(truth=truth, start=self.start, arena=arena))
        for epoch, asked in self.submits.items():
            ids = tuple(self.generated[epoch])
            self.peer.send(AttemptTruth(submit=asked, new_ids=ids, end=self.ends.get(epoch)))
        self.peer.send(TruthEnd(attempts=len(self.submits)))
        with contextlib.suppress(Hangup):
            while True:
                self._take(await self.peer.next())

    async def redial(self) -> None:
        """Hang up, if that is not done, and dial again, as after a broken link."""
        await self.hang_up()
        self.begin()

    async def hang_up(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.peer.close()
        self.peer = Peer(ToWorker)

    def begin(self) -> None:
        self.task = self.node.go(self.run())

    async def hear(self, kind: type[T]) -> T:
        async with asyncio.timeout(WAIT_S):
            while not isinstance(message := await self.heard.get(), kind):
                pass
        return message

    def truth(self, state: InstanceState) -> InstanceTruth:
        assert self.start is not None
        return InstanceTruth(
            instance=self.start.instance,
            epoch=self.start.epoch,
            digest=self.start.digest,
            state=state,
            kv_capacity_tokens=1000,
            max_context_tokens=128,
            phases=StartPhases(build_s=0.1, attach_s=0.2, warm_s=0.3),
        )

    def say(self, attempt: Epoch, ids: Sequence[int], end: EndReason | None = None) -> None:
        """Generate tokens of an attempt, and end it if asked to."""
        generated = self.generated[attempt]
        start = len(self.submits[attempt].generated) + len(generated)
        generated.extend(ids)
        ends: tuple[Ended, ...] = ()
        if end is not None:
            self.ends[attempt] = Ended(attempt=attempt, position=start + len(ids), reason=end)
            ends = (self.ends[attempt],)
        self.frame += 1
        runs = (TokenRun(attempt, start, tuple(ids)),) if ids else ()
        self.peer.send(Tokens(frame=self.frame, runs=runs, ends=ends))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _take(self, message: Any) -> None:
        match message:
            case StartWorker():
                self.start = message.start
                self.directories = message.directories
            case Descriptors():
                self.memory = self.peer.descriptors[-1]
            case Attach():
                self.attach = message
                if self.becomes_ready:
                    self.peer.send(InstanceUpdate(truth=self.truth(InstanceState.READY)))
            case Submit():
                self.submits[message.attempt] = message
                self.generated[message.attempt] = []
            case Cancel():
                if message.attempt in self.submits and message.attempt not in self.ends:
                    self.say(message.attempt, (), message.reason)
            case Acked():
                for epoch in message.ends:
                    self.submits.pop(epoch, None)
                    self.ends.pop(epoch, None)
            case StopInstance() | Shutdown():
                if self.obeys:
                    self.kill()
            case Ping():
                if self.answers:
                    self.peer.send(Pong(nonce=message.nonce))
            case _:
                pass
        self.heard.put_nowait(message)

    def close(self) -> None:
        self.peer.close()
