"""The zygote's link: forks asked of it, its answers, and the exits of its children, handed to the instances."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Callable
from typing import Any, Final

from agent.daemon.connection import Connection
from agent.daemon.instances import Instances
from agent.daemon.process import Process, start_ticks
from agent.daemon.supervisor import Kin
from schema.errors import LinkError
from schema.link import (
    ChildExited,
    Forked,
    ForkIngest,
    Hello,
    Ingest,
    KeepSpares,
    Message,
    Welcome,
    ZygoteMessage,
    ZygoteTruth,
)

__all__ = ["ZygoteLink"]

_FORK_S: Final = 10.0
"""How long a zygote may take to fork for an ingest."""
_ABSENT_S: Final = 10.0
"""How long an ingest waits while no zygote lives."""
_IMPORT_S: Final = 60.0
"""How long it waits for one at most. One that still imports is ready no later than a new process would be."""
_STATUS_S: Final = 0.2
"""How long it may take to say how a child ended."""
_log = logging.getLogger(__name__)


class ForkedChild:
    """A child of the zygote's that does one operation: a `Child` of agent/daemon/ingest.py."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = Process.open(pid)
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def watched(self) -> bool:
        """False for one that was dead when it was looked at, or could not be."""
        return self._process is not None

    def send_signal(self, number: signal.Signals) -> None:
        if self._process is None or not self._process.alive:
            raise ProcessLookupError(f"process {self.pid} has ended")
        self._process.signal(number)

    async def wait(self) -> int | None:
        if self._process is not None:
            await self._process.died.wait()
            if self._process.status is not None:
                return self._process.status
        try:
            return await asyncio.wait_for(asyncio.shield(self._status), _STATUS_S)
        except TimeoutError:
            return None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)

    def exited(self, status: int) -> None:
        """The zygote says how it ended."""
        if not self._status.done():
            self._status.set_result(status)


class ZygoteLink:
    """Speaks to the zygote over its lives. ``cuda``: the devices of which it keeps children with a context ready. ``numerics``
    is what the present one says of this node, "" without one; ``changed`` is called when that is another."""

    def __init__(self, kin: Kin, changed: Callable[[], None], cuda: tuple[int, ...] = ()) -> None:
        self.numerics = ""
        self._kin = kin
        self._changed = changed
        self._cuda = cuda
        self._stated = asyncio.Event()
        self._forking: dict[int, asyncio.Future[ForkedChild | None]] = {}
        self._children: dict[int, ForkedChild] = {}
        self.instances: Instances | None = None

    @property
    def ready(self) -> bool:
        """True when the present zygote has stated its truth: it has imported all, and can fork."""
        return self._stated.is_set()

    def welcome(self, connection: Connection, hello: Hello, welcome: Callable[[int], Welcome]) -> None:
        """A zygote has dialled. Raises Conflict for another than ours."""
        self._kin.claim(connection, hello.pid)
        self._stated.clear()
        connection.begin(ZygoteMessage, self, f"zygote (pid {hello.pid})")
        connection.send(welcome(0))

    def ask(self, message: Message) -> bool:
        """Say something to a zygote that has stated its truth; False when there is none."""
        return self.ready and self._kin.send(message)

    async def fork_ingest(self, message: Ingest, frames: int) -> ForkedChild | None:
        """A child that does this ingest, with its frames to ``frames``; None where no zygote comes to be, or it cannot fork."""
        nonce = secrets.randbits(52) + 1
        fork = ForkIngest(nonce=nonce, op=message.op, source=message.source)
        answer: asyncio.Future[ForkedChild | None] = asyncio.get_running_loop().create_future()
        try:
            await self._until_ready()
            async with asyncio.timeout(_FORK_S):
                self._forking[nonce] = answer
                return await answer if self._kin.send(fork, (frames,)) else None
        except (TimeoutError, asyncio.CancelledError) as error:
            if answer.done() and not answer.cancelled() and (child := answer.result()) is not None:
                child.kill()  # it came at that very moment
            if isinstance(error, asyncio.CancelledError):
                raise
            _log.warning("no zygote has forked for the ingest %s in time; it gets a process of its own", message.op)
            return None
        finally:
            self._forking.pop(nonce, None)  # what comes later is ended, as one that nobody asked for

    async def _until_ready(self) -> None:
        """Wait for a zygote that can fork. Raises TimeoutError when that takes too long, or none lives to become one."""
        async with asyncio.timeout(_IMPORT_S):
            while not self.ready:
                try:
                    await asyncio.wait_for(self._stated.wait(), _ABSENT_S)
                except TimeoutError:
                    if not self._kin.pid:
                        raise

    # --- Handler

    def received(self, connection: Connection, message: Any) -> None:
        assert self.instances is not None
        match message:
            case ZygoteTruth():
                if message.threads != 1:
                    _log.error("the zygote has %d threads; its forks may hang", message.threads)
                self._stated.set()
                self._say(message.numerics)
                if self._cuda:
                    self._kin.send(KeepSpares(cuda=self._cuda))
                self.instances.zygote_ready()
            case _ if not self.ready:
                raise LinkError(f"the zygote said {type(message).__name__} before its truth")
            case Forked() if (answer := self._forking.get(message.nonce)) is not None and not answer.done():
                self._forked(message, answer)
            case Forked():
                self.instances.forked(message)
            case ChildExited() if (child := self._children.pop(message.pid, None)) is not None:
                child.exited(message.status)
            case ChildExited():
                self.instances.child_exited(message.pid, message.status)
            case _:
                raise LinkError(f"the zygote has no {type(message).__name__} to say")

    def drained(self, connection: Connection) -> None:
        pass

    def lost(self, connection: Connection, why: str) -> None:
        if self._kin.disclaim(connection):
            self._stated.clear()
            self._say("")
            self._children.clear()
            for answer in self._forking.values():
                if not answer.done():
                    answer.set_result(None)
            _log.warning("the link to the zygote is lost: %s", why)

    def _say(self, numerics: str) -> None:
        if numerics != self.numerics:
            self.numerics = numerics
            self._changed()

    def _forked(self, message: Forked, answer: asyncio.Future[ForkedChild | None]) -> None:
        if message.fault is not None:
            _log.warning("the zygote cannot fork for an ingest: %s", message.fault.message)
            answer.set_result(None)
            return
        child = ForkedChild(message.pid)
        if not child.watched and start_ticks(message.pid) is not None:  # the system has no descriptor to watch it by
            os.kill(message.pid, signal.SIGKILL)
            answer.set_result(None)
            return
        self._children[message.pid] = child
        answer.set_result(child)
