"""The manager's link: one manager at a time, the truth streamed to it, then differences, and tokens within its credit."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from agent.daemon.attempts import Journal
from agent.daemon.connection import Connection
from schema.errors import LinkError
from schema.link import (
    TOKEN_WINDOW_FRAMES,
    Acked,
    InstanceLoad,
    InstanceUpdate,
    ManagerMessage,
    Message,
    NodeEvent,
    Shutdown,
    Tokens,
    TruthEnd,
    Welcome,
)
from schema.states import InstanceState

__all__ = ["ManagerLink"]

_BACKLOG_BYTES: Final = 1 << 20
"""While so much waits for the socket, truth and tokens wait too; tokens coalesce meanwhile."""
_EVENTS_KEPT: Final = 64
_log = logging.getLogger(__name__)


class ManagerLink:
    """The present manager, if there is one. ``command`` takes what it says; ``changed`` hears of its coming and going."""

    def __init__(
        self, journal: Journal, truth: Callable[[], Message], command: Callable[[Any], None], changed: Callable[[bool], None]
    ) -> None:
        self.spoken = False
        self._journal = journal
        self._node_truth = truth
        self._command = command
        self._changed = changed
        self._connection: Connection | None = None
        self._truth: Iterator[Message] | None = None
        self._may_speak = False
        self._complete = False
        self._held: list[Message] = []
        self._loads: dict[str, InstanceLoad] = {}
        self._untold: dict[str, InstanceLoad] = {}
        self._events: deque[tuple[float, NodeEvent]] = deque(maxlen=_EVENTS_KEPT)
        self._frame = 0
        self._acked = 0

    @property
    def present(self) -> bool:
        return self._connection is not None

    def supersede(self) -> None:
        """Close the older connection: only then is a truth made for a newer one."""
        if self._connection is not None:
            self._connection.close("a newer connection of the manager takes over")

    def welcome(self, connection: Connection, name: str, welcome: Welcome) -> None:
        """This manager's connection is the present one. Its truth follows at once, or when `allow_truth` is called."""
        self.supersede()
        self._connection = connection
        self._complete = False
        self._truth = None
        self._held.clear()
        self._untold = dict(self._loads)
        self._frame = self._acked = 0
        connection.begin(ManagerMessage, self, name)
        connection.send(welcome)
        self._changed(True)
        self._state_truth()

    def allow_truth(self) -> None:
        """Whoever the truth depends on has dialled or is proven dead, or was waited for long enough."""
        self._may_speak = True
        self._state_truth()

    def tell(self, message: Message) -> None:
        """State a difference; without a manager it is dropped, and before its truth is complete it waits for that."""
        if isinstance(message, InstanceUpdate) and message.truth.state is InstanceState.STOPPED:
            self._loads.pop(message.truth.instance, None)
        if self._connection is None or (self._truth is None and not self._complete):
            return
        if self._complete:
            self._connection.send(message)
        else:
            self._held.append(message)

    def tell_load(self, load: InstanceLoad) -> None:
        """How busy an instance is: only the latest word is worth sending. The next manager hears it too, which knows from it
        where the engine's counts stood."""
        self._loads[load.instance] = self._untold[load.instance] = load
        self.pump()

    def tell_event(self, event: NodeEvent) -> None:
        """What no truth tells afterwards: kept for a manager that is away, the last of it."""
        self._events.append((time.monotonic(), event))
        self.pump()

    def pump(self) -> None:
        """Send what the socket and the manager's credit allow, now."""
        connection = self._connection
        if connection is None:
            return
        while self._truth is not None and connection.backlog_bytes < _BACKLOG_BYTES:
            self._next_of_truth(self._truth, connection)
        if not self._complete:
            return
        while (
            self._journal.has_fresh
            and self._frame - self._acked < TOKEN_WINDOW_FRAMES
            and connection.backlog_bytes < _BACKLOG_BYTES
            and not connection.closed
        ):
            runs, ends = self._journal.take_fresh()
            if runs or ends:
                self._frame += 1
                connection.send(Tokens(frame=self._frame, runs=runs, ends=ends))
        while self._events and connection.backlog_bytes < _BACKLOG_BYTES and not connection.closed:
            at, event = self._events.popleft()
            connection.send(msgspec.structs.replace(event, ago_s=time.monotonic() - at))
        if self._untold and connection.backlog_bytes < _BACKLOG_BYTES:
            loads, self._untold = self._untold, {}
            for load in loads.values():
                connection.send(load)

    async def finish(self, timeout_s: float) -> None:
        """Let the manager have what was said, for at most ``timeout_s`` seconds, and hang up."""
        if self._connection is not None:
            self.pump()
            await self._connection.flushed(timeout_s)
        if self._connection is not None:
            self._connection.close("the agent ends")

    # --- Handler

    def received(self, connection: Connection, message: Any) -> None:
        if not self._complete and not isinstance(message, Shutdown):
            raise LinkError(f"the manager said {type(message).__name__} before it had the node's truth")
        if isinstance(message, Acked):
            if message.frame > self._frame:
                raise LinkError(f"the manager acknowledged frame {message.frame}, but {self._frame} were sent")
            self._acked = max(self._acked, message.frame)
        self._command(message)
        self.pump()

    def drained(self, connection: Connection) -> None:
        self.pump()

    def lost(self, connection: Connection, why: str) -> None:
        if connection is not self._connection:
            return
        _log.warning("the link to the manager is lost: %s", why)
        self._connection = None
        self._truth = None
        self._complete = False
        self._held.clear()
        self._untold.clear()
        self._changed(False)

    # --- the truth

    def _state_truth(self) -> None:
        if self._may_speak and self._connection is not None and self._truth is None and not self._complete:
            self.spoken = True
            self._truth = self._whole_truth()
            self.pump()

    def _whole_truth(self) -> Iterator[Message]:
        """Header, attempts, end. What comes in meanwhile is a difference to be told after it."""
        self._journal.reset_sent()
        attempts = list(self._journal)
        yield self._node_truth()
        for attempt in attempts:
            yield attempt.truth()
        yield TruthEnd(attempts=len(attempts))

    def _next_of_truth(self, truth: Iterator[Message], connection: Connection) -> None:
        message = next(truth, None)
        if message is not None:
            connection.send(message)
            return
        self._truth = None
        self._complete = True
        held, self._held = self._held, []
        for difference in held:
            connection.send(difference)
