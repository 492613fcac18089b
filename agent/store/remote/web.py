"""A remote behind an HTTP server that honours Range requests, ``http://`` or ``https://``: read, never written."""

from __future__ import annotations

import contextlib
import netrc
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from http import HTTPStatus
from urllib.parse import quote, urlsplit

from agent.store.remote.api import STEADY_BYTES, Body, Source
from agent.store.remote.wire import Wire
from schema.errors import InvalidCheckpoint, InvalidInput, NotFound
from schema.remote import RemoteSettings

__all__ = ["WebRemote"]


class WebRemote:
    """A `Remote` over HTTP. Name and password come from the ~/.netrc of the agent's user, for https alone."""

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        self.url = url
        self._base = url.rstrip("/")
        self._headers, credentials = _authorisation(url)
        self._wire = Wire(settings, credentials=credentials)

    def where(self, path: str) -> str:
        return f"{self._base}/{path}"

    @contextlib.contextmanager
    def open(
        self, path: str, offset: int, length: int, *, total_bytes: int | None = None, deadline: float | None = None
    ) -> Iterator[Body]:
        url = self._address(path)
        with self._wire.range(url, self.where(path), self._headers, offset, length, total_bytes, deadline) as body:
            yield body

    def read(self, path: str, limit_bytes: int, part_s: float | None = None) -> bytes:
        return read_whole(self._wire, self._address(path), self.where(path), self._headers, limit_bytes, part_s)

    def size(self, path: str) -> int | None:
        try:
            with self._wire.request("HEAD", self._address(path), self.where(path), self._headers, None) as answer:
                return answer.total_bytes or 0
        except NotFound:
            return None

    def look(self, path: str) -> tuple[int, str]:
        """A file's size, and its version (`Answer`). Raises InvalidInput where the server does not honour Range requests."""
        where = self.where(path)
        with contextlib.ExitStack() as stack:
            try:
                answer = stack.enter_context(
                    self._wire.request("GET", self._address(path), where, {**self._headers, "Range": "bytes=0-0"}, None)
                )
            except InvalidCheckpoint as error:  # there is no first byte
                raise InvalidCheckpoint(f"{where} is empty") from error
            if answer.status != HTTPStatus.PARTIAL_CONTENT or answer.total_bytes is None:
                raise InvalidInput(
                    f"{where}: the server ignores Range requests, so parts of it cannot be fetched; serve it with one that "
                    "honours them"
                )
            return answer.total_bytes, answer.body.version

    @contextlib.contextmanager
    def open_version(self, path: str, version: str, offset: int, length: int, deadline: float | None = None) -> Iterator[Body]:
        """As `open`, of the file that `look` has seen. Raises InvalidCheckpoint when it is another one now."""
        changed = InvalidCheckpoint(f"{self.where(path)} was changed while it was fetched")
        with contextlib.ExitStack() as stack:
            try:
                body = stack.enter_context(
                    self._wire.range(self._address(path), self.where(path), self._headers, offset, length, None, deadline)
                )
            except InvalidCheckpoint as error:  # it is shorter
                raise changed from error
            if body.version != version:
                raise changed
            yield body

    def children(self, path: str) -> list[str]:
        raise InvalidInput(f"{self.url} is an HTTP server, which cannot be asked what it has; name the layout")

    def write(self, path: str, size_bytes: int, source: Source, wrote: Callable[[int], None]) -> None:
        raise InvalidInput(f"{self.url} is an HTTP server, which is only read; publish to a directory or to S3", "url")

    def abort(self) -> None:
        self._wire.stop()

    def close(self) -> None:
        self._wire.close()

    def _address(self, path: str) -> str:
        return f"{self._base}/{quote(path)}"


def read_whole(
    wire: Wire, url: str, where: str, headers: dict[str, str], limit_bytes: int, part_s: float | None = None
) -> bytes:
    """All of a small file, whether or not the server says how long it is. ``part_s`` as in `Remote.read`."""
    data = bytearray()
    block = memoryview(bytearray(1 << 16))
    steady = STEADY_BYTES
    with wire.request("GET", url, where, headers, None if part_s is None else time.monotonic() + part_s) as answer:
        while count := answer.body.next(block):
            data += block[:count]
            if part_s is not None and len(data) >= steady:
                steady = len(data) + STEADY_BYTES
                answer.body.extend(time.monotonic() + part_s)
            if len(data) > limit_bytes:
                raise InvalidCheckpoint(f"{where} has more than {limit_bytes} bytes")
            if answer.length is not None and len(data) >= answer.length:
                break
        if answer.length is not None and len(data) < answer.length:
            answer.body.some(block[: answer.length - len(data)])  # says that it was short
    return bytes(data)


def _authorisation(url: str) -> tuple[dict[str, str], str]:
    """What a server is sent, and how that is given, for one that refuses."""
    split = urlsplit(url)
    if split.scheme != "https":
        return {}, "credentials are sent over https alone"
    host = split.hostname or ""
    give = f"give the node's agent credentials that may read it, as an entry for {host} in the ~/.netrc of its user"
    try:
        # Only what is meant for this host: the file's `default` entry would go to whatever host a URL names.
        found = netrc.netrc().hosts.get(host)
    except FileNotFoundError:
        return {}, give
    except OSError as error:
        return {}, f"{give}, which cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return {}, f"{give}, which is no text"
    except netrc.NetrcParseError as error:  # of a line it may hold the password
        why = error.msg if error.lineno is None else f"line {error.lineno} of it cannot be understood"
        return {}, f"{give}, which is not used: {why}"
    if found is None:
        return {}, give
    return {"Authorization": "Basic " + b64encode(f"{found[0]}:{found[2]}".encode()).decode()}, give
