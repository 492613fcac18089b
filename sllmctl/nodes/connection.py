"""One connection to an agent: the handshake, the truth, then frames both ways until it breaks."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol, cast

from schema.errors import Fault, LinkError, SllmError, Unreachable
from schema.ids import Epoch
from schema.link import (
    PROTOCOL,
    PROTOCOL_OLDEST,
    AgentMessage,
    AttemptTruth,
    FileChunk,
    FrameDecoder,
    Hello,
    InstanceLoad,
    InstanceUpdate,
    InventoryUpdate,
    LogChunk,
    Message,
    NodeEvent,
    NodeTruth,
    OperationDone,
    Ping,
    PlacementUpdate,
    Pong,
    Progress,
    Refused,
    StartPhases,
    Tokens,
    TruthEnd,
    Welcome,
    encode_frame,
)
from sllmctl.nodes.settings import LinkSettings

__all__ = ["Connection", "ConnectionOwner", "LinkListener", "News"]

log = logging.getLogger("sllmctl.links")

News = (
    InventoryUpdate
    | InstanceUpdate
    | PlacementUpdate
    | OperationDone
    | NodeEvent
    | Progress
    | FileChunk
    | LogChunk
    | InstanceLoad
)
"""What an agent says after its truth, other than tokens."""


class LinkListener(Protocol):
    """Who takes in what nodes say of sequences: the router. A LinkError from any of these closes the link."""

    def truth_began(self, node: str, truth: NodeTruth) -> None: ...

    def attempt_truth(self, node: str, truth: AttemptTruth) -> None: ...

    def truth_ended(self, node: str, end: TruthEnd) -> None: ...

    def tokens(self, node: str, tokens: Tokens) -> None: ...

    def batch_ended(self, node: str) -> None: ...

    def instance_load_changed(self, node: str, load: InstanceLoad) -> None: ...

    def instance_started(self, instance: str, epoch: Epoch, phases: StartPhases) -> None: ...

    def progressed(self, node: str, progress: Progress) -> None: ...

    def progress_ended(self, op: str) -> None: ...

    def link_lost(self, node: str) -> None: ...


class ConnectionOwner(Protocol):
    """Who holds the connection, and hears of what is not the router's alone."""

    def complete(self, connection: Connection, truth: NodeTruth, end: TruthEnd) -> None:
        """The truth was taken in; from now on messages may be sent."""

    def news(self, news: News) -> None:
        """Something after the truth."""


class Connection(asyncio.Protocol):
    """Tokens go from here straight to the router, each frame in one call. ``closed`` gets why it ended, and never raises.
    ``round_trip_s`` is what the last heartbeat's answer took."""

    def __init__(self, node: str, hello: Hello, owner: ConnectionOwner, router: LinkListener, settings: LinkSettings) -> None:
        self.closed: asyncio.Future[Fault] = asyncio.get_running_loop().create_future()
        self.refusal: Fault | None = None
        self.round_trip_s: float | None = None
        self._node = node
        self._hello = hello
        self._owner = owner
        self._router = router
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._decoder: FrameDecoder[AgentMessage] = FrameDecoder(AgentMessage)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard_at = 0.0
        self._pings = 0
        self._asked_at = 0.0
        self._fault: Fault | None = None
        self._welcomed = False
        self._truth: NodeTruth | None = None
        self._stated = 0
        self._steady = False

    # --- out

    def send(self, message: Message) -> None:
        """Write one frame. A node that reads no more is given up rather than buffered for without bound."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        try:
            frame = encode_frame(message)
        except LinkError as error:
            log.error("not sent to node %s: %s", self._node, error)
            return
        transport.write(frame)
        if transport.get_write_buffer_size() > self._settings.max_unsent_bytes:
            self.fail(Unreachable(f"node {self._node} does not read: {transport.get_write_buffer_size()} bytes are unsent"))

    def fail(self, error: SllmError) -> None:
        """Close it now, for this reason."""
        if self._fault is None:
            self._fault = Fault.of(error)
        if self._transport is not None:
            self._transport.abort()

    # --- in (asyncio.Protocol)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(self._settings.truth_timeout_s, self._truth_is_late)
        self.send(self._hello)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        tokens = False
        try:
            for message in self._decoder.feed(data):
                if type(message) is Tokens and self._steady:
                    self._router.tokens(self._node, message)
                    tokens = True
                else:
                    self._take(message)
                if self._fault is not None:
                    return
            if tokens:
                self._router.batch_ended(self._node)
        except LinkError as error:
            self.fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        if not self.closed.done():
            ended = f"the connection to node {self._node} ended" + (f": {exc}" if exc else "")
            self.closed.set_result(self._fault or Fault("unreachable", ended))

    def _take(self, message: Any) -> None:
        match message:
            case Ping(nonce=nonce):
                self.send(Pong(nonce=nonce))
            case Pong(nonce=nonce):
                if nonce == self._pings:
                    self.round_trip_s = self._loop.time() - self._asked_at
            case Refused(fault=fault):
                self.refusal = fault
                self.fail(fault.to_error())
            case Welcome(protocol=protocol) if not self._welcomed:
                if not PROTOCOL_OLDEST <= protocol <= PROTOCOL:
                    raise LinkError(f"node {self._node} wants to speak version {protocol}, which nobody offered")
                self._welcomed = True
            case NodeTruth() if self._welcomed and self._truth is None:
                self._truth = message
                self._router.truth_began(self._node, message)
            case AttemptTruth() if self._truth is not None and not self._steady:
                self._stated += 1
                self._router.attempt_truth(self._node, message)
            case TruthEnd(attempts=attempts) if self._truth is not None and not self._steady:
                self._complete(self._truth, message, attempts)
            case (
                InventoryUpdate()
                | InstanceUpdate()
                | PlacementUpdate()
                | OperationDone()
                | NodeEvent()
                | Progress()
                | FileChunk()
                | LogChunk()
                | InstanceLoad()
            ) if self._steady:
                self._owner.news(message)
            case _:
                raise LinkError(f"node {self._node} said a {type(message).__name__} out of turn")

    def _complete(self, truth: NodeTruth, end: TruthEnd, attempts: int) -> None:
        if attempts != self._stated:
            raise LinkError(f"node {self._node} stated {self._stated} attempts and says that they were {attempts}")
        self._steady = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._settings.heartbeat_s, self._beat)
        self._owner.complete(self, truth, end)

    # --- time

    def _truth_is_late(self) -> None:
        limit_s = self._settings.truth_timeout_s
        self.fail(Unreachable(f"node {self._node} did not state its truth within {limit_s:g} s (truth_timeout_s)"))

    def _beat(self) -> None:
        silent_s = self._loop.time() - self._heard_at
        if silent_s >= self._settings.heartbeat_timeout_s:
            self.fail(Unreachable(f"node {self._node} has been silent for {silent_s:.1f} s (heartbeat_timeout_s)"))
            return
        self._pings += 1
        self._asked_at = self._loop.time()
        self.send(Ping(nonce=self._pings))
        self._timer = self._loop.call_later(self._settings.heartbeat_s, self._beat)
