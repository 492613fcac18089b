"""What the admin API asks of the control loop, and what it refuses before and after that."""

from __future__ import annotations

import asyncio

import httpx
import msgspec
import pytest

from schema.admin import AppliedView
from schema.errors import Conflict, Fault, InvalidCheckpoint, NotFound, Overloaded, SllmError
from schema.spec import ModelSpec, PathSource, ScaleSpec
from schema.states import ModelState, Tier
from sllmctl.cluster.records import Operation
from sllmctl.control.events import (
    AddModel,
    ApplyModels,
    DeployModel,
    EndOperation,
    Operate,
    RemoveModel,
    StopInstanceNow,
    StopModel,
)
from tests.sllmctl.gateway.admin.rig import A, Manager, made_model, refusal


async def test_specs_are_applied_together_and_answered_one_by_one(manager: Manager, http: httpx.AsyncClient) -> None:
    spec = ModelSpec(name="new", source=PathSource("/m"))
    manager.runner.then = lambda event: (AppliedView(name=event.specs[0].name, action="created"),)
    body = {"models": [msgspec.to_builtins(spec)], "remove": ["tiny"], "deploy": False, "dry_run": True}
    (told,) = (await http.post("apply", json=body)).json()["items"]
    assert (told["name"], told["action"], told["changes"], told["fault"]) == ("new", "created", [], None)
    assert manager.runner.events == [ApplyModels(7, (spec,), ("tiny",), False, True)]
    assert refusal(await http.post("apply", json={"models": [{"name": "new"}]}))[:2] == (400, "invalid_input")
    assert refusal(await http.post("apply", json={"model": []}))[:2] == (400, "invalid_input")


async def test_operations_are_asked_for_and_waited_for(manager: Manager, http: httpx.AsyncClient) -> None:
    operation = Operation("op_7", 7, "verify", A, "node_1", Tier.DISK, 4096, 30.0)
    manager.runner.then = lambda _: manager.view.operations.update(
        {"op_7": operation, "op_6": Operation("op_6", 6, "drop", A, "node_1", Tier.DISK, 1, 29.0)}
    )
    (begun,) = (await http.post("checkpoints/tiny/verify", json={"node": "local"})).json()["items"]
    assert (begun["id"], begun["node"], begun["ended_at"]) == ("op_7", "local", None)
    for verb, tier in (("prefetch", "dram"), ("drop", "disk")):
        assert (await http.post(f"checkpoints/{A}/{verb}", json={"tier": tier})).status_code == 200
    assert manager.runner.events == [
        Operate(7, "verify", "tiny", "local", None),
        Operate(7, "prefetch", A, None, Tier.DRAM),
        Operate(7, "drop", A, None, Tier.DISK),
    ]
    assert (await http.post("operations/op_7/cancel")).json()["id"] == "op_7"
    assert manager.runner.events[3:] == [EndOperation(7, "op_7")]
    assert (await http.get("operations/op_7", params={"wait": "ended", "timeout": "0.01"})).status_code == 202
    waiting = asyncio.create_task(http.get("operations/op_7", params={"wait": "ended"}))
    await asyncio.sleep(0)
    operation.ended_at, operation.fault = 31.0, Fault("invalid_checkpoint", "bad")
    answer = await waiting
    assert (answer.status_code, answer.json()["fault"]["message"]) == (200, "bad")
    assert [one["id"] for one in (await http.get("operations")).json()["items"]] == ["op_7", "op_6"]
    assert refusal(await http.get("operations/op_9")) == (404, "not_found", None)
    assert refusal(await http.get("operations/op_7", params={"wait": "ready"})) == (400, "invalid_input", "wait")
    assert refusal(await http.post("checkpoints/tiny/verify", json={"tier": "attic"}))[:2] == (400, "invalid_input")


async def test_a_flag_is_0_or_1(manager: Manager, http: httpx.AsyncClient) -> None:
    spec = {"name": "new", "source": {"kind": "path", "path": "/m"}}
    assert refusal(await http.post("models?deploy=yes", json=spec)) == (400, "invalid_input", "deploy")
    assert manager.runner.events == []


async def test_commands_are_events_with_a_ticket(manager: Manager, http: httpx.AsyncClient) -> None:
    spec = {"name": "new", "source": {"kind": "path", "path": "/m"}}
    manager.runner.then = lambda event: (
        manager.view.add_model(made_model("new", ModelState.INGESTING)) if isinstance(event, AddModel) else None
    )
    added = await http.post("models", json=spec)
    assert (added.status_code, added.json()["state"]) == (201, "ingesting")
    await http.post("models?deploy=1", json=spec)
    assert (await http.post("models/tiny/deploy")).json()["name"] == "tiny"
    await http.post("models/tiny/deploy", json={"scale": {"min": 1, "max": 2}})
    assert (await http.post("models/tiny/stop")).json()["name"] == "tiny"
    assert (await http.delete("models/tiny")).status_code == 204
    assert (await http.post("instances/inst_1/stop")).status_code == 204
    assert manager.runner.events == [
        AddModel(7, ModelSpec(name="new", source=PathSource("/m"))),
        AddModel(7, ModelSpec(name="new", source=PathSource("/m")), deploy=True),
        DeployModel(7, "tiny", None),
        DeployModel(7, "tiny", ScaleSpec(min=1, max=2)),
        StopModel(7, "tiny"),
        RemoveModel(7, "tiny"),
        StopInstanceNow(7, "inst_1"),
    ]
    assert (await http.post("requests/req_1/cancel")).status_code == 204
    assert manager.router.cancelled == ["req_1"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Conflict("is deployed"), (409, "conflict", None)),
        (NotFound("no such"), (404, "not_found", None)),
        (InvalidCheckpoint("cut short"), (422, "invalid_checkpoint", None)),
        (SllmError("defect"), (500, "internal", None)),
    ],
)
async def test_a_refusal_of_the_loop_is_the_answer(
    manager: Manager, http: httpx.AsyncClient, error: SllmError, expected: tuple[int, str, str | None]
) -> None:
    def refuse(_: object) -> None:
        raise error

    manager.runner.then = refuse
    answer = await http.post("models/tiny/stop")
    assert refusal(answer) == expected
    assert answer.json()["error"]["message"] == str(error)


async def test_a_full_queue_says_when_to_come_again(manager: Manager, http: httpx.AsyncClient) -> None:
    def refuse(_: object) -> None:
        raise Overloaded("full", retry_after_s=2.4)

    manager.runner.then = refuse
    answer = await http.post("models/tiny/stop")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("models", b"", (400, "invalid_input", None)),
        ("models", b"{", (400, "invalid_input", None)),
        ("models", b"\xff", (400, "invalid_input", None)),
        ("models", b'{"name": "\xff"}', (400, "invalid_input", None)),
        ("models", b"[" * 1500, (400, "invalid_input", None)),
        ("models", b"[]", (400, "invalid_input", None)),
        ("models", b'{"name": "a b", "source": {"kind": "path", "path": "/m"}}', (400, "invalid_input", "name")),
        (
            "models",
            b'{"name": "a", "source": {"kind": "path", "path": "/m"}, "scale": {"mix": 1}}',
            (400, "invalid_input", "scale.mix"),
        ),
        ("models/tiny/deploy", b'{"scale": {"min": 3, "max": 1}}', (400, "invalid_input", "scale.min")),
        ("models/tiny/deploy", b'{"scales": {}}', (400, "invalid_input", None)),
        ("models", b" " * 2001, (413, "body_too_large", None)),
    ],
)
async def test_a_bad_body_is_refused_and_reaches_nobody(
    manager: Manager, http: httpx.AsyncClient, path: str, body: bytes, expected: tuple[int, str, str | None]
) -> None:
    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert refusal(answer) == expected
    assert manager.runner.events == []


async def test_a_body_must_be_said_to_be_json(manager: Manager, http: httpx.AsyncClient) -> None:
    answer = await http.post("models", content=b"{}", headers={"content-type": "text/plain"})
    assert refusal(answer)[:2] == (415, "unsupported_media_type")
    assert manager.runner.events == []


@pytest.mark.parametrize(
    "headers", [{"origin": "http://sllmctl"}, {"origin": "null"}, {"host": "evil.example"}, {"host": ""}, {"host": "127.0.0.1"}]
)
async def test_a_web_page_is_kept_out(manager: Manager, http: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert refusal(await http.post("models/tiny/stop", headers=headers))[:2] == (401, "unauthorised")
    assert manager.runner.events == []
    assert (await http.get("status", headers={"host": "localhost:80"})).status_code == 200


async def test_paths_and_methods_that_are_not_there(http: httpx.AsyncClient) -> None:
    assert refusal(await http.get("gadgets"))[:2] == (404, "unknown_path")
    assert refusal(await http.get("models/"))[:2] == (404, "unknown_path")
    assert refusal(await http.get("models/x"))[:2] == (404, "not_found")
    assert refusal(await http.get("models?colour=red")) == (400, "invalid_input", "colour")
    assert refusal(await http.get("events?kind=a&kind=b")) == (400, "invalid_input", "kind")
    refused = await http.put("models/tiny")
    assert refusal(refused)[:2] == (405, "method_not_allowed")
    assert refused.headers["allow"] == "DELETE, GET, HEAD"


async def test_a_defect_is_said_without_its_insides(manager: Manager, http: httpx.AsyncClient) -> None:
    manager.broken = True
    answer = await http.get("status")
    assert refusal(answer)[:2] == (500, "internal")
    assert "secret" not in answer.text
