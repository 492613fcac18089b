"""The agent's one socket: who dials it says Hello within a bounded time, and is handed on or refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from agent.daemon.connection import Connection
from schema.errors import Conflict, Fault, LinkError, SllmError
from schema.link import PROTOCOL, PROTOCOL_OLDEST, Hello, Refused

__all__ = ["Server", "common_version"]

HELLO_S: Final = 10.0
"""A dialler that has not said Hello by then is hung up on."""
_MAX_STRANGERS: Final = 64
_AGAIN_S: Final = 1.0
"""How long nobody is accepted after one could not be."""
_log = logging.getLogger(__name__)


def common_version(hello: Hello) -> int:
    """The newest version that both sides speak. Raises LinkError when there is none, naming who must be upgraded."""
    version = min(hello.protocol, PROTOCOL)
    if version < max(hello.protocol_oldest, PROTOCOL_OLDEST):
        older = "this agent" if hello.protocol > PROTOCOL else f"the {hello.role}"
        raise LinkError(
            f"the {hello.role} ({hello.software}) speaks link versions {hello.protocol_oldest} to {hello.protocol}, "
            f"this agent {PROTOCOL_OLDEST} to {PROTOCOL}; upgrade {older}"
        )
    return version


class Server:
    """Listens at a path, mode 0600. ``admit`` takes a connection whose Hello has come; it may raise SllmError to refuse it."""

    def __init__(self, path: Path, admit: Callable[[Connection, Hello], None]) -> None:
        self._path = path
        self._admit = admit
        self._listener: socket.socket | None = None
        self._strangers: dict[Connection, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()

    def listen(self) -> None:
        """Begin; a socket file that an earlier life left is replaced (the caller holds the lock). Raises Conflict."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self._path.lstat().st_mode):
                raise Conflict(f"{self._path} is in the way and is no socket; remove it")
            self._path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise Conflict(f"cannot listen at {self._path}: {error.strerror}") from error
        listener.setblocking(False)
        self._listener = listener
        self._hear()

    def close(self) -> None:
        """Listen no more and hang up on those who have not been admitted."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        for connection in list(self._strangers):
            connection.close("the agent ends")

    def refuse(self, connection: Connection, error: SllmError) -> None:
        """Say why, and hang up."""
        _log.warning("%s is refused: %s", connection.name, error)
        connection.send(Refused(fault=Fault.of(error)))
        connection.close(str(error))

    def _hear(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # of descriptors, say, there are none left: whoever dials waits, and is heard of all the time
            _log.error("cannot accept a connection: %s; trying again in %g s", error, _AGAIN_S)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_AGAIN_S, self._hear)
            return
        if len(self._strangers) >= _MAX_STRANGERS:
            _log.warning("too many connections have not said Hello; one more is closed")
            sock.close()
            return
        connection = Connection(sock, self, "a dialler")
        why = f"it did not say Hello within {HELLO_S:g} s"
        self._strangers[connection] = self._loop.call_later(HELLO_S, connection.close, why)

    # --- Handler of those who have not been admitted yet

    def received(self, connection: Connection, message: Any) -> None:
        self._strangers.pop(connection).cancel()
        assert isinstance(message, Hello)
        connection.name = f"{message.role} (pid {message.pid})"
        try:
            common_version(message)
            self._admit(connection, message)
        except SllmError as error:
            self.refuse(connection, error)

    def drained(self, connection: Connection) -> None:
        pass

    def lost(self, connection: Connection, why: str) -> None:
        if (timer := self._strangers.pop(connection, None)) is not None:
            timer.cancel()
            _log.info("a dialler left without being admitted: %s", why)
