"""A response's bytes within a deadline: a server that trickles, in its head or its body, is not waited for byte by byte."""

from __future__ import annotations

import http.client
import io
import socket
from dataclasses import dataclass
from typing import Any

from agent.store.remote.api import left_s

__all__ = ["Pace", "PacedResponse"]


@dataclass(slots=True)
class Pace:
    """How long is waited for what comes next: ``read_s`` at most, and not beyond ``deadline``, which may be changed."""

    where: str
    read_s: float
    deadline: float | None

    def left_s(self) -> float:
        """Raises TimedOut when the deadline has passed."""
        return left_s(self.deadline, self.read_s, f"{self.where}: all of it")


class PacedResponse(http.client.HTTPResponse):
    """A response of which every receive, of its head too, is one at a ``pace``. Reads raise what `Pace.left_s` does."""

    def __init__(self, sock: socket.socket, *arguments: Any, pace: Pace, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.pace = pace
        self.fp.close()
        self.fp = io.BufferedReader(_Receives(sock, pace))


class _Receives(io.RawIOBase):
    def __init__(self, sock: socket.socket, pace: Pace) -> None:
        self._socket = sock
        self._file = sock.makefile("rb", buffering=0)  # keeps the connection for as long as the response is read
        self._pace = pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._pace.left_s())
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()
