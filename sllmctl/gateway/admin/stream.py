"""``GET stream``: the event stream as server-sent events, resumed by Last-Event-ID.

A reader that is slow holds nothing up and makes nothing grow: its next frame is made when it has read the last one, of all that
changed meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from schema.admin import StreamFrame, StreamKind
from schema.errors import InvalidInput, Overloaded, Unreachable
from sllmctl.gateway.admin.answers import Routes, read_query
from sllmctl.gateway.admin.feed import Feed
from sllmctl.gateway.admin.picture import KINDS
from sllmctl.gateway.openapi import Query, operation

__all__ = ["Stream"]

_ALIVE = b": alive\n\n"
_encode = msgspec.json.Encoder().encode


class Stream:
    """The route; what it tells is the feed's."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def routes(self) -> Routes:
        return {("GET", "stream"): self.get_stream}

    @operation(
        "What the cluster is like, and then each change.",
        {200: None},
        events=StreamFrame,
        query=(Query("kinds", str, f"A list of those wanted, with commas between: {', '.join(KINDS)}. All if not given."),),
        headers=(Query("Last-Event-ID", str, "The cursor of the last frame that was read: it goes on from there."),),
        errors=(Overloaded, Unreachable),
    )
    async def get_stream(self, request: Request) -> Response:
        """``?kinds=models,instances`` leaves the others out; a cursor that has expired gets a fresh picture."""
        kinds = _kinds(read_query(request).get("kinds"))
        frames = self._feed.read(request.headers.get("last-event-id"), kinds)
        first = await anext(frames)  # so that a refusal is an answer of its own
        return _Frames(first, frames)


class _Frames(StreamingResponse):
    """The response; its reader is counted out when it ends, however that comes, even before its first event was sent."""

    def __init__(self, first: StreamFrame | None, frames: AsyncGenerator[StreamFrame | None, None]) -> None:
        super().__init__(_events(first, frames), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._frames):
            await super().__call__(scope, receive, send)


async def _events(first: StreamFrame | None, frames: AsyncGenerator[StreamFrame | None, None]) -> AsyncIterator[bytes]:
    yield _event(first)
    async for frame in frames:
        yield _event(frame)


def _event(frame: StreamFrame | None) -> bytes:
    if frame is None:
        return _ALIVE
    head = b"id: %b\n" % frame.cursor.encode() if frame.cursor else b""
    return b"%bdata: %b\n\n" % (head, _encode(frame))


def _kinds(text: str | None) -> frozenset[StreamKind]:
    if text is None:
        return frozenset(KINDS)
    wanted = text.split(",")
    for kind in wanted:
        if kind not in KINDS:
            raise InvalidInput(f"kinds: {kind!r} is none of {', '.join(KINDS)}", "kinds")
    return frozenset(kind for kind in KINDS if kind in wanted)
