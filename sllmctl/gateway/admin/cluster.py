"""The admin API's routes of what the cluster has and does: the manager, nodes, instances, requests, events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Protocol

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from schema.admin import EventKind, EventView, InstanceView, NodeView, RequestView, StatusView
from schema.errors import Conflict, NotFound
from sllmctl.cluster.view import ClusterView
from sllmctl.control.events import StopInstanceNow
from sllmctl.control.views import LiveNumbers, instance_view, instance_views, node_view, node_views
from sllmctl.gateway.admin.answers import Items, Routes, item_answer, json_answer, known, read_choice, read_count, read_query
from sllmctl.gateway.admin.commands import COMMAND, RunnerPort
from sllmctl.gateway.openapi import Query, operation
from sllmctl.gateway.ports import EventsPort

__all__ = ["Cluster", "RequestsPort"]

_EVENTS_LIMIT = 10_000


class RequestsPort(LiveNumbers, Protocol):
    """The router's requests beside its live numbers."""

    def requests(self) -> list[RequestView]: ...
    def request(self, id: str) -> RequestView: ...  # noqa: A002 - the name that every view of a request has
    def cancel(self, id: str) -> None: ...  # noqa: A002 - as above


class Cluster:
    """The routes; what they answer is the view's and the router's, what they ask is the control loop's."""

    def __init__(
        self,
        runner: RunnerPort,
        view: ClusterView,
        database: EventsPort,
        router: RequestsPort,
        status: Callable[[], StatusView],
    ) -> None:
        self._runner, self._view, self._database, self._router = runner, view, database, router
        self._status = status

    def routes(self) -> Routes:
        return {
            ("GET", "status"): self.get_status,
            ("GET", "nodes"): self.list_nodes,
            ("GET", "nodes/{name}"): self.get_node,
            ("GET", "instances"): self.list_instances,
            ("GET", "instances/{id}"): self.get_instance,
            ("POST", "instances/{id}/stop"): self.stop_instance,
            ("GET", "requests"): self.list_requests,
            ("GET", "requests/{id}"): self.get_request,
            ("POST", "requests/{id}/cancel"): self.cancel_request,
            ("GET", "events"): self.list_events,
        }

    @operation("The manager itself.", StatusView)
    async def get_status(self, request: Request) -> Response:
        read_query(request)
        return json_answer(self._status())

    @operation("All nodes.", Items[NodeView])
    async def list_nodes(self, request: Request) -> Response:
        read_query(request)
        return item_answer(node_views(self._view, self._router))

    @operation("A node, by its name or id.", NodeView, errors=(NotFound,))
    async def get_node(self, request: Request) -> Response:
        read_query(request)
        name = request.path_params["name"]
        node = self._view.node_named(name) or self._view.nodes.get(name)
        names = (each.name for each in self._view.nodes.values())
        return json_answer(node_view(self._view, self._router, known("node", name, node, names)))

    @operation("All instances.", Items[InstanceView])
    async def list_instances(self, request: Request) -> Response:
        read_query(request)
        return item_answer(instance_views(self._view, self._router))

    @operation("An instance, by its id.", InstanceView, errors=(NotFound,))
    async def get_instance(self, request: Request) -> Response:
        read_query(request)
        wanted = request.path_params["id"]
        instance = known("instance", wanted, self._view.instances.get(wanted))
        return json_answer(instance_view(self._view, self._router, instance))

    @operation("Stop an instance; its sequences go on elsewhere.", {204: None}, errors=COMMAND)
    async def stop_instance(self, request: Request) -> Response:
        read_query(request)
        instance = request.path_params["id"]
        await self._runner.ask(lambda ticket: StopInstanceNow(ticket, instance))
        return Response(status_code=204)

    @operation("Requests that are live, and those that ended lately.", Items[RequestView])
    async def list_requests(self, request: Request) -> Response:
        read_query(request)
        return item_answer(self._router.requests())

    @operation("A request, by its id.", RequestView, errors=(NotFound,))
    async def get_request(self, request: Request) -> Response:
        read_query(request)
        return json_answer(self._router.request(request.path_params["id"]))

    @operation("End a request.", {204: None}, errors=(NotFound, Conflict))
    async def cancel_request(self, request: Request) -> Response:
        read_query(request)
        self._router.cancel(request.path_params["id"])
        return Response(status_code=204)

    @operation(
        "The newest events, the oldest of them first.",
        Items[EventView],
        query=(
            Query("kind", EventKind, "Only those of this kind of thing."),
            Query("object", str, "Only those of the thing of this name, or of checkpoints whose digests begin so."),
            Query("limit", Annotated[int, Meta(ge=1, le=_EVENTS_LIMIT)], "How many; 100 if not given."),
            Query("after", str, "Only those after the event of this id."),
        ),
    )
    async def list_events(self, request: Request) -> Response:
        query = read_query(request)
        kind, limit = read_choice(query, "kind", EventKind), read_count(query, "limit", 100, 1, _EVENTS_LIMIT)
        return item_answer(await self._database.events(kind, query.get("object"), limit, query.get("after")))
