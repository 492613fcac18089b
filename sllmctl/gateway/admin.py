"""The admin API: what an operator sees and asks of the cluster, served on the manager's unix socket alone.

Reads are made of the control loop's view and the router's live numbers, as they are now; commands are events that the loop
answers. Routes and bodies are those of schema.admin. ``GET models/{name}?wait=ready&timeout=20`` is held until the model is so:
200 when it is, 202 with the model as it is when the time ran out, the model's own fault when it never will be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args

from msgspec import Meta
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from schema.admin import (
    AppliedView,
    ApplyBody,
    CheckpointBody,
    CheckpointView,
    DeployBody,
    EventView,
    InstanceView,
    ModelView,
    NodeView,
    OperationKind,
    OperationView,
    RemoteBody,
    RequestView,
    StatusView,
)
from schema.errors import (
    Conflict,
    InvalidCheckpoint,
    InvalidInput,
    NotFound,
    OutOfSpace,
    Overloaded,
    SllmError,
    TimedOut,
    Unauthorised,
    Unreachable,
    Unschedulable,
)
from schema.spec import ModelSpec, parse_spec
from schema.states import InstanceState, ModelState
from sllmctl.config import AdminSettings
from sllmctl.control.effects import (
    AddModel,
    ApplyModels,
    DeployModel,
    EndOperation,
    Event,
    Forget,
    Operate,
    Pin,
    RemoveModel,
    StopInstanceNow,
    StopModel,
)
from sllmctl.control.references import checkpoint_called
from sllmctl.control.view import ClusterView
from sllmctl.control.views import (
    LiveNumbers,
    checkpoint_view,
    checkpoint_views,
    instance_view,
    instance_views,
    model_view,
    model_views,
    node_view,
    node_views,
    operation_view,
)
from sllmctl.gateway.answers import (
    Items,
    RefusalBody,
    broken,
    decode,
    error_answer,
    item_answer,
    json_answer,
    known,
    no_route,
    read_number,
    read_query,
    refuse,
)
from sllmctl.gateway.errors import ALL_KINDS, BodyTooLarge, UnsupportedMediaType
from sllmctl.gateway.explanations import Explanations
from sllmctl.gateway.feed import Feed
from sllmctl.gateway.logs import Logs
from sllmctl.gateway.openapi import Query, document, operation
from sllmctl.gateway.ports import EventsPort
from sllmctl.gateway.stream import Stream

__all__ = ["RequestsPort", "RunnerPort", "admin_app"]

H = TypeVar("H", bound=Callable[..., Any])

_PREFIX = "/admin/v1/"
_TITLE = "sllmctl: admin API"
_ABOUT = "What an operator sees and asks of the cluster. Served on the manager's unix socket, for the host `sllmctl`."
_HOSTS = frozenset({"sllmctl", "localhost"})
_EVENTS_LIMIT = 10_000
_UNTIL = Literal["ingested", "ready", "stopped", "gone"]
_TIMEOUT = Query("timeout", Annotated[float, Meta(ge=0)], "Seconds to be held at most; the manager's own limit if not given.")
_COMMAND = (NotFound, Conflict, InvalidCheckpoint, Overloaded, Unschedulable, Unreachable, TimedOut, OutOfSpace)
"""What the control loop may refuse a command with."""
_BODY = (BodyTooLarge, UnsupportedMediaType)


class RunnerPort(Protocol):
    async def ask(self, make: Callable[[int], Event]) -> Any:
        """Have the control loop take in an event, and return what it tells; raises its refusal."""


class RequestsPort(LiveNumbers, Protocol):
    """The router's requests beside its live numbers."""

    def requests(self) -> list[RequestView]: ...
    def request(self, id: str) -> RequestView: ...  # noqa: A002 - the name that every view of a request has
    def cancel(self, id: str) -> None: ...  # noqa: A002 - as above


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
    admin = _Admin(runner, view, database, router, status, settings or AdminSettings())
    routes: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {
        ("GET", "status"): admin.get_status,
        ("GET", "nodes"): admin.list_nodes,
        ("GET", "nodes/{name}"): admin.get_node,
        ("GET", "models"): admin.list_models,
        ("POST", "models"): admin.add_model,
        ("POST", "apply"): admin.apply,
        ("GET", "models/{name}"): admin.get_model,
        ("DELETE", "models/{name}"): admin.remove_model,
        ("POST", "models/{name}/deploy"): admin.deploy_model,
        ("POST", "models/{name}/stop"): admin.stop_model,
        ("GET", "instances"): admin.list_instances,
        ("GET", "instances/{id}"): admin.get_instance,
        ("POST", "instances/{id}/stop"): admin.stop_instance,
        ("GET", "checkpoints"): admin.list_checkpoints,
        ("GET", "checkpoints/{reference}"): admin.get_checkpoint,
        ("POST", "checkpoints/{reference}/prefetch"): admin.prefetch_checkpoint,
        ("POST", "checkpoints/{reference}/verify"): admin.verify_checkpoint,
        ("POST", "checkpoints/{reference}/drop"): admin.drop_checkpoint,
        ("POST", "checkpoints/{reference}/publish"): admin.publish_checkpoint,
        ("POST", "checkpoints/{reference}/fetch"): admin.fetch_checkpoint,
        ("POST", "checkpoints/{reference}/forget"): admin.forget_checkpoint,
        ("POST", "checkpoints/{reference}/pin"): admin.pin_checkpoint,
        ("POST", "checkpoints/{reference}/unpin"): admin.unpin_checkpoint,
        ("GET", "operations"): admin.list_operations,
        ("GET", "operations/{id}"): admin.get_operation,
        ("POST", "operations/{id}/cancel"): admin.cancel_operation,
        ("GET", "requests"): admin.list_requests,
        ("GET", "requests/{id}"): admin.get_request,
        ("POST", "requests/{id}/cancel"): admin.cancel_request,
        ("GET", "events"): admin.list_events,
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


def _operates(summary: str, body: type) -> Callable[[H], H]:
    """A handler that begins operations."""
    return operation(summary, Items[OperationView], body=body, body_required=False, errors=(*_COMMAND, *_BODY))


def _changes(summary: str, body: type) -> Callable[[H], H]:
    """A handler that changes what is wanted of a checkpoint."""
    return operation(summary, CheckpointView, body=body, body_required=False, errors=(*_COMMAND, *_BODY))


class _Admin:
    def __init__(
        self,
        runner: RunnerPort,
        view: ClusterView,
        database: EventsPort,
        router: RequestsPort,
        status: Callable[[], StatusView],
        settings: AdminSettings,
    ) -> None:
        self._runner, self._view, self._database, self._router = runner, view, database, router
        self._status, self._settings = status, settings

    # --- reads ---

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

    @operation("All models.", Items[ModelView])
    async def list_models(self, request: Request) -> Response:
        read_query(request)
        return item_answer(model_views(self._view, self._router))

    @operation(
        "A model; held until it is as waited for, and answered 202 when the time ran out before.",
        {200: ModelView, 202: ModelView},
        query=(Query("wait", _UNTIL, "What to wait for."), _TIMEOUT),
        errors=ALL_KINDS,
    )
    async def get_model(self, request: Request) -> Response:
        query = read_query(request)
        name, until = request.path_params["name"], query.get("wait")
        if until is None:
            return self._model(name)
        if until not in get_args(_UNTIL):
            raise InvalidInput(f"wait: {until!r} is none of {', '.join(get_args(_UNTIL))}", "wait")
        timeout_s = min(read_number(query, "timeout", self._settings.wait_limit_s), self._settings.wait_limit_s)
        done = await self._wait(request, lambda: _reached(self._view, name, until), timeout_s)
        return self._model(name, 200 if done else 202)

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

    @operation("All checkpoints.", Items[CheckpointView])
    async def list_checkpoints(self, request: Request) -> Response:
        read_query(request)
        return item_answer(checkpoint_views(self._view))

    @operation(
        "A checkpoint, by its digest, the beginning of that, or the name of a model.",
        CheckpointView,
        errors=(NotFound, Conflict),
    )
    async def get_checkpoint(self, request: Request) -> Response:
        read_query(request)
        return json_answer(checkpoint_view(self._view, checkpoint_called(self._view, request.path_params["reference"])))

    @operation("Long operations, those that ended lately too.", Items[OperationView])
    async def list_operations(self, request: Request) -> Response:
        read_query(request)
        return item_answer([operation_view(self._view, self._router, each) for each in self._view.operations.values()])

    @operation(
        "An operation; held until it has ended, and answered 202 when the time ran out before.",
        {200: OperationView, 202: OperationView},
        query=(Query("wait", Literal["ended"], "What to wait for."), _TIMEOUT),
        errors=(NotFound,),
    )
    async def get_operation(self, request: Request) -> Response:
        query = read_query(request)
        name, until = request.path_params["id"], query.get("wait")
        if until not in (None, "ended"):
            raise InvalidInput(f"wait: {until!r} is not ended", "wait")
        timeout_s = min(read_number(query, "timeout", self._settings.wait_limit_s), self._settings.wait_limit_s)

        def ended() -> bool:
            return known("operation", name, self._view.operations.get(name)).ended_at is not None

        done = await self._wait(request, ended, timeout_s) if until is not None else True
        operation = known("operation", name, self._view.operations.get(name))
        return json_answer(operation_view(self._view, self._router, operation), 200 if done else 202)

    @operation("Requests that are live, and those that ended lately.", Items[RequestView])
    async def list_requests(self, request: Request) -> Response:
        read_query(request)
        return item_answer(self._router.requests())

    @operation("A request, by its id.", RequestView, errors=(NotFound,))
    async def get_request(self, request: Request) -> Response:
        read_query(request)
        return json_answer(self._router.request(request.path_params["id"]))

    @operation(
        "The newest events, the oldest of them first.",
        Items[EventView],
        query=(
            Query("kind", str, "Only those of this kind of thing."),
            Query("object", str, "Only those of the thing of this name."),
            Query("limit", Annotated[int, Meta(ge=1, le=_EVENTS_LIMIT)], "How many; 100 if not given."),
            Query("after", str, "Only those after the event of this id."),
        ),
    )
    async def list_events(self, request: Request) -> Response:
        query = read_query(request)
        limit = read_number(query, "limit", 100)
        if not limit.is_integer() or not 1 <= limit <= _EVENTS_LIMIT:
            raise InvalidInput(f"limit: {query['limit']} is no number from 1 to {_EVENTS_LIMIT}", "limit")
        return item_answer(await self._database.events(query.get("kind"), query.get("object"), int(limit), query.get("after")))

    # --- commands ---

    @operation("Add a model; its ingest begins.", {201: ModelView}, body=ModelSpec, errors=(*_COMMAND, *_BODY))
    async def add_model(self, request: Request) -> Response:
        read_query(request)
        spec = parse_spec(decode(await self._body(request), Any))
        await self._runner.ask(lambda ticket: AddModel(ticket, spec))
        return self._model(spec.name, 201)

    @operation(
        "Make models as their specs say, all of it or nothing, or only tell what that would change.",
        Items[AppliedView],
        body=ApplyBody,
        errors=(*_COMMAND, *_BODY),
    )
    async def apply(self, request: Request) -> Response:
        read_query(request)
        body = decode(await self._body(request), ApplyBody)
        told = await self._runner.ask(lambda ticket: ApplyModels(ticket, body.models, body.remove, body.deploy, body.dry_run))
        return item_answer(told)

    @operation(
        "Deploy a model, or change how it is scaled.",
        ModelView,
        body=DeployBody,
        body_required=False,
        errors=(*_COMMAND, *_BODY),
    )
    async def deploy_model(self, request: Request) -> Response:
        read_query(request)
        name, body = request.path_params["name"], await self._body(request)
        scale = decode(body, DeployBody).scale if body else None
        if scale is not None and scale.min > scale.max:
            raise InvalidInput(f"scale.min {scale.min} is above scale.max {scale.max}", "scale.min")
        await self._runner.ask(lambda ticket: DeployModel(ticket, name, scale))
        return self._model(name)

    @operation("Stop a model: its instances end, its checkpoint stays.", ModelView, errors=_COMMAND)
    async def stop_model(self, request: Request) -> Response:
        read_query(request)
        name = request.path_params["name"]
        await self._runner.ask(lambda ticket: StopModel(ticket, name))
        return self._model(name)

    @operation("Remove a model.", {204: None}, errors=_COMMAND)
    async def remove_model(self, request: Request) -> Response:
        read_query(request)
        name = request.path_params["name"]
        await self._runner.ask(lambda ticket: RemoveModel(ticket, name))
        return Response(status_code=204)

    @_operates("Bring a checkpoint to a tier of a node.", CheckpointBody)
    async def prefetch_checkpoint(self, request: Request) -> Response:
        return await self._operate(request, "prefetch")

    @_operates("Read copies of a checkpoint and compare them with its manifest.", CheckpointBody)
    async def verify_checkpoint(self, request: Request) -> Response:
        return await self._operate(request, "verify")

    @_operates("Remove copies of a checkpoint.", CheckpointBody)
    async def drop_checkpoint(self, request: Request) -> Response:
        return await self._operate(request, "drop")

    @_operates("Write a checkpoint to a remote.", RemoteBody)
    async def publish_checkpoint(self, request: Request) -> Response:
        return await self._operate(request, "publish", RemoteBody)

    @_operates("Bring a published checkpoint to nodes.", RemoteBody)
    async def fetch_checkpoint(self, request: Request) -> Response:
        return await self._operate(request, "fetch", RemoteBody)

    @operation("End an operation early; its node says when it has ended.", OperationView, errors=_COMMAND)
    async def cancel_operation(self, request: Request) -> Response:
        read_query(request)
        name = request.path_params["id"]
        await self._runner.ask(lambda ticket: EndOperation(ticket, name))
        operation = known("operation", name, self._view.operations.get(name))
        return json_answer(operation_view(self._view, self._router, operation))

    @_changes("Forget where a checkpoint was published.", RemoteBody)
    async def forget_checkpoint(self, request: Request) -> Response:
        read_query(request)
        reference, body = request.path_params["reference"], await self._body(request)
        which = decode(body, RemoteBody) if body else RemoteBody()
        before = checkpoint_view(self._view, checkpoint_called(self._view, reference))
        await self._runner.ask(lambda ticket: Forget(ticket, reference, which.url))
        known = self._view.checkpoints.get(before.digest)  # its last trace may have been that
        now = checkpoint_view(self._view, known) if known is not None else replace(before, publications=())
        return json_answer(now)

    @_changes("Keep a checkpoint on a tier of a node.", CheckpointBody)
    async def pin_checkpoint(self, request: Request) -> Response:
        return await self._pin(request, True)

    @_changes("Keep a checkpoint there no more.", CheckpointBody)
    async def unpin_checkpoint(self, request: Request) -> Response:
        return await self._pin(request, False)

    @operation("Stop an instance; its sequences go on elsewhere.", {204: None}, errors=_COMMAND)
    async def stop_instance(self, request: Request) -> Response:
        read_query(request)
        instance = request.path_params["id"]
        await self._runner.ask(lambda ticket: StopInstanceNow(ticket, instance))
        return Response(status_code=204)

    @operation("End a request.", {204: None}, errors=(NotFound,))
    async def cancel_request(self, request: Request) -> Response:
        read_query(request)
        self._router.cancel(request.path_params["id"])
        return Response(status_code=204)

    # --- parts ---

    def _model(self, name: str, status: int = 200) -> Response:
        model = known("model", name, self._view.models.get(name), self._view.models)
        return json_answer(model_view(self._view, self._router, model), status)

    async def _pin(self, request: Request, pinned: bool) -> Response:
        read_query(request)
        reference, body = request.path_params["reference"], await self._body(request)
        which = decode(body, CheckpointBody) if body else CheckpointBody()
        await self._runner.ask(lambda ticket: Pin(ticket, reference, which.node, which.tier, pinned))
        return json_answer(checkpoint_view(self._view, checkpoint_called(self._view, reference)))

    async def _operate(
        self, request: Request, kind: OperationKind, form: type[CheckpointBody | RemoteBody] = CheckpointBody
    ) -> Response:
        read_query(request)
        reference, body = request.path_params["reference"], await self._body(request)
        which = decode(body, form) if body else form()
        url = which.url if isinstance(which, RemoteBody) else None
        event: Operate | None = None

        def make(ticket: int) -> Event:
            nonlocal event
            event = Operate(ticket, kind, reference, which.node, which.tier, url)
            return event

        await self._runner.ask(make)
        assert event is not None
        begun = [each for each in self._view.operations.values() if each.ticket == event.ticket]
        return item_answer([operation_view(self._view, self._router, each) for each in begun])

    async def _wait(self, request: Request, reached: Callable[[], bool], timeout_s: float) -> bool:
        """True once it is as asked for, False when the time ran out or the asker has gone."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not reached():
            left_s = deadline - loop.time()
            if left_s <= 0 or await request.is_disconnected():
                return False
            await asyncio.sleep(min(self._settings.wait_look_s, left_s))
        return True

    async def _body(self, request: Request) -> bytes:
        """The body. Raises BodyTooLarge, and UnsupportedMediaType for one that is not said to be JSON."""
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > self._settings.body_bytes:
                    raise BodyTooLarge(f"the body is longer than {self._settings.body_bytes} bytes")
        except ClientDisconnect:
            raise InvalidInput("the body was broken off") from None
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":
            raise UnsupportedMediaType(f"content type {kind!r} is not application/json")
        return bytes(body)


def _reached(view: ClusterView, name: str, until: str) -> bool:
    """Whether a model is as waited for. Raises NotFound, the model's fault, or Conflict when it can never be."""
    model = known("model", name, view.models.get(name), view.models)
    instances = view.instances_of(name).values()
    if until == "gone":
        return False
    if model.state is ModelState.DELETING:
        raise Conflict(f"model {name} is being removed")
    if until == "stopped":
        return model.state is not ModelState.DEPLOYED and not instances
    if model.state is ModelState.FAILED and model.fault is not None:
        raise model.fault.to_error()
    if model.state is ModelState.INGESTING or until == "ingested":
        return model.state is not ModelState.INGESTING
    if model.state is not ModelState.DEPLOYED:
        raise Conflict(f"model {name} is {model.state}, not deployed")
    if sum(instance.state is InstanceState.READY for instance in instances) >= model.spec.scale.min:
        return True
    for instance in instances:
        if instance.state is InstanceState.FAILED and instance.fault is not None:
            raise instance.fault.to_error()
    return False
