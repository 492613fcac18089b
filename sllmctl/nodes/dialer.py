"""One node's link over all its connections: dials for ever, with jittered back-off, and says when the link comes and goes."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from schema.errors import Fault, TimedOut, Unreachable
from schema.link import (
    FileChunk,
    Hello,
    InstanceLoad,
    InstanceTruth,
    InstanceUpdate,
    LogChunk,
    ManagerMessage,
    NodeTruth,
    OperationDone,
    Progress,
    ReadFile,
    ReadLog,
    TruthEnd,
)
from schema.states import InstanceState
from sllmctl.control.events import Event, FromNode, NodeLost
from sllmctl.nodes.connection import Connection, LinkListener, News
from sllmctl.nodes.local import LocalAgent
from sllmctl.nodes.settings import LinkSettings

__all__ = ["Dialer"]

log = logging.getLogger("sllmctl.links")


class Dialer:
    """``steady`` is the connection that is up, None while there is none; ``why`` then says why. ``times_up``: so often there
    was one. ``local``: the agent of this
    machine, when that is who is dialled."""

    def __init__(
        self,
        node: str,
        path: str,
        hello: Hello,
        *,
        router: LinkListener,
        post: Callable[[Event], None],
        settings: LinkSettings,
        local: LocalAgent | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.node = node
        self.path = path
        self.steady: Connection | None = None
        self.refusal: Fault | None = None
        self.why = "it was not dialled yet"
        self.times_up = 0
        self._hello = hello
        self._router = router
        self._post = post
        self._settings = settings
        self._local = local
        self._asked: dict[str, asyncio.Future[Any]] = {}
        self._changed = asyncio.Event()
        self._delay_s = settings.redial_first_s
        self._down_since = loop.time()
        self._told: str | None = None
        self.task = loop.create_task(self._run(), name=f"link to {node}")
        self.task.add_done_callback(self._ended)

    def send(self, message: ManagerMessage) -> bool:
        """Say something; False if it was dropped, because the link is not up."""
        if self.steady is None:
            return False
        self.steady.send(message)
        return True

    async def ready(self, timeout_s: float) -> None:
        """Wait until the link is up. Raises the agent's refusal, or TimedOut."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.steady is None:
                    if self.refusal is not None:
                        raise self.refusal.to_error()
                    await self._changed.wait()
        except TimeoutError:
            raise TimedOut(f"node {self.node} was not there within {timeout_s:g} s: {self.why}") from None

    async def ask_file(self, message: ReadFile) -> FileChunk:
        """One part of a file. Raises TimedOut, or Unreachable when the link goes down."""
        chunk: FileChunk = await self._ask(message, f"a part of {message.file}")
        return chunk

    async def ask_log(self, message: ReadLog) -> LogChunk:
        """A page of a log. Raises as `ask_file`."""
        chunk: LogChunk = await self._ask(message, "a page of its log")
        return chunk

    async def _ask(self, message: ReadFile | ReadLog, what: str) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[message.op] = answer
        limit_s = self._settings.read_file_timeout_s
        try:
            if self.steady is None:
                raise Unreachable(f"the link to node {self.node} is down: {self.why}")
            self.send(message)
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError:
            raise TimedOut(f"node {self.node} did not send {what} within {limit_s:g} s") from None
        finally:
            del self._asked[message.op]

    # --- what a connection tells its owner

    def complete(self, connection: Connection, truth: NodeTruth, end: TruthEnd) -> None:
        """The control loop is told of the truth before the router acts on it, so that both know the same."""
        log.info("node %s is linked", self.node)
        self.steady = connection
        self.times_up += 1
        self.refusal, self._told = None, None
        self._delay_s = self._settings.redial_first_s
        if self._local is not None:
            self._local.failure = None
        self._post(FromNode(self.node, truth))
        self._router.truth_ended(self.node, end)
        self._change()

    def news(self, news: News) -> None:
        if isinstance(news, InstanceLoad):
            self._router.instance_load_changed(self.node, news)
        elif isinstance(news, Progress):
            self._router.progressed(self.node, news)
        elif isinstance(news, FileChunk | LogChunk):
            answer = self._asked.get(news.op)
            if answer is not None and not answer.done():
                answer.set_result(news)
        else:
            if isinstance(news, InstanceUpdate):
                self._instance(news.truth)
            elif isinstance(news, OperationDone):
                self._router.progress_ended(news.op)
            self._post(FromNode(self.node, news))

    def _instance(self, truth: InstanceTruth) -> None:
        if truth.state == InstanceState.STARTING:
            return
        self._router.progress_ended(truth.instance)
        if truth.state == InstanceState.READY and truth.phases is not None:
            self._router.instance_started(truth.instance, truth.epoch, truth.phases)

    # --- the task

    async def _run(self) -> None:
        while True:
            delay_s = await self._hold()
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the link to node %s is given up: an error of ours", self.node, exc_info=error)

    async def _hold(self) -> float:
        """One connection, from dialling to its end. Returns the seconds to wait before the next."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._settings.dial_timeout_s):
                transport, connection = await loop.create_unix_connection(self._connection, self.path)
        except (OSError, TimeoutError) as error:
            reason = "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
            why = f"cannot reach its agent at {self.path}: {reason}"
            if self._local is not None:
                await self._local.ensure()
                why = self._local.failure or why
            self._not_up(why)
            return self._back_off()
        try:
            await asyncio.wait([connection.closed])
        finally:
            transport.abort()
            fault = await connection.closed
            was_up, self.steady = self.steady is not None, None
            self._router.link_lost(self.node)
            self._give_up_asked()
        if connection.refusal is not None and connection.refusal.code != Unreachable.code:
            self._refused(connection.refusal)
            return self._settings.refused_retry_s
        self._not_up(fault.message, was_up=was_up)
        return self._back_off()

    def _connection(self) -> Connection:
        return Connection(self.node, self._hello, self, self._router, self._settings)

    def _back_off(self) -> float:
        longest_s = self._settings.redial_longest_s if self._local is None else self._settings.redial_local_s
        delay_s = min(self._delay_s, longest_s)
        self._delay_s = min(self._delay_s * 2, longest_s)
        return delay_s

    def _not_up(self, why: str, *, was_up: bool = False) -> None:
        """Tell the control loop of a link that broke, or that could not be had for long; once."""
        now = asyncio.get_running_loop().time()
        self.why = why
        if was_up:
            self._down_since = now
        if was_up or (self._told is None and now - self._down_since >= self._settings.unreachable_after_s):
            stopped = self._local is not None and self._local.ending
            log.log(logging.INFO if stopped else logging.WARNING, "node %s is not linked: %s", self.node, why)
            self._told = why
            self._post(NodeLost(self.node, why, stopped))
        self._change()

    def _refused(self, fault: Fault) -> None:
        """An agent that refuses this manager stays as it is until an operator acts; so it is dialled seldom, and said once."""
        self.refusal, self.why = fault, f"its agent refuses this manager: {fault.message}"
        if self._told != self.why:
            log.error("node %s: %s", self.node, self.why)
            self._told = self.why
            self._post(NodeLost(self.node, self.why))
        self._change()

    def _give_up_asked(self) -> None:
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(Unreachable(f"the link to node {self.node} broke"))

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
