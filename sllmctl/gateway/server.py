"""The HTTP server under the gateway: uvicorn with uvloop and httptools, and the limits that uvicorn lacks."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from schema.errors import InvalidInput, SllmError, TimedOut
from sllmctl.gateway.errors import error_body
from sllmctl.gateway.exchange import BROKEN_OFF
from sllmctl.gateway.metrics import Metrics
from sllmctl.gateway.settings import GatewaySettings

__all__ = ["server_config"]

_log = logging.getLogger(__name__)
_OFFER = (b"connection", b"upgrade", b"http2-settings")


def server_config(
    app: ASGIApp, settings: GatewaySettings, metrics: Metrics | None = None, *, lifespan: bool = True
) -> uvicorn.Config:
    """The configuration for ``uvicorn.Server``; sockets are handed to its ``serve``. The event loop is the caller's."""

    class Protocol(_BoundedProtocol):
        limits = settings
        counts = metrics

    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        loop="uvloop",
        lifespan="on" if lifespan else "off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=1024,
        limit_concurrency=settings.connection_limit,
        # Whole seconds are all that uvicorn takes here; 0 would be for ever.
        timeout_keep_alive=max(1, round(settings.keep_alive_timeout_s)),
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )


class _Parser(httptools.HttpRequestParser):
    """Reads HTTP/1.1 from clients that offer another protocol (Upgrade: h2c), as Java's own does with every first request.

    An offer may be passed over (RFC 9110, 7.8). The library, though, reads no body of a request that has one; so that is read
    once more without it.
    """

    def __init__(self, protocol: _BoundedProtocol) -> None:
        super().__init__(protocol)
        self._protocol = protocol
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it, for pipelined requests

    def feed_data(self, data: Any) -> None:
        rest = memoryview(data)
        while rest:
            try:
                super().feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                super().feed_data(self._protocol.without_offer())
                rest = rest[offer.args[0] :]

    @property
    def offered(self) -> bool:
        """Whether the present request has such an offer."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"


class _BoundedProtocol(HttpToolsProtocol):
    """One connection, broken off when its headers are too long or too slow, or when its client reads nothing.

    A timer runs only while headers are awaited on a new connection, and while the client has left so much unread that
    writing is paused: none of them on the way of a token.
    """

    limits: GatewaySettings
    counts: Metrics | None = None
    parser: _Parser

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.parser = _Parser(self)
        self._header_bytes = 0
        self._in_headers = True
        self._header_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self._break_off, "slow headers")

    def send_400_response(self, msg: str) -> None:
        self._refuse(b"400 Bad Request", InvalidInput("this is not a valid HTTP/1.1 request; the connection is closed"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._header_timer)
        self._stop(self._reader_timer)
        super().connection_lost(exc)
        # uvicorn tells the newest request alone, which may be one that waits behind this one.
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            # Counted per read, so a body that comes along counts too; the limit is for those whose headers never end.
            self._header_bytes += len(data)
        super().data_received(data)
        too_long = self._in_headers and self._header_bytes > self.limits.header_limit_bytes
        if too_long and not self.transport.is_closing():
            limit = self.limits.header_limit_bytes
            self._refuse(
                b"431 Request Header Fields Too Large",
                InvalidInput(f"the request's headers are longer than {limit} bytes, the limit of this server"),
            )
            self._count("long headers")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self._break_off, "slow headers")

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._header_bytes = 0
        self._stop(self._header_timer)
        self._header_timer = None
        if not self.parser.offered:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.offered:
            super().on_message_complete()

    def without_offer(self) -> bytes:
        """The head of the present request, which offers another protocol, without that."""
        lines = [b"%b %b HTTP/1.1" % (self.parser.get_method(), self.url)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] not in _OFFER]
        return b"\r\n".join([*lines, b"", b""])

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop(self._reader_timer)
        self._reader_timer = self.loop.call_later(self.limits.slow_reader_timeout_s, self._break_off, "slow reader")

    def resume_writing(self) -> None:
        self._stop(self._reader_timer)
        self._reader_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        # Closing waits until all is written, which for a client that reads nothing is never.
        if self.transport.get_write_buffer_size():
            self._break_off("slow reader")
        super().timeout_keep_alive_handler()

    def _refuse(self, status: bytes, error: SllmError) -> None:
        """Answer what never becomes a request of the application, and close."""
        cycle = self.cycle
        behind = cycle is not None and not cycle.response_complete and (cycle.response_started or not cycle.more_body)
        if behind or self.transport.get_write_buffer_size():
            # It came behind a request whose response is not out: an answer now would be taken for a part of that.
            self.transport.abort()
            return
        body = error_body(error)
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
        self.transport.close()

    def _break_off(self, reason: str) -> None:
        """Drop the connection with all that is unsent; the request on it, if any, learns that its client is gone."""
        if self.transport.is_closing():
            return
        self._count(reason)
        if self._answering is not None:
            self._answering.scope["state"][BROKEN_OFF] = TimedOut(f"its connection was broken off by the manager: {reason}")
        self.transport.abort()

    def _count(self, reason: str) -> None:
        _log.info("connection from %s broken off: %s", self.client, reason)
        if self.counts is not None:
            self.counts.dropped.labels(reason).inc()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
