"""The dialler's end of a link on this host: how store, zygote and worker speak to their agent, over its lives.

Synchronous, for processes whose main thread is their only loop. A lost connection is dialled again with jittered back-off;
each `Welcome` that comes out of `poll` marks a new connection, upon which the owner states its whole truth.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from schema.errors import LinkError
from schema.link import FrameDecoder, Hello, Message, Refused, Welcome, encode_frame

__all__ = ["Channel"]

T = TypeVar("T")

_FIRST_DELAY_S = 0.01
_LONGEST_DELAY_S = 0.5
_READ_BYTES = 1 << 18
_MAX_DESCRIPTORS = 16
_log = logging.getLogger(__name__)


class Channel(Generic[T]):
    """A link to the agent that outlives the agent's lives. ``incoming`` is the union of what the agent may say.

    Messages sent while there is no connection are dropped: the truth that follows the next `Welcome` replaces them.
    """

    def __init__(self, path: Path, hello: Hello, incoming: Any) -> None:
        self._path = str(path)
        self._hello = hello
        self._incoming = incoming
        self._socket: socket.socket | None = None
        self._decoder: FrameDecoder[T] = FrameDecoder(incoming)
        self._outbox: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._descriptors: deque[int] = deque()
        self._welcomed = False
        self._lost_at = time.monotonic()
        self._dial_at = 0.0
        self._delay_s = _FIRST_DELAY_S
        self.last_refusal: str | None = None
        self.refused = False
        """True since the agent answered with `Refused`; a `Welcome` clears it, a broken frame does not set it."""

    @property
    def connected(self) -> bool:
        """True between a `Welcome` and the loss of that connection."""
        return self._welcomed

    @property
    def lost_for_s(self) -> float:
        """Seconds since the connection was lost, or since the beginning if there was none; 0 while connected."""
        return 0.0 if self._welcomed else time.monotonic() - self._lost_at

    @property
    def backlog(self) -> int:
        """Frames not yet taken by the socket; a sender of much waits until it is 0."""
        return len(self._outbox)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Queue a frame and write what the socket takes. ``descriptors`` are duplicated, for the outbox's own keeping."""
        if not self._welcomed:
            return
        self._queue(message, descriptors)
        self._flush()

    def take_descriptors(self, count: int) -> list[int]:
        """The descriptors of a `Descriptors` message just received; the caller owns them. Raises LinkError if fewer came."""
        if count > len(self._descriptors):
            raise LinkError(f"{count} descriptors were announced, {len(self._descriptors)} came")
        return [self._descriptors.popleft() for _ in range(count)]

    def poll(self, timeout_s: float | None, wake: Sequence[int] = ()) -> list[T]:
        """Messages that have come. Waits for the first, or for a ``wake`` descriptor, up to ``timeout_s`` (None: without end).

        Dials when there is no connection. Never raises for a broken link: it is closed and dialled again.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._socket is None:
                self._dial()
            poller = select.poll()
            for descriptor in wake:
                poller.register(descriptor, select.POLLIN)
            if self._socket is not None:
                poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            ready = dict(poller.poll(self._wait_ms(deadline)))
            messages: list[T] = []
            if self._socket is not None and (state := ready.get(self._socket.fileno(), 0)):
                if state & ~select.POLLOUT:
                    messages = self._read()
                if state & select.POLLOUT:
                    self._flush()
            if messages or any(descriptor in ready for descriptor in wake):
                return messages
            if deadline is not None and time.monotonic() >= deadline:
                return messages

    def close(self, linger_s: float = 1.0) -> None:
        """Write what is queued, for at most ``linger_s`` seconds, and close. The channel can be polled again, which dials."""
        deadline = time.monotonic() + linger_s
        while self._socket is not None and self._outbox and time.monotonic() < deadline:
            poller = select.poll()
            poller.register(self._socket, select.POLLOUT)
            if poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                self._flush()
        self._lose()

    def abandon(self) -> None:
        """Forget an inherited connection without a word, as a fork's child must."""
        self._lose()

    def _wait_ms(self, deadline: float | None) -> float | None:
        until = deadline
        if self._socket is None:
            until = self._dial_at if deadline is None else min(deadline, self._dial_at)
        return None if until is None else max(0.0, until - time.monotonic()) * 1000

    def _dial(self) -> None:
        if time.monotonic() < self._dial_at:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            self._back_off()
            return
        sock.setblocking(False)
        self._socket = sock
        self._decoder = FrameDecoder(self._incoming)
        self._queue(self._hello, ())
        self._flush()

    def _back_off(self) -> None:
        self._dial_at = time.monotonic() + self._delay_s * random.uniform(0.5, 1.5)  # noqa: S311 - jitter, not a secret
        self._delay_s = min(self._delay_s * 2, _LONGEST_DELAY_S)

    def _queue(self, message: Message, descriptors: Sequence[int]) -> None:
        self._outbox.append((memoryview(encode_frame(message)), tuple(os.dup(fd) for fd in descriptors)))

    def _flush(self) -> None:
        while self._socket is not None and self._outbox:
            view, descriptors = self._outbox[0]
            try:
                sent = socket.send_fds(self._socket, [view], list(descriptors))
            except (BlockingIOError, InterruptedError):
                return
            except (BrokenPipeError, ConnectionResetError):
                # The agent is gone, but what it said last has not been read: reading comes to the end of that by itself.
                self._drop_outbox()
                return
            except OSError:
                self._lose()
                return
            for descriptor in descriptors:
                os.close(descriptor)
            if sent == len(view):
                self._outbox.popleft()
            else:
                self._outbox[0] = (view[sent:], ())

    def _read(self) -> list[T]:
        assert self._socket is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _READ_BYTES, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            self._lose()
            return []
        self._descriptors.extend(descriptors)
        if not data:
            self._lose()
            return []
        try:
            messages = self._decoder.feed(data)
        except LinkError as error:
            if str(error) != self.last_refusal:  # said again on every connection, by an agent of another build
                _log.error("the link to the agent is dropped: %s", error)
            self.last_refusal = str(error)
            self._lose()
            return []
        for message in messages:
            if isinstance(message, Welcome):
                self._welcomed = True
                self.refused = False
                self._delay_s = _FIRST_DELAY_S
            elif isinstance(message, Refused):
                self.last_refusal = message.fault.message
                self.refused = True
                self._lose()
                return []
        return messages

    def _lose(self) -> None:
        if self._welcomed:
            self._lost_at = time.monotonic()
        self._welcomed = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._back_off()
        self._drop_outbox()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _drop_outbox(self) -> None:
        for _, descriptors in self._outbox:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._outbox.clear()
