"""GET with ranges over connections that stay open, straight into the memory it is meant for.

http.client rather than a larger client: none of those reads a body into memory that it is given. TLS is verified by the
system's certificates (SSL_CERT_FILE names others).
"""

from __future__ import annotations

import contextlib
import http.client
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Final, cast
from urllib.parse import quote, urljoin, urlsplit

from agent.store.remote.api import Body, Forbidden, Interrupted, left_s, nothing_there
from agent.store.remote.pace import Pace, PacedResponse
from schema.errors import Cancelled, InvalidCheckpoint, InvalidInput, SllmError, TimedOut, Unauthorised, Unreachable
from schema.remote import RemoteSettings

__all__ = ["Answer", "Wire"]

_REDIRECTS: Final = 5
_URL_PUNCTUATION: Final = "%/:=&?~#+!$,;'@()*[]"
_REDIRECT: Final = (301, 302, 303, 307, 308)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_Origin = tuple[str, str, int]


@dataclass(slots=True)
class Answer:
    """A response whose body is yet to be read. ``total_bytes`` is the file's size, None where the server does not say.

    ``body.version`` is what tells this file from a later one at the same address, as far as the server says.
    """

    status: int
    length: int | None
    total_bytes: int | None
    body: _WireBody


class Wire:
    """Connections to whatever servers it is led to. ``stopped`` ends them all. ``credentials`` says in words how those that a
    server wants are given."""

    def __init__(
        self,
        settings: RemoteSettings,
        software: str = "sllmctl",
        credentials: str = "give the node's agent credentials that may read it",
    ) -> None:
        self._settings = settings
        self._credentials = credentials
        self._headers = {"User-Agent": software, "Accept-Encoding": "identity"}
        self._lock = threading.Lock()
        self._idle: dict[_Origin, list[http.client.HTTPConnection]] = {}
        self._busy: set[http.client.HTTPConnection] = set()
        self._tls: ssl.SSLContext | None = None
        self._stopped = False

    @contextlib.contextmanager
    def request(
        self,
        method: str,
        url: str,
        where: str,
        headers: Mapping[str, str],
        deadline: float | None,
    ) -> Iterator[Answer]:
        """Ask, follow redirects, and read what is wanted of the body; ``where`` names the thing in errors, never ``url``.

        Raises what `agent.store.remote.api.Remote` says, for every status but 200 and 206.
        """
        sent = dict(headers)
        for _ in range(_REDIRECTS + 1):
            origin = _origin(url)
            connection, response = self._exchange(method, url, origin, where, sent, deadline)
            whole = False
            try:
                if response.status in _REDIRECT and (location := response.getheader("Location")):
                    target = _joined(url, location)
                    if origin[0] == "https" and _origin(target)[0] != "https":
                        raise Unreachable(f"{where} is redirected from https to an unencrypted address, which is not followed")
                    if _origin(target) != origin:
                        sent.pop("Authorization", None)
                    url = target
                    continue
                _check_status(response.status, where, self._credentials)
                body = _WireBody(self, response, where)
                length = response.length
                yield Answer(response.status, length, _total(response), body)
                whole = method == "HEAD" or body.ended
                return
            finally:
                response.close()
                self._give_back(connection, origin, keep=whole and not response.will_close)
        raise Unreachable(f"{where} is redirected more than {_REDIRECTS} times")

    @contextlib.contextmanager
    def range(
        self,
        url: str,
        where: str,
        headers: Mapping[str, str],
        offset: int,
        length: int,
        total_bytes: int | None,
        deadline: float | None,
    ) -> Iterator[_WireBody]:
        """The body of ``length`` bytes from ``offset`` on, and of nothing else."""
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}"} if length else {}
        with self.request("GET", url, where, {**headers, **wanted}, deadline) as answer:
            if total_bytes is not None and answer.total_bytes is not None and answer.total_bytes != total_bytes:
                raise InvalidCheckpoint(f"{where} has {answer.total_bytes} bytes; its manifest says {total_bytes}")
            if answer.status == HTTPStatus.OK and length and (offset or answer.length != length):
                raise InvalidInput(
                    f"{where}: the server ignores Range requests, so parts of it cannot be fetched; serve it with one that "
                    "honours them"
                )
            if answer.status == HTTPStatus.PARTIAL_CONTENT and answer.body.started != offset:
                raise InvalidInput(f"{where}: the server sent another range than the one asked for, at byte {offset}")
            if length and answer.length is not None and answer.length != length:
                raise Interrupted(f"{where}: the server sends {answer.length} of the {length} bytes at offset {offset}")
            yield answer.body

    def stop(self) -> None:
        """End all requests, and all to come, as Cancelled."""
        with self._lock:
            self._stopped = True
            busy = list(self._busy)
        for connection in busy:
            _shut(connection)

    @property
    def stopped(self) -> bool:
        return self._stopped

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _exchange(
        self, method: str, url: str, origin: _Origin, where: str, headers: Mapping[str, str], deadline: float | None
    ) -> tuple[http.client.HTTPConnection, PacedResponse]:
        split = urlsplit(url)
        path = (split.path or "/") + (f"?{split.query}" if split.query else "")
        while True:
            connection, reused = self._take(origin)
            try:
                connection.timeout = left_s(deadline, self._settings.connect_s, where)
                if connection.sock is None:
                    connection.connect()
                    if self._stopped:  # it was not to be seen while it was being made
                        raise OSError("stopped")
                answer_s = left_s(deadline, self._settings.read_s, where)
                connection.sock.settimeout(answer_s)
                connection.request(method, path, headers={**self._headers, **headers})
                sock = connection.sock
                pace = Pace(where, self._settings.read_s, time.monotonic() + answer_s)
                connection.response_class = partial(PacedResponse, pace=pace)  # type: ignore[assignment]
                response = cast("PacedResponse", connection.getresponse())
                pace.deadline = deadline
                # Let go of when the server is going to close it; `_shut` needs it until the body is over.
                connection.sock = connection.sock or sock
                return connection, response
            except ssl.SSLCertVerificationError as error:
                self._give_back(connection, origin, keep=False)
                raise Unreachable(f"{where}: the server's certificate is not valid: {error.verify_message}") from error
            except (OSError, http.client.HTTPException, SllmError) as error:
                self._give_back(connection, origin, keep=False)
                if self._stopped:
                    raise Cancelled("the transfer was cancelled") from error
                if isinstance(error, SllmError):
                    raise _passing(error) from error
                if reused and not isinstance(error, TimeoutError):
                    continue  # the server has closed it while it was idle
                raise Interrupted(f"{where}: {_describe(error)}") from error
            except BaseException:
                self._give_back(connection, origin, keep=False)
                raise

    def _take(self, origin: _Origin) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._stopped:
                raise Cancelled("the transfer was cancelled")
            idle = self._idle.get(origin)
            connection, reused = (idle.pop(), True) if idle else (self._make(origin), False)
            self._busy.add(connection)
        return connection, reused

    def _make(self, origin: _Origin) -> http.client.HTTPConnection:
        scheme, host, port = origin
        if scheme == "http":
            return http.client.HTTPConnection(host, port)
        self._tls = self._tls or ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, context=self._tls)

    def _give_back(self, connection: http.client.HTTPConnection, origin: _Origin, *, keep: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            if keep and not self._stopped:
                self._idle.setdefault(origin, []).append(connection)
                return
        connection.close()


class _WireBody(Body):
    """A response's body. ``started`` is where a partial one begins in the file, -1 where it does not say.

    ``version``: the file's size, and its ETag or else when it was last changed.
    """

    def __init__(self, wire: Wire, response: PacedResponse, where: str) -> None:
        self._wire = wire
        self._response = response
        self._where = where
        self._read_bytes = 0
        tag = response.getheader("ETag") or response.getheader("Last-Modified", "")
        self.version = f"{_total(response)} {tag}"
        match = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range", ""))
        self.started = int(match[1]) if match and response.status == HTTPStatus.PARTIAL_CONTENT else -1

    @property
    def ended(self) -> bool:
        """True when nothing more will come, so that the connection can be used again."""
        if self._response.length == 0 and not self._response.isclosed():
            self._response.read()
        return self._response.isclosed()

    def some(self, view: memoryview) -> int:
        if not (count := self.next(view)):
            raise Interrupted(f"{self._where}: the connection ended after {self._read_bytes} bytes, {len(view)} early")
        return count

    def extend(self, deadline: float) -> None:
        """It has until then, from now on."""
        self._response.pace.deadline = deadline

    def next(self, view: memoryview) -> int:
        """What comes next, at least a byte; 0 at the end."""
        response = self._response
        if self._wire.stopped:
            raise Cancelled("the transfer was cancelled")
        try:
            if response.length is None or response.chunked or response.fp is None:
                count = response.readinto(view)
            else:  # what has come, without waiting for more
                count = response.fp.readinto1(view[: response.length])
                response.length -= count
        except (OSError, http.client.HTTPException, ValueError, SllmError) as error:
            if self._wire.stopped:
                raise Cancelled("the transfer was cancelled") from error
            if isinstance(error, SllmError):
                raise _passing(error) from error
            raise Interrupted(f"{self._where}: {_describe(error)} after {self._read_bytes} bytes") from error
        if not count and self._wire.stopped:
            raise Cancelled("the transfer was cancelled")
        self._read_bytes += count
        return count


def _origin(url: str) -> _Origin:
    try:
        split = urlsplit(url)
        port = split.port
    except ValueError as error:
        raise InvalidInput(f"an address on the way is not valid: {error}") from error
    if split.scheme not in ("http", "https") or not split.hostname:
        raise Unreachable("a redirect leads to an address that is neither http nor https")
    return split.scheme, split.hostname, port or (443 if split.scheme == "https" else 80)


def _joined(url: str, location: str) -> str:
    """Where a redirect leads. Some servers name it as it is, in UTF-8; http.client reads headers as Latin-1."""
    try:
        return urljoin(url, quote(location, safe=_URL_PUNCTUATION, encoding="latin-1"))
    except ValueError as error:
        raise InvalidInput(f"an address on the way is not valid: {error}") from error


def _total(response: http.client.HTTPResponse) -> int | None:
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        match = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range", ""))
        return int(match[3]) if match and match[3] != "*" else None
    length = response.getheader("Content-Length", "")
    return int(length) if re.fullmatch(r"\d{1,18}", length) else None


def _check_status(status: int, where: str, credentials: str) -> None:
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        return
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise nothing_there(where)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        kind = Forbidden if status == HTTPStatus.FORBIDDEN else Unauthorised
        raise kind(f"{where}: access is refused ({status}); {credentials}")
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        raise InvalidCheckpoint(f"{where} is shorter than its manifest says (416)")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT):
        raise Interrupted(f"{where}: the server answers {status}")
    raise Unreachable(f"{where}: the server answers {status}")


def _passing(error: SllmError) -> SllmError:
    return Interrupted(str(error)) if isinstance(error, TimedOut) else error


def _describe(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "the server did not answer in time"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return type(error).__name__  # its text may hold a part of what was sent


def _shut(connection: http.client.HTTPConnection) -> None:
    """Wake whoever waits for this connection's socket."""
    with contextlib.suppress(OSError, AttributeError):
        connection.sock.shutdown(2)
