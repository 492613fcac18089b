"""Frames of an event stream, out of bytes as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from schema.errors import LinkError
from sllmctl.client.answers import decode

__all__ = ["Frames"]

T = TypeVar("T")
_EVENT_BYTES = 256 << 20


class Frames(Generic[T]):
    """Server-sent events, cut from bytes. Raises LinkError for what is no frame, or is longer than any."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._rest = bytearray()

    def take(self, chunk: bytes) -> Iterator[T]:
        seen = max(0, len(self._rest) - 1)
        self._rest += chunk
        while (end := self._rest.find(b"\n\n", seen)) >= 0:
            event = bytes(self._rest[:end])
            del self._rest[: end + 2]
            seen = 0
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    frame: T = decode(line[6:], self._kind)
                    yield frame
        if len(self._rest) > _EVENT_BYTES:
            raise LinkError(f"an event of the manager's stream is longer than {_EVENT_BYTES} bytes")
