"""Two thin transports that carry any `Call` over the manager's unix socket: for commands, and for an event loop."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import httpx

from schema.admin import LogFrame, StreamFrame, StreamKind
from schema.errors import TimedOut, Unauthorised, Unreachable
from sllmctl.client.answers import problem
from sllmctl.client.calls import Call, LogQuery
from sllmctl.client.stream import Frames
from sllmctl.config import ClientSettings

__all__ = ["AdminClient", "AsyncAdminClient", "NoAnswer", "NoManager"]

T = TypeVar("T")
_BASE_URL = "http://sllmctl/admin/v1/"
_VERIFY = False
"""A unix socket has no TLS, and to read the certificates that are trusted takes longer than most commands."""


class NoManager(Unreachable):
    """No manager answers now: none was started yet, or it starts, restarts, or hangs. To ask again may do, unless the socket
    itself is wrong: that is plain Unreachable, as what a manager's own answer may say of a node."""


class NoAnswer(TimedOut):
    """No manager answered for as long as whoever asks wanted to wait at all; no further one is worth asking for."""


class Limit(Protocol):
    """How long whoever asks waits for all its answers together; ``str()`` says that."""

    @property
    def left_s(self) -> float: ...


_LEAST_S: Final = 1.0
"""An answer is waited for so long however little is left: what a command that ran out of time says is then how things are."""


class AdminClient:
    """Asks the manager at a unix socket and waits for the answer; for no answer longer than ``limit`` has left."""

    def __init__(self, path: Path, settings: ClientSettings, limit: Limit | None = None) -> None:
        self._socket, self._settings, self._knocked = path, settings, False
        self._limit = limit
        self._followed: socket.socket | None = None
        self._broken_off = False
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path), verify=_VERIFY), base_url=_BASE_URL, trust_env=False
        )

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, call: Call[T]) -> T:
        """The answer. Raises NoManager, Unreachable (what is there is no socket), Unauthorised (it is another user's), NoAnswer
        (the limit has run out), or what the answer's body says."""
        try:
            answer = self._answer(call)
        except NoManager as error:
            if self._limit is None or self._limit.left_s:
                raise
            raise NoAnswer(f"{error} ({self._limit} were waited)") from error
        return _result(call, answer, self._socket)

    def _answer(self, call: Call[Any]) -> httpx.Response:
        if not self._knocked:
            _knock(self._socket)
            self._knocked = True
        try:
            return self._http.request(**_arguments(call, self._settings, self._limit))
        except httpx.TransportError as error:
            self._knocked = False  # another may stand behind the door when it is asked again
            raise _unanswered(self._socket, error) from error

    def follow(self, cursor: str | None = None, kinds: Sequence[StreamKind] = ()) -> Iterator[StreamFrame]:
        """The event stream from ``cursor`` on (a frame's), or with a whole picture first; of these ``kinds``, else of all.

        Never ends by itself. Raises Unreachable when the manager goes away or says nothing for long: follow again, from the
        last frame's cursor.
        """
        return self._frames(_following(cursor, kinds, self._settings), StreamFrame)

    def follow_logs(self, wanted: LogQuery) -> Iterator[LogFrame]:
        """The lines that are there, then those that are written. Ends and raises as `follow` does."""
        return self._frames(_log_following(wanted, self._settings), LogFrame)

    def _frames(self, arguments: dict[str, Any], kind: type[T]) -> Iterator[T]:
        _knock(self._socket)
        frames = Frames(kind)
        try:
            with self._http.stream(**arguments) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    raise problem(answer, self._socket)
                self._followed = answer.extensions["network_stream"].get_extra_info("socket")
                if self._broken_off:
                    raise Unreachable("it was broken off before it began")
                for chunk in answer.iter_raw():
                    yield from frames.take(chunk)
        except httpx.TransportError as error:
            raise _unanswered(self._socket, error) from error
        raise Unreachable(f"the manager at {self._socket} ended the event stream; it is stopping")

    def break_off(self) -> None:
        """Called by another thread: whoever follows something meets its end, as if the manager had hung up (Unreachable)."""
        self._broken_off = True
        if self._followed is not None:
            with suppress(OSError):  # it has ended by itself
                self._followed.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._http.close()


class AsyncAdminClient:
    """The same for code that runs on an event loop; any number of calls may be under way at once."""

    def __init__(self, path: Path, settings: ClientSettings) -> None:
        self._socket, self._settings, self._knocked = path, settings, False
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(path), verify=_VERIFY), base_url=_BASE_URL, trust_env=False
        )

    async def __aenter__(self) -> AsyncAdminClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def ask(self, call: Call[T]) -> T:
        """The answer; raises as `AdminClient.ask` does."""
        if not self._knocked:
            _knock(self._socket)
            self._knocked = True
        try:
            answer = await self._http.request(**_arguments(call, self._settings))
        except httpx.TransportError as error:
            self._knocked = False
            raise _unanswered(self._socket, error) from error
        return _result(call, answer, self._socket)

    async def follow(self, cursor: str | None = None, kinds: Sequence[StreamKind] = ()) -> AsyncGenerator[StreamFrame, None]:
        """As `AdminClient.follow`."""
        async with aclosing(self._frames(_following(cursor, kinds, self._settings), StreamFrame)) as frames:
            async for frame in frames:
                yield frame

    async def follow_logs(self, wanted: LogQuery) -> AsyncGenerator[LogFrame, None]:
        """As `AdminClient.follow_logs`."""
        async with aclosing(self._frames(_log_following(wanted, self._settings), LogFrame)) as frames:
            async for frame in frames:
                yield frame

    async def _frames(self, arguments: dict[str, Any], kind: type[T]) -> AsyncGenerator[T, None]:
        _knock(self._socket)
        frames = Frames(kind)
        try:
            async with self._http.stream(**arguments) as answer:
                if answer.status_code >= 400:
                    await answer.aread()
                    raise problem(answer, self._socket)
                async for chunk in answer.aiter_raw():
                    for frame in frames.take(chunk):
                        yield frame
        except httpx.TransportError as error:
            raise _unanswered(self._socket, error) from error
        raise Unreachable(f"the manager at {self._socket} ended the event stream; it is stopping")

    async def close(self) -> None:
        await self._http.aclose()


def _following(cursor: str | None, kinds: Sequence[StreamKind], settings: ClientSettings) -> dict[str, Any]:
    return {
        "method": "GET",
        "url": "stream",
        "params": {"kinds": ",".join(kinds)} if kinds else {},
        "headers": {"last-event-id": cursor} if cursor else {},
        "timeout": httpx.Timeout(settings.silence_s, connect=settings.connect_s),
    }


def _log_following(wanted: LogQuery, settings: ClientSettings) -> dict[str, Any]:
    return {
        "method": "GET",
        "url": wanted.path,
        "params": {**wanted.query, "follow": "1"},
        "timeout": httpx.Timeout(max(settings.silence_s, settings.answer_s), connect=settings.connect_s),
    }


def _arguments(call: Call[Any], settings: ClientSettings, limit: Limit | None = None) -> dict[str, Any]:
    answer_s, connect_s = settings.answer_s + call.hold_s, settings.connect_s
    if limit is not None:
        answer_s = min(answer_s, max(limit.left_s, call.hold_s + _LEAST_S))
        connect_s = min(connect_s, answer_s)
    timeout = httpx.Timeout(answer_s, connect=connect_s)
    headers = {"content-type": "application/json"} if call.body is not None else {}
    return {
        "method": call.method,
        "url": call.path,
        "params": dict(call.query),
        "content": call.body,
        "headers": headers,
        "timeout": timeout,
    }


def _result(call: Call[T], answer: httpx.Response, path: Path) -> T:
    if answer.status_code >= 400:
        raise problem(answer, path)
    return call.read(answer.status_code, answer.content)


def _knock(path: Path) -> None:
    """See who is behind the socket. The system's own error tells a dead manager from another user's; httpx's does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.setblocking(False)
        try:
            door.connect(str(path))
        except BlockingIOError:
            return
        except PermissionError as error:
            raise Unauthorised(
                f"the manager's socket {path} is another user's; run this as the user that runs the manager"
            ) from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if path.exists() and not path.is_socket():
                raise Unreachable(f"{path} is no socket; move it away, then `sllmctl serve`") from error
            raise NoManager(_nobody(path)) from error
        except OSError as error:
            raise Unreachable(f"{path} cannot be asked: {error.strerror or error}") from error


def _nobody(path: Path) -> str:
    return f"no manager answers at {path}; start it with `sllmctl serve`"


def _unanswered(path: Path, error: httpx.TransportError) -> NoManager:
    if isinstance(error, httpx.ConnectError):
        return NoManager(_nobody(path))
    if isinstance(error, httpx.TimeoutException):
        return NoManager(f"the manager at {path} did not answer in time; see its log, and `sllmctl doctor`")
    return NoManager(f"the manager at {path} broke off before it answered ({error or type(error).__name__}); ask again")
