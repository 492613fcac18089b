"""A zygote, played in the test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

from schema.errors import Fault
from schema.link import (
    ChildExited,
    Fork,
    Forked,
    ForkIngest,
    Ping,
    Pong,
    Role,
    Shutdown,
    ToZygote,
    Welcome,
    ZygoteTruth,
)
from tests.agent.daemon.peers.base import Hangup, Peer
from tests.agent.daemon.peers.worker import Worker

if TYPE_CHECKING:
    from tests.agent.daemon.peers.node import Node


class Zygote:
    """A zygote in one test: each fork is a sleeping process and a `Worker` that speaks for it."""

    def __init__(self, node: Node, pid: int) -> None:
        self.node = node
        self.pid = pid
        self.peer = Peer(ToZygote)
        self.forks: list[Fork] = []
        self.ingests: list[ForkIngest] = []
        self.answers = node.zygote_answers
        self.listens = True

    async def run(self) -> None:
        await self.peer.dial(self.node.config.socket_path, self.node.kin_hello(Role.ZYGOTE, pid=self.pid))
        await self.peer.take(Welcome)
        await self.node.zygote_imported.wait()
        self.peer.send(ZygoteTruth(pids=(), threads=1, numerics=self.node.numerics))
        with contextlib.suppress(Hangup):
            while True:
                message = await self.peer.next()
                if isinstance(message, Fork):
                    self.forks.append(message)
                    if self.answers:
                        self.fork(message)
                elif isinstance(message, ForkIngest):
                    self.ingests.append(message)
                    if self.answers:
                        self.fork_ingest(message)
                elif isinstance(message, Ping) and self.listens:
                    self.peer.send(Pong(nonce=message.nonce))
                elif isinstance(message, Shutdown):
                    os.kill(self.pid, signal.SIGKILL)

    def fork(self, message: Fork) -> Worker:
        worker = Worker(self.node, self.node.sleeper(), message)
        self.node.workers.append(worker)
        worker.begin()
        self.peer.send(Forked(nonce=message.nonce, pid=worker.pid))
        return worker

    def fork_ingest(self, message: ForkIngest) -> None:
        """Run the node's ``forked_args`` as its child; without them the answer is that it cannot."""
        frames = self.peer.descriptors.pop()
        if self.node.forked_args:
            arguments = [*self.node.forked_args, message.op]
            to_frames = [(os.POSIX_SPAWN_DUP2, frames, 1)]
            pid = os.posix_spawn(arguments[0], arguments, os.environ, file_actions=to_frames, setsid=True)
            self.node.pids.append(pid)
            self.peer.send(Forked(nonce=message.nonce, pid=pid))
            self.node.go(self._reap(pid))
        else:
            self.peer.send(Forked(nonce=message.nonce, fault=Fault("out_of_space", "there is no memory")))
        os.close(frames)

    async def _reap(self, pid: int) -> None:
        """Say how a child ended, as its parent, unless the agent, which is in this process too, was first to ask."""
        with contextlib.suppress(OSError):
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            self.exited(pid, os.waitstatus_to_exitcode(status))

    def exited(self, pid: int, status: int) -> None:
        self.peer.send(ChildExited(pid=pid, status=status))

    def close(self) -> None:
        self.peer.close()
