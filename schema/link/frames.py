"""Frames: a length and a body, cut from a stream of bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from schema.errors import LinkError
from schema.link.base import MAX_FRAME_BYTES, Message

__all__ = ["FrameDecoder", "encode_frame"]

_HEADER = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: Message) -> bytes:
    """The frame of one message. Raises LinkError when it is longer than MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise LinkError(f"a {type(message).__name__} of {len(body)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(body)) + body


T = TypeVar("T")


class FrameDecoder(Generic[T]):
    """Cuts a byte stream into messages of one union type. After an error the stream cannot be used any more."""

    def __init__(self, kind: Any) -> None:
        self._decode: Callable[[bytes], T] = msgspec.msgpack.Decoder(kind).decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """The messages completed by ``data``. Raises LinkError for an oversized frame or a body that is no such message."""
        self._buffer += data
        messages: list[T] = []
        start, end = 0, len(self._buffer)
        while end - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise LinkError(f"a frame announces {length} bytes; the limit is {MAX_FRAME_BYTES}")
            if end - start - _HEADER.size < length:
                break
            body = bytes(self._buffer[start + _HEADER.size : start + _HEADER.size + length])
            try:
                messages.append(self._decode(body))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise LinkError(f"a frame of {length} bytes is not a message of this link: {error}") from error
            start += _HEADER.size + length
        del self._buffer[:start]
        return messages
