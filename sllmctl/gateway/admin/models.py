"""The admin API's routes of models: what is deployed, and what an operator wants of it.

``GET models/{name}?wait=ready&timeout=20`` is held until the model is so: 200 when it is, 202 with the model as it is when the
time ran out, the model's own fault when it never will be.
"""

from __future__ import annotations

from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from schema.admin import AppliedView, ApplyBody, DeployBody, ModelView
from schema.errors import Conflict, InvalidInput
from schema.spec import ModelSpec, parse_spec
from schema.states import InstanceState, ModelState
from sllmctl.cluster.view import ClusterView
from sllmctl.config import AdminSettings
from sllmctl.control.events import AddModel, ApplyModels, DeployModel, RemoveModel, StopModel
from sllmctl.control.views import LiveNumbers, model_view, model_views
from sllmctl.gateway.admin.answers import (
    Flag,
    Items,
    Routes,
    decode,
    item_answer,
    json_answer,
    known,
    read_body,
    read_choice,
    read_flag,
    read_query,
)
from sllmctl.gateway.admin.commands import BODY, COMMAND, RunnerPort
from sllmctl.gateway.admin.waiting import TIMEOUT, wait
from sllmctl.gateway.errors import ALL_KINDS
from sllmctl.gateway.openapi import Query, operation

__all__ = ["Models"]

_UNTIL = Literal["ingested", "ready", "stopped", "gone"]


class Models:
    """The routes; what they answer is the view's and the router's, what they ask is the control loop's."""

    def __init__(self, runner: RunnerPort, view: ClusterView, router: LiveNumbers, settings: AdminSettings) -> None:
        self._runner, self._view, self._router, self._settings = runner, view, router, settings

    def routes(self) -> Routes:
        return {
            ("GET", "models"): self.list_models,
            ("POST", "models"): self.add_model,
            ("POST", "apply"): self.apply,
            ("GET", "models/{name}"): self.get_model,
            ("DELETE", "models/{name}"): self.remove_model,
            ("POST", "models/{name}/deploy"): self.deploy_model,
            ("POST", "models/{name}/stop"): self.stop_model,
        }

    @operation("All models.", Items[ModelView])
    async def list_models(self, request: Request) -> Response:
        read_query(request)
        return item_answer(model_views(self._view, self._router))

    @operation(
        "Add a model; its ingest begins.",
        {201: ModelView},
        query=(Query("deploy", Flag, "1: serve it as soon as it has been ingested."),),
        body=ModelSpec,
        errors=(*COMMAND, *BODY),
    )
    async def add_model(self, request: Request) -> Response:
        deploy = read_flag(read_query(request), "deploy")
        spec = parse_spec(decode(await read_body(request, self._settings.body_bytes), Any))
        await self._runner.ask(lambda ticket: AddModel(ticket, spec, deploy))
        return self._model(spec.name, 201)

    @operation(
        "Make models as their specs say, all of it or nothing, or only tell what that would change.",
        Items[AppliedView],
        body=ApplyBody,
        errors=(*COMMAND, *BODY),
    )
    async def apply(self, request: Request) -> Response:
        read_query(request)
        body = decode(await read_body(request, self._settings.body_bytes), ApplyBody)
        told = await self._runner.ask(lambda ticket: ApplyModels(ticket, body.models, body.remove, body.deploy, body.dry_run))
        return item_answer(told)

    @operation(
        "A model; held until it is as waited for, and answered 202 when the time ran out before.",
        {200: ModelView, 202: ModelView},
        query=(Query("wait", _UNTIL, "What to wait for."), TIMEOUT),
        errors=ALL_KINDS,
    )
    async def get_model(self, request: Request) -> Response:
        query = read_query(request)
        name, until = request.path_params["name"], read_choice(query, "wait", _UNTIL)
        if until is None:
            return self._model(name)
        done = await wait(request, query, lambda: _reached(self._view, name, until), self._settings)
        return self._model(name, 200 if done else 202)

    @operation("Remove a model.", {204: None}, errors=COMMAND)
    async def remove_model(self, request: Request) -> Response:
        read_query(request)
        name = request.path_params["name"]
        await self._runner.ask(lambda ticket: RemoveModel(ticket, name))
        return Response(status_code=204)

    @operation(
        "Deploy a model, or change how it is scaled.",
        ModelView,
        body=DeployBody,
        body_required=False,
        errors=(*COMMAND, *BODY),
    )
    async def deploy_model(self, request: Request) -> Response:
        read_query(request)
        name, body = request.path_params["name"], await read_body(request, self._settings.body_bytes)
        scale = decode(body, DeployBody).scale if body else None
        if scale is not None and scale.min > scale.max:
            raise InvalidInput(f"scale.min {scale.min} is above scale.max {scale.max}", "scale.min")
        await self._runner.ask(lambda ticket: DeployModel(ticket, name, scale))
        return self._model(name)

    @operation("Stop a model: its instances end, its checkpoint stays.", ModelView, errors=COMMAND)
    async def stop_model(self, request: Request) -> Response:
        read_query(request)
        name = request.path_params["name"]
        await self._runner.ask(lambda ticket: StopModel(ticket, name))
        return self._model(name)

    def _model(self, name: str, status: int = 200) -> Response:
        model = known("model", name, self._view.models.get(name), self._view.models)
        return json_answer(model_view(self._view, self._router, model), status)


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
