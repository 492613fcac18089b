"""One HTTP exchange over plain ASGI: its body within limits, its response, and a client that may go away meanwhile."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive, Scope, Send

from schema.errors import Cancelled, InvalidInput, Overloaded, SllmError
from sllmctl.gateway.errors import (
    BodyTooLarge,
    BodyTooSlow,
    MethodNotAllowed,
    UnsupportedMediaType,
    answer_of,
    error_body,
    retry_after,
)
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.story import is_id

__all__ = ["BROKEN_OFF", "BodyBudget", "ClientGone", "Exchange", "Header", "WhileConnected"]

_JSON = (b"content-type", b"application/json")
_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Told to the proxies that would otherwise gather events.
    (b"x-accel-buffering", b"no"),
)
_DISCARD_FACTOR = 4
BROKEN_OFF = "sllmctl.broken_off"
"""Where the server says in a request's ASGI state why it broke the connection off, as an error."""

Header = tuple[bytes, bytes]


class ClientGone(Cancelled):
    """The client closed the connection before its body was complete; there is nobody to answer."""

    code = "client_gone"


class BodyBudget:
    """Memory of all bodies at hand: many clients with large ones must not take the machine's."""

    def __init__(self, limit_bytes: int) -> None:
        self._free_bytes = limit_bytes

    def take(self, size_bytes: int) -> None:
        """Raises Overloaded when the bodies of others leave no room."""
        if size_bytes > self._free_bytes:
            raise Overloaded("too many large requests are being read; try again", 1.0)
        self._free_bytes -= size_bytes

    def give(self, size_bytes: int) -> None:
        self._free_bytes += size_bytes


class Exchange:
    """A request being answered. ``status`` is what was answered, 0 before. ``request_id`` goes back as ``x-request-id``: the
    client's own until another is set, "" for none. ``gone``: its client went away while it was answered."""

    __slots__ = ("_budgeted", "_complete", "_receive", "_scope", "_send", "gone", "request_id", "status", "streaming")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._budgeted = 0
        self._complete = scope["method"] in ("GET", "HEAD")
        self.status = 0
        self.streaming = False
        self.gone = False
        self.request_id = self._asked_id()

    @property
    def broken_off(self) -> SllmError | None:
        """Why the server broke its connection off, None if it did not."""
        found: SllmError | None = self._scope.get("state", {}).get(BROKEN_OFF)
        return found

    def _asked_id(self) -> str:
        """The id that the client gave its request, if it may be called so."""
        asked = [value for name, value in self._scope["headers"] if name == b"x-request-id"]
        text = asked[0].decode("latin-1") if len(asked) == 1 else ""
        return text if is_id(text) else ""

    def _id_header(self) -> list[Header]:
        return [(b"x-request-id", self.request_id.encode())] if self.request_id else []

    def require_method(self, method: str) -> None:
        """Raises MethodNotAllowed for any other; where GET is allowed, HEAD is."""
        if self._scope["method"] not in (method, "HEAD" if method == "GET" else method):
            raise MethodNotAllowed(f"{self._scope['method']} is not allowed on {self._scope['path']}; use {method}", method)

    def header(self, name: bytes) -> bytes | None:
        """The one header of a name, in small letters. Raises InvalidInput when it comes twice."""
        found = [value for each, value in self._scope["headers"] if each == name]
        if len(found) > 1:
            raise InvalidInput(f"the header {name.decode()} is given twice", name.decode())
        return found[0] if found else None

    async def body(self, settings: GatewaySettings, budget: BodyBudget) -> bytes:
        """The body, said to be JSON, and counted in ``budget`` until `release`.

        Raises UnsupportedMediaType, BodyTooLarge, BodyTooSlow, Overloaded, ClientGone.
        """
        length, kind, coding = 0, b"", b"identity"
        for name, value in self._scope["headers"]:
            if name == b"content-type":
                kind = value.partition(b";")[0].strip().lower()
            elif name == b"content-encoding":
                coding = value.strip().lower()
            elif name == b"content-length":
                length = int(value)
        # What a web page can send to another site without being asked, of another type or none, must not get through as JSON.
        if kind != b"application/json" and not kind.endswith(b"+json"):
            raise UnsupportedMediaType(f"content type {kind.decode('latin-1')!r} is not application/json")
        if coding != b"identity":
            raise UnsupportedMediaType(f"content encoding {coding.decode('latin-1')!r} is not taken; send the body as it is")
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                return await self._read_body(length, settings.body_limit_bytes, budget)
        except TimeoutError:
            raise BodyTooSlow(f"the request's body did not arrive within {settings.body_timeout_s:g} s") from None

    async def _read_body(self, announced: int, limit: int, budget: BodyBudget) -> bytes:
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            # A client reads no answer before it has sent its body; so some of what is too much is taken and thrown away.
            if announced > limit * _DISCARD_FACTOR or size > limit * _DISCARD_FACTOR:
                break
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            self._complete = not more
            if size <= limit:
                budget.take(len(chunk))
                self._budgeted += len(chunk)
                chunks.append(chunk)
        if size > limit or announced > limit:
            raise BodyTooLarge(f"the request's body is longer than {limit} bytes, the limit of this server")
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def release(self, budget: BodyBudget) -> None:
        """The body is not needed any more; may be said again."""
        budget.give(self._budgeted)
        self._budgeted = 0

    async def answer(self, status: int, body: bytes, *headers: Header, content_type: Header = _JSON) -> None:
        """Send a whole response."""
        self.status = status
        length = (b"content-length", str(len(body)).encode())
        found = [content_type, length, *self._id_header(), *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": found})
        await self._send({"type": "http.response.body", "body": body})

    async def open_stream(self, *headers: Header) -> None:
        """Begin a response of server-sent events."""
        self.status = 200
        self.streaming = True
        found = [*_STREAM, *self._id_header(), *headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": found})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send events; waits while the client has much unread."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def fail(self, error: SllmError) -> None:
        """Answer with an error; in a stream as its last event, after which no ``[DONE]`` comes."""
        if self.streaming:
            await self.write(b"data: " + error_body(error) + b"\n\n", more=False)
            return
        headers: list[Header] = []
        if (wait := retry_after(error)) is not None:
            headers.append((b"retry-after", wait.encode()))
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", error.allow.encode()))
        if not self._complete:
            # What is still on its way in must not be taken for the next request.
            headers.append((b"connection", b"close"))
        await self.answer(answer_of(error).status, error_body(error), *headers)

    def while_connected(self) -> WhileConnected:
        """A block that ends when the client goes away."""
        return WhileConnected(self, self._receive)


class WhileConnected:
    """Runs a block for a client, once its body is read: when the client goes away the block is cancelled, and the exchange's
    ``gone`` is set.

    The cancellation ends with the block; one that comes from elsewhere passes through.
    """

    __slots__ = ("_exchange", "_receive", "_task", "_watcher")

    def __init__(self, exchange: Exchange, receive: Receive) -> None:
        self._exchange = exchange
        self._receive = receive

    async def __aenter__(self) -> WhileConnected:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        return self

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._exchange.gone = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not self._exchange.gone:
            if self._watcher.done():
                self._watcher.result()
            self._watcher.cancel()
            return False
        return self._task.uncancel() == 0 and kind is asyncio.CancelledError
