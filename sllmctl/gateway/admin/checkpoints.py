"""The admin API's routes of checkpoints, and of the long operations on them.

``GET operations/{id}?wait=ended&timeout=20`` is held until the operation has ended, and answered 202 when the time ran out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from schema.admin import CheckpointBody, CheckpointView, OperationKind, OperationView, RemoteBody
from schema.errors import Conflict, NotFound
from sllmctl.cluster.view import ClusterView
from sllmctl.config import AdminSettings
from sllmctl.control.events import EndOperation, Event, Forget, Operate, Pin
from sllmctl.control.references import checkpoint_called
from sllmctl.control.views import LiveNumbers, checkpoint_view, checkpoint_views, operation_view
from sllmctl.gateway.admin.answers import (
    Items,
    Routes,
    decode,
    item_answer,
    json_answer,
    known,
    read_body,
    read_choice,
    read_query,
)
from sllmctl.gateway.admin.commands import BODY, COMMAND, RunnerPort
from sllmctl.gateway.admin.waiting import TIMEOUT, wait
from sllmctl.gateway.openapi import Query, operation

__all__ = ["Checkpoints"]

_UNTIL = Literal["ended"]
H = TypeVar("H", bound=Callable[..., Any])


def _operates(summary: str, body: type) -> Callable[[H], H]:
    """A handler that begins operations."""
    return operation(summary, Items[OperationView], body=body, body_required=False, errors=(*COMMAND, *BODY))


def _changes(summary: str, body: type) -> Callable[[H], H]:
    """A handler that changes what is wanted of a checkpoint."""
    return operation(summary, CheckpointView, body=body, body_required=False, errors=(*COMMAND, *BODY))


class Checkpoints:
    """The routes; what they answer is the view's, what they ask is the control loop's."""

    def __init__(self, runner: RunnerPort, view: ClusterView, router: LiveNumbers, settings: AdminSettings) -> None:
        self._runner, self._view, self._router, self._settings = runner, view, router, settings

    def routes(self) -> Routes:
        return {
            ("GET", "checkpoints"): self.list_checkpoints,
            ("GET", "checkpoints/{reference}"): self.get_checkpoint,
            ("POST", "checkpoints/{reference}/prefetch"): self.prefetch_checkpoint,
            ("POST", "checkpoints/{reference}/verify"): self.verify_checkpoint,
            ("POST", "checkpoints/{reference}/drop"): self.drop_checkpoint,
            ("POST", "checkpoints/{reference}/publish"): self.publish_checkpoint,
            ("POST", "checkpoints/{reference}/fetch"): self.fetch_checkpoint,
            ("POST", "checkpoints/{reference}/forget"): self.forget_checkpoint,
            ("POST", "checkpoints/{reference}/pin"): self.pin_checkpoint,
            ("POST", "checkpoints/{reference}/unpin"): self.unpin_checkpoint,
            ("GET", "operations"): self.list_operations,
            ("GET", "operations/{id}"): self.get_operation,
            ("POST", "operations/{id}/cancel"): self.cancel_operation,
        }

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

    @_changes("Forget where a checkpoint was published.", RemoteBody)
    async def forget_checkpoint(self, request: Request) -> Response:
        read_query(request)
        reference, body = request.path_params["reference"], await read_body(request, self._settings.body_bytes)
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

    @operation("Long operations, those that ended lately too.", Items[OperationView])
    async def list_operations(self, request: Request) -> Response:
        read_query(request)
        return item_answer([operation_view(self._view, self._router, each) for each in self._view.operations.values()])

    @operation(
        "An operation; held until it has ended, and answered 202 when the time ran out before.",
        {200: OperationView, 202: OperationView},
        query=(Query("wait", _UNTIL, "What to wait for."), TIMEOUT),
        errors=(NotFound,),
    )
    async def get_operation(self, request: Request) -> Response:
        query = read_query(request)
        name, until = request.path_params["id"], read_choice(query, "wait", _UNTIL)

        def reached() -> bool:
            return until is None or known("operation", name, self._view.operations.get(name)).ended_at is not None

        done = await wait(request, query, reached, self._settings)
        operation = known("operation", name, self._view.operations.get(name))
        return json_answer(operation_view(self._view, self._router, operation), 200 if done else 202)

    @operation("End an operation early; its node says when it has ended.", OperationView, errors=COMMAND)
    async def cancel_operation(self, request: Request) -> Response:
        read_query(request)
        name = request.path_params["id"]
        await self._runner.ask(lambda ticket: EndOperation(ticket, name))
        operation = known("operation", name, self._view.operations.get(name))
        return json_answer(operation_view(self._view, self._router, operation))

    async def _pin(self, request: Request, pinned: bool) -> Response:
        read_query(request)
        reference, body = request.path_params["reference"], await read_body(request, self._settings.body_bytes)
        which = decode(body, CheckpointBody) if body else CheckpointBody()
        await self._runner.ask(lambda ticket: Pin(ticket, reference, which.node, which.tier, pinned))
        return json_answer(checkpoint_view(self._view, checkpoint_called(self._view, reference)))

    async def _operate(
        self, request: Request, kind: OperationKind, form: type[CheckpointBody | RemoteBody] = CheckpointBody
    ) -> Response:
        read_query(request)
        reference, body = request.path_params["reference"], await read_body(request, self._settings.body_bytes)
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
