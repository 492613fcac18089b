"""The admin API as one application, served on the manager's unix socket alone.

Reads are made of the control loop's view and the router's live numbers, as they are now; commands are events that the loop
answers. Routes and bodies are those of schema.admin.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from schema.admin import StatusView
from schema.errors import InvalidInput, SllmError, Unauthorised
from sllmctl.cluster.view import ClusterView
from sllmctl.config import AdminSettings
from sllmctl.gateway.admin.answers import RefusalBody, Routes, broken, error_answer, no_route, refuse
from sllmctl.gateway.admin.checkpoints import Checkpoints
from sllmctl.gateway.admin.cluster import Cluster, RequestsPort
from sllmctl.gateway.admin.commands import RunnerPort
from sllmctl.gateway.admin.explanations import Explanations
from sllmctl.gateway.admin.feed import Feed
from sllmctl.gateway.admin.logs import Logs
from sllmctl.gateway.admin.models import Models
from sllmctl.gateway.admin.stream import Stream
from sllmctl.gateway.openapi import document
from sllmctl.gateway.ports import EventsPort

__all__ = ["admin_app"]

_PREFIX = "/admin/v1/"
_TITLE = "sllmctl: admin API"
_ABOUT = "What an operator sees and asks of the cluster. Served on the manager's unix socket, for the host `sllmctl`."
_HOSTS = frozenset({"sllmctl", "localhost"})


def admin_app(
    *,
    runner: RunnerPort,
    view: ClusterView,
    database: EventsPort,
    router: RequestsPort,
    status: Callable[[], StatusView],
    settings: AdminSettings | None = None,
    explanations: Explanations | None = None,
    feed: Feed | None = None,
    logs: Logs | None = None,
) -> ASGIApp:
    """The application; it holds no state of its own."""
    settings = settings or AdminSettings()
    routes: Routes = {
        **Cluster(runner, view, database, router, status).routes(),
        **Models(runner, view, router, settings).routes(),
        **Checkpoints(runner, view, router, settings).routes(),
        **({} if explanations is None else explanations.routes()),
        **({} if feed is None else Stream(feed).routes()),
        **({} if logs is None else logs.routes()),
    }
    table = [(method, _PREFIX + path, endpoint) for (method, path), endpoint in routes.items()]
    said = document(_TITLE, _ABOUT, table, error=RefusalBody, always=(InvalidInput, Unauthorised, SllmError))

    async def describe(request: Request) -> Response:
        return Response(said, media_type="application/json")

    app = Starlette(
        routes=[
            Route("/openapi.json", describe, methods=["GET"]),
            *(Route(path, endpoint, methods=[method]) for method, path, endpoint in table),
        ],
        exception_handlers={SllmError: refuse, HTTPException: no_route, Exception: broken},
    )
    app.router.redirect_slashes = False
    return _Door(app)


class _Door:
    """Lets in only what no web page can send: a request to a host of ours, without an Origin.

    The socket's mode keeps other users out; this keeps out a browser that reaches the socket through somebody's proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if headers.get("host", "").partition(":")[0] not in _HOSTS or "origin" in headers:
                refusal = Unauthorised(
                    f"the admin API takes no requests of web pages; its host is one of {', '.join(sorted(_HOSTS))}"
                )
                await error_answer(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)
