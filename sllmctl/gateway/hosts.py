"""Which hosts a request may be for, where none needs a key: a web page must not come by a name of its own (DNS rebinding)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from sllmctl.gateway.errors import WrongHost
from sllmctl.gateway.exchange import Exchange

__all__ = ["KnownHosts"]


class KnownHosts:
    """Lets a request through to ``app`` when it is for an address, for localhost, or for one of ``names``.

    A browser says in Host by which name it came; only a name, never an address, can be turned from a page's server to this one.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                if name == b"host" and not self._knows(host := value.decode("latin-1")):
                    error = WrongHost(
                        f"this server is not called {host!r}; while it asks for no key it takes requests for localhost, for "
                        "addresses, and for the names in api.hosts"
                    )
                    await Exchange(scope, receive, send).fail(error)
                    return
        await self._app(scope, receive, send)

    def _knows(self, host: str) -> bool:
        name = host.removeprefix("[").partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        name = name.lower().rstrip(".")
        return not name or name == "localhost" or name.endswith(".localhost") or name in self._names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
