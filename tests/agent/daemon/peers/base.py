"""One end of a link as a test plays it: frames in and out, with descriptors, and waiting for what is said."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from schema.link import (
    FrameDecoder,
    Message,
    encode_frame,
)

WAIT_S = 60.0
DIGEST = "ab" * 32
T = TypeVar("T")


class Hangup(Exception):
    """The agent has closed the connection."""


class Peer:
    """A dialler of the agent's socket."""

    def __init__(self, kind: Any) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.seen: list[Any] = []
        self.descriptors: list[int] = []
        self.ended = False
        self._decoder: FrameDecoder[Any] = FrameDecoder(kind)
        self._ready: list[Any] = []

    async def dial(self, path: Path, hello: Message | None) -> None:
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    self.socket.connect(str(path))
                    break
                except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                    await asyncio.sleep(0.005)
        if hello is not None:
            self.send(hello)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        self.send_raw(encode_frame(message), descriptors)

    def send_raw(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        view = memoryview(data)
        self.socket.setblocking(True)
        try:
            sent = socket.send_fds(self.socket, [view], list(descriptors))
            if sent < len(view):
                self.socket.sendall(view[sent:])
        finally:
            self.socket.setblocking(False)

    async def next(self) -> Any:
        """The next message. Raises Hangup at the end of the connection."""
        loop = asyncio.get_running_loop()
        while not self._ready:
            readable = asyncio.Event()
            loop.add_reader(self.socket, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(self.socket)
            try:
                data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 18, 16, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                data, descriptors = b"", []
            self.descriptors.extend(descriptors)
            if not data:
                self.ended = True
                raise Hangup
            self._ready.extend(self._decoder.feed(data))
        message = self._ready.pop(0)
        self.seen.append(message)
        return message

    async def take(self, kind: type[T], where: Callable[[T], bool] = lambda _: True, timeout_s: float = WAIT_S) -> T:
        """The next message of this kind for which ``where`` holds; what comes before it is only noted in ``seen``."""
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self.next()
                if isinstance(message, kind) and where(message):
                    return message

    async def hangup(self) -> None:
        """Wait until the agent has closed the connection."""
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(Hangup):
                while True:
                    await self.next()

    def close(self) -> None:
        self.socket.close()
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.descriptors.clear()
