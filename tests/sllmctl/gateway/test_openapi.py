"""The OpenAPI documents: what they say is what the servers do, whatever is sent to them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from schema.admin import AppliedView
from schema.states import EndReason, ModelState, Tier
from sllmctl.cluster.records import Model, Operation
from sllmctl.config import AdminSettings
from sllmctl.control.events import AddModel, Event
from sllmctl.gateway.openapi import operation_of
from sllmctl.gateway.replies import ChatChunk, CompletionChunk
from tests.sllmctl.gateway.admin.rig import Manager
from tests.sllmctl.gateway.harness import END, FakeRequest, Serving, chat_body, ids_of, serving
from tests.sllmctl.gateway.test_logs import FakeLinks

_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
_EXAMPLES = 8
_TIMES_MORE = 4
"""Of what has parameters: few of its examples name what there is and leave out what nothing fulfils."""


def _reply(request: FakeRequest) -> None:
    for sequence in request.sequences:
        sequence.emit([*ids_of("yes"), END][: request.params.max_tokens], EndReason.STOP, request.params.logprobs)


@contextmanager
def _in_a_thread() -> Iterator[Serving]:
    """A gateway on a loop of its own, whose router answers at once."""
    ready, done = threading.Event(), threading.Event()
    found: list[Serving] = []

    async def serve() -> None:
        async with serving() as here:
            here.router.reply = _reply
            found.append(here)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(60)
        yield found[0]
    finally:
        done.set()
        thread.join(60)


def _narrowed(raw: Any, names: dict[str, list[str]]) -> Any:
    """The document with the names of things that there are, and of one that is not, so that what is sent reaches them."""
    for methods in raw["paths"].values():
        for said in methods.values():
            for place in said.get("parameters", ()):
                if place["name"] in names:
                    place["schema"] = {"enum": [*names[place["name"]], "nope", "or/g%20"]}
                elif place["name"] == "follow":
                    place["schema"] = {"enum": ["0", "maybe"]}  # what follows has no end
    for body in raw["components"]["schemas"].values():
        if "model" in body.get("properties", ()) and "model" in names:
            body["properties"]["model"] = {"enum": names["model"]}
    return raw


def _fuzz(raw: Any, call: Any) -> dict[str, set[int]]:
    """Send what fits the document and what does not to every operation; the statuses that came, by operation."""
    statuses: dict[str, set[int]] = {}
    for result in schemathesis.openapi.from_dict(raw).get_all_operations():
        found: Any = result.ok()  # type: ignore[union-attr]
        said = found.definition.raw
        refusable = "requestBody" in said or any(place["in"] == "query" for place in said.get("parameters", ()))
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[: 2 if refusable else 1]:

            @settings(
                max_examples=_EXAMPLES * (_TIMES_MORE if said.get("parameters") else 1),
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=found.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                response = call(case)
                statuses.setdefault(found.label, set()).add(response.status_code)  # noqa: B023 - it is called in the loop
                case.validate_response(response, checks=_CHECKS)

            send()
    return statuses


@pytest.mark.slow
def test_the_inference_api_answers_whatever_comes_as_its_document_says() -> None:
    with _in_a_thread() as here:
        raw = _narrowed(httpx.get(f"{here.url}/openapi.json", timeout=60).json(), {"model": ["tiny", "asleep"]})
        statuses = _fuzz(raw, lambda case: case.call(base_url=here.url))
    assert statuses["GET /v1/models/{model}"] == {200, 404}
    assert 400 in statuses["POST /v1/completions"] & statuses["POST /v1/chat/completions"]


@pytest.mark.slow
def test_the_admin_api_answers_whatever_comes_as_its_document_says() -> None:
    links = FakeLinks()
    links.pages["node_1"] = []
    manager = Manager(AdminSettings(wait_limit_s=0.01, wait_look_s=0.001), links)
    manager.runner.then = lambda event: _added(manager, event)
    manager.view.operations["op_1"] = Operation("op_1", 7, "verify", "ab" * 32, "node_1", Tier.DISK, 4096, 30.0)
    with TestClient(manager.app, base_url="http://sllmctl") as client:
        names = {"name": ["tiny", "local"], "id": ["inst_1", "req_1", "op_1"], "reference": ["tiny", "ababa"]}
        names["instance"] = ["inst_1"]
        raw = _narrowed(client.get("/openapi.json").json(), names)
        statuses = _fuzz(raw, lambda case: case.call(app=manager.app, headers={"Host": "sllmctl"}))
    reached = {label for label, those in statuses.items() if those & {200, 201, 204}}
    assert set(statuses) == reached


def _added(manager: Manager, event: Event) -> tuple[AppliedView, ...]:
    if isinstance(event, AddModel):
        manager.view.add_model(Model(event.spec, ModelState.INGESTING, None, None, None, None, 1.0, 1.0))
    return tuple(AppliedView(name=spec.name, action="unchanged") for spec in getattr(event, "specs", ()))


def _stripped(value: Any) -> Any:
    """A JSON value without the members that are null."""
    if isinstance(value, dict):
        return {key: _stripped(each) for key, each in value.items() if each is not None}
    return [_stripped(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("path", "body", "chunk"),
    [
        ("/v1/chat/completions", chat_body(), ChatChunk),
        ("/v1/completions", {"model": "tiny", "prompt": "x"}, CompletionChunk),
    ],
)
async def test_events_are_of_the_documented_types(path: str, body: dict[str, Any], chunk: type) -> None:
    tops = 2 if "chat" not in path else True
    more = {"logprobs": tops, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    async with serving() as here:
        here.router.reply = _reply
        text = (await here.client.post(path, json={**body, **more})).text
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events.pop() == "[DONE]"
    assert len(events) >= 4
    for event in events:
        told = msgspec.json.decode(event)
        assert _stripped(msgspec.to_builtins(msgspec.convert(told, chunk))) == _stripped(told)


async def test_the_documents_are_served_and_name_what_is_refused() -> None:
    async with serving() as here:
        raw = (await here.client.get("/openapi.json")).json()
    body = raw["components"]["schemas"]["CompletionBody"]
    assert (body["properties"]["echo"], body["additionalProperties"]) == ({"enum": [None, False]}, False)
    assert set(raw["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    generation = raw["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"400", "404", "413", "415", "429", "503", "504"} <= set(generation)
    for status in ("429", "503"):
        assert generation[status]["headers"]["Retry-After"]["schema"] == {"type": "integer"}
    assert set(generation["200"]["content"]) == {"application/json", "text/event-stream"}


def test_a_handler_that_says_nothing_of_itself_is_a_defect() -> None:
    async def quiet() -> None: ...

    with pytest.raises(TypeError, match="needs @operation"):
        operation_of(quiet)
