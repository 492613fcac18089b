"""A remote behind an HTTP server that honours Range requests, ``http://`` or ``https://``: read, never written."""

from __future__ import annotations

import contextlib
import netrc
from base64 import b64encode
from collections.abc import Callable, Iterator
from urllib.parse import quote, urlsplit

from agent.store.remote.api import Body, Source
from agent.store.remote.wire import Wire
from schema.errors import InvalidCheckpoint, InvalidInput, NotFound
from schema.remote import RemoteSettings

__all__ = ["WebRemote"]


class WebRemote:
    """A `Remote` over HTTP. Name and password come from the ~/.netrc of the agent's user, for https alone."""

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        self.url = url
        self._wire = Wire(settings)
        self._base = url.rstrip("/")
        self._headers = _authorisation(url)

    def where(self, path: str) -> str:
        return f"{self._base}/{path}"

    @contextlib.contextmanager
    def open(
        self, path: str, offset: int, length: int, *, total_bytes: int | None = None, deadline: float | None = None
    ) -> Iterator[Body]:
        url = self._address(path)
        with self._wire.range(url, self.where(path), self._headers, offset, length, total_bytes, deadline) as body:
            yield body

    def read(self, path: str, limit_bytes: int) -> bytes:
        return read_whole(self._wire, self._address(path), self.where(path), self._headers, limit_bytes)

    def size(self, path: str) -> int | None:
        try:
            with self._wire.request("HEAD", self._address(path), self.where(path), self._headers, None) as answer:
                return answer.total_bytes or 0
        except NotFound:
            return None

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


def read_whole(wire: Wire, url: str, where: str, headers: dict[str, str], limit_bytes: int) -> bytes:
    """All of a small file, whether or not the server says how long it is."""
    data = bytearray()
    block = memoryview(bytearray(1 << 16))
    with wire.request("GET", url, where, headers, None) as answer:
        while count := answer.body.some(block):
            data += block[:count]
            if len(data) > limit_bytes:
                raise InvalidCheckpoint(f"{where} has more than {limit_bytes} bytes")
            if answer.length is not None and len(data) >= answer.length:
                break
        if answer.length is not None and len(data) < answer.length:
            answer.body.fill(memoryview(bytearray(1)))  # says that it was short
    return bytes(data)


def _authorisation(url: str) -> dict[str, str]:
    split = urlsplit(url)
    if split.scheme != "https":
        return {}
    try:
        found = netrc.netrc().authenticators(split.hostname or "")
    except (OSError, netrc.NetrcParseError):
        return {}
    if found is None:
        return {}
    return {"Authorization": "Basic " + b64encode(f"{found[0]}:{found[2]}".encode()).decode()}
