"""One accepted connection: frames in and out on a raw socket, with the descriptors that travel beside them.

asyncio's streams cannot carry descriptors, so the socket is read and written here, when the loop says it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol

from schema.errors import LinkError, SllmError
from schema.link import FrameDecoder, Hello, Message, Ping, Pong, encode_frame

__all__ = ["Connection", "Handler"]

MAX_BACKLOG_BYTES: Final = 256 << 20
"""A peer that lets more than this pile up is taken for dead."""
MAX_HELLO_BYTES: Final = 1 << 16
_HEADER_BYTES: Final = 4
_READ_BYTES: Final = 1 << 18
_MAX_DESCRIPTORS: Final = 16
_log = logging.getLogger(__name__)


class Handler(Protocol):
    """Who owns a connection. `received` may raise SllmError, which ends the connection and nothing else."""

    def received(self, connection: Connection, message: Any) -> None: ...

    def drained(self, connection: Connection) -> None:
        """The outbox has become empty after it was not."""

    def lost(self, connection: Connection, why: str) -> None:
        """Said once, also when this side closed it."""


class Connection:
    """A framed link. Begins by reading one `Hello` and then stops until `begin` says what comes next."""

    def __init__(self, sock: socket.socket, handler: Handler, name: str) -> None:
        self.name = name
        self.closed = False
        self.backlog_bytes = 0
        self._socket = sock
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()
        self._hello = bytearray()
        self._decoder: FrameDecoder[Any] | None = None
        self._outbox: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._descriptors: deque[int] = deque()
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def begin(self, kind: Any, handler: Handler, name: str) -> None:
        """Hand the connection to its owner; from now on it carries messages of the union ``kind``."""
        if self.closed:
            return
        self.name = name
        self._handler = handler
        self._decoder = FrameDecoder(kind)
        self._loop.add_reader(self._socket, self._readable)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Write a frame, or queue what the socket does not take. ``descriptors`` are duplicated.

        Nothing happens on a closed connection. A peer that does not read is given up.
        """
        if self.closed:
            return
        view = memoryview(encode_frame(message))
        self._outbox.append((view, tuple(os.dup(fd) for fd in descriptors)))
        self.backlog_bytes += len(view)
        if len(self._outbox) == 1:
            self._flush()
            if self._outbox and not self.closed:
                self._loop.add_writer(self._socket, self._writable)
        if self.backlog_bytes > MAX_BACKLOG_BYTES:
            self.close(f"it does not read: {self.backlog_bytes} bytes wait for it")

    def take_descriptors(self, count: int) -> list[int]:
        """The descriptors of a `Descriptors` message just received; the caller owns them. Raises LinkError if fewer came."""
        if not 0 <= count <= len(self._descriptors):
            raise LinkError(f"{count} descriptors were announced, {len(self._descriptors)} came")
        return [self._descriptors.popleft() for _ in range(count)]

    def drain(self) -> None:
        """Take in what has already come, as when the peer is known to be dead."""
        while not self.closed and self._readable():
            pass

    async def flushed(self, timeout_s: float) -> None:
        """Wait until the socket has taken everything, for at most ``timeout_s`` seconds."""
        deadline = self._loop.time() + timeout_s
        while self._outbox and not self.closed and (left := deadline - self._loop.time()) > 0:
            writable = self._loop.create_future()
            self._loop.add_writer(self._socket, _resolve, writable)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(writable, left)
            self._flush()

    def close(self, why: str) -> None:
        """End the connection, once; its owner hears ``why``."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for _, descriptors in self._outbox:
            _close_all(descriptors)
        self._outbox.clear()
        _close_all(self._descriptors)
        self._descriptors.clear()
        self._handler.lost(self, why)

    def _readable(self) -> bool:
        """Read once; True if something came."""
        try:
            return self._read()
        except LinkError as error:
            _log.warning("%s: %s", self.name, error)
            self.close(str(error))
        except SllmError as error:
            _log.warning("%s is closed: %s", self.name, error)
            self.close(str(error))
        except Exception as error:
            _log.exception("%s is closed after an internal error", self.name)
            self.close(f"{type(error).__name__}: {error}")
        return False

    def _read(self) -> bool:
        limit = _READ_BYTES if self._decoder is not None else self._hello_limit()
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, limit, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.close(f"reading failed: {error.strerror}")
            return False
        self._descriptors.extend(descriptors)
        if not data:
            self.close("it hung up")
            return False
        self.heard_at = self._loop.time()
        if self._decoder is None:
            self._read_hello(data)
            return True
        for message in self._decoder.feed(data):
            if self.closed:
                return False
            if isinstance(message, Ping):
                self.send(Pong(nonce=message.nonce))
            elif not isinstance(message, Pong):
                self._handler.received(self, message)
        return True

    def _hello_limit(self) -> int:
        """Only the first frame is read, so that what follows it is decoded as what its role may say."""
        have = len(self._hello)
        if have < _HEADER_BYTES:
            return _HEADER_BYTES - have
        length = int.from_bytes(self._hello[:_HEADER_BYTES], "big")
        if length > MAX_HELLO_BYTES:
            raise LinkError(f"the first frame announces {length} bytes; a Hello has at most {MAX_HELLO_BYTES}")
        return _HEADER_BYTES + length - have

    def _read_hello(self, data: bytes) -> None:
        self._hello += data
        if len(self._hello) < _HEADER_BYTES or self._hello_limit():
            return
        decoder: FrameDecoder[Hello] = FrameDecoder(Hello)
        (hello,) = decoder.feed(bytes(self._hello))
        self._loop.remove_reader(self._socket)
        self._handler.received(self, hello)

    def _writable(self) -> None:
        self._flush()
        if not self._outbox and not self.closed:
            self._loop.remove_writer(self._socket)
            self._handler.drained(self)

    def _flush(self) -> None:
        while self._outbox and not self.closed:
            view, descriptors = self._outbox[0]
            try:
                sent = socket.send_fds(self._socket, [view], descriptors) if descriptors else self._socket.send(view)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                # closed from the loop, not from within the call of whoever was sending
                for _, left in self._outbox:
                    _close_all(left)
                self._outbox.clear()
                self._loop.call_soon(self.close, f"writing failed: {error.strerror}")
                return
            _close_all(descriptors)
            self.backlog_bytes -= sent
            if sent == len(view):
                self._outbox.popleft()
            else:
                self._outbox[0] = (view[sent:], ())


def _close_all(descriptors: Sequence[int] | deque[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
