"""A zygote, played in the test."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from schema.link import (
    ChildExited,
    Fork,
    Forked,
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
        self.answers = True
        self.listens = True

    async def run(self) -> None:
        await self.peer.dial(self.node.config.socket_path, self.node.kin_hello(Role.ZYGOTE, pid=self.pid))
        await self.peer.take(Welcome)
        self.peer.send(ZygoteTruth(pids=(), threads=1))
        with contextlib.suppress(Hangup):
            while True:
                message = await self.peer.next()
                if isinstance(message, Fork):
                    self.forks.append(message)
                    if self.answers:
                        self.fork(message)
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

    def exited(self, pid: int, status: int) -> None:
        self.peer.send(ChildExited(pid=pid, status=status))

    def close(self) -> None:
        self.peer.close()
