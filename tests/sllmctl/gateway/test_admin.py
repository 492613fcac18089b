"""The admin API over a real view: what it shows, what it asks of the control loop, what it refuses, and how it waits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn

from schema.admin import AppliedView, EventView, OutcomeView, ProgressView, RequestTimeline, RequestView, StatusView
from schema.errors import Conflict, Fault, InvalidCheckpoint, NotFound, Overloaded, SllmError
from schema.ids import Epoch
from schema.link import InstanceLoad
from schema.spec import ModelSpec, PathSource, ScaleSpec
from schema.states import InstanceState, ModelState, NodeState, RequestState, Tier, TierState
from sllmctl import client
from sllmctl.client import AsyncAdminClient
from sllmctl.config import AdminSettings, ClientSettings, LogSettings
from sllmctl.control.effects import (
    AddModel,
    ApplyModels,
    DeployModel,
    EndOperation,
    Event,
    Operate,
    RemoveModel,
    StopInstanceNow,
    StopModel,
)
from sllmctl.control.records import Checkpoint, Instance, Model, Node, Operation, PlacementRecord
from sllmctl.control.view import ClusterView
from sllmctl.gateway.admin.app import admin_app
from sllmctl.gateway.admin.explanations import Explanations
from sllmctl.gateway.admin.logs import Logs, LogsPort
from sllmctl.planner.plans import Candidate, Decision, Refusal, Rejection, Wait

_A, _B = "ab" * 32, "abcd" + "0" * 60


def _model(name: str, state: ModelState, digest: str | None = None, fault: Fault | None = None, least: int = 0) -> Model:
    spec = ModelSpec(name=name, source=PathSource("/m"), scale=ScaleSpec(min=least, max=max(1, least)))
    return Model(spec, state, digest, "op_1" if state is ModelState.INGESTING else None, None, fault, 10.0, 11.0)


def _instance(id_: str, model: str, state: InstanceState, fault: Fault | None = None) -> Instance:
    return Instance(id_, model, "node_1", _A, Epoch(5), state, (0,), 1024, 0, None, fault, None, "room", 20.0, 21.0)


def _view() -> ClusterView:
    view = ClusterView()
    view.add_node(Node("node_1", "local", "unix:/a", NodeState.READY, False, 1.0, 2.0))
    for digest in (_A, _B):
        view.add_checkpoint(Checkpoint(digest, "LlamaForCausalLM", 4096, 64, 512, 5.0))
    view.put_placement(PlacementRecord(_A, "node_1", Tier.DISK, 0, TierState.RESIDENT, 4096))
    view.add_model(_model("tiny", ModelState.DEPLOYED, _A, least=1))
    view.add_model(_model("coming", ModelState.INGESTING))
    view.add_instance(_instance("inst_1", "tiny", InstanceState.STARTING))
    return view


class _Runner:
    """Takes events as the control loop would: ``then`` says what each does to the view, or raises its refusal."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.then: Callable[[Any], Any] = lambda _: ()

    async def ask(self, make: Callable[[int], Event]) -> Any:
        self.events.append(make(7))
        return self.then(self.events[-1])


class _Database:
    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    async def events(
        self,
        kind: str | None = None,
        object: str | None = None,  # noqa: A002
        limit: int = 100,
        after: str | None = None,
    ) -> list[EventView]:
        self.asked.append((kind, object, limit, after))
        return [EventView(id="ev_1", at=1.0, level="info", kind="model", object="tiny", reason="added", message="added")]

    async def outcomes(self, limit: int = 100) -> list[OutcomeView]:
        self.asked.append(("outcomes", limit))
        return [
            OutcomeView(
                at=float(at), kind="start", model="tiny", node="local", source="disk", estimated_s=1.0, actual_s=1.0 + at / 10
            )
            for at in range(5)
        ]


_BEST = Candidate(node="node_1", name="local", devices=(0,), kv_bytes=1, source=Tier.DISK, startup_s=2.0)


@dataclass(frozen=True)
class _Made:
    at: float
    model: str
    instance: str | None
    waiting: int
    decision: Decision


class _Planner:
    def explain(self, model: Model, now: float) -> tuple[Decision, list[tuple[str, Candidate | Rejection]]]:
        return Wait(0.5, _BEST, {}, f"at {now:g} {model.name} is better served by waiting"), [("node_1", _BEST)]


class _Estimates:
    def coefficients(self) -> dict[str, float]:
        return {"disk": 2e9}


class _Router:
    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def model_counts(self, model: str) -> tuple[int, int]:
        return (2, 1) if model == "tiny" else (0, 0)

    def instance_load(self, instance: str) -> InstanceLoad | None:
        return InstanceLoad(instance=instance, epoch=Epoch(5), running=1, waiting=0, kv_used_tokens=9)

    def loads(self, node: str) -> list[tuple[str, ProgressView]]:
        return []

    def progress(self, op_or_instance: str) -> ProgressView | None:
        return ProgressView(stage="reading", done_bytes=1, total_bytes=4) if op_or_instance == "op_1" else None

    def requests(self) -> list[RequestView]:
        return [self.request("req_1")]

    def request(self, id: str) -> RequestView:  # noqa: A002
        if id != "req_1":
            raise NotFound(f"there is no request {id!r}")
        return RequestView(
            id=id,
            model="tiny",
            state=RequestState.WAITING,
            instance=None,
            attempts=0,
            prompt_tokens=3,
            generated_tokens=0,
            orphaned=False,
            received_at=1.0,
            timeline=RequestTimeline(cold=True),
        )

    def cancel(self, id: str) -> None:  # noqa: A002
        self.request(id)
        self.cancelled.append(id)


class _Manager:
    def __init__(self, settings: AdminSettings | None = None, links: LogsPort | None = None) -> None:
        self.view, self.runner, self.database, self.router = _view(), _Runner(), _Database(), _Router()
        self.broken = False
        self.decisions = deque([_Made(3.0, "tiny", None, 2, Refusal({Rejection.CORDONED: 1}, False, "no room"))], maxlen=9)
        self.app = admin_app(
            runner=self.runner,
            view=self.view,
            database=self.database,
            router=self.router,
            explanations=Explanations(
                view=self.view,
                router=self.router,
                planner=_Planner(),
                decisions=self.decisions,
                estimates=_Estimates(),
                database=self.database,
                clock=lambda: 77.0,
            ),
            status=self.status,
            settings=settings or AdminSettings(wait_limit_s=5.0, wait_look_s=0.001, body_bytes=2000),
            logs=None if links is None else Logs(self.view, links, LogSettings()),
        )

    def status(self) -> StatusView:
        if self.broken:
            raise ZeroDivisionError("secret")
        return StatusView(
            cluster="c", generation=1, version="0", pid=1, started_at=0.0, api_url="", ready=True, nodes_ready=1, nodes=1
        )

    def http(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://sllmctl/admin/v1/")


@pytest.fixture
def manager() -> _Manager:
    return _Manager()


@pytest.fixture
async def http(manager: _Manager) -> AsyncIterator[httpx.AsyncClient]:
    async with manager.http() as http:
        yield http


def _refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "param"}
    return answer.status_code, error["code"], error["param"]


async def test_what_there_is(http: httpx.AsyncClient) -> None:
    assert [model["name"] for model in (await http.get("models")).json()["items"]] == ["coming", "tiny"]
    tiny = (await http.get("models/tiny")).json()
    assert (tiny["waiting"], tiny["running"], tiny["instances"]) == (2, 1, {"starting": 1})
    assert (await http.get("models/coming")).json()["progress"]["total_bytes"] == 4
    assert (await http.get("nodes/local")).json() == (await http.get("nodes/node_1")).json()
    instance = (await http.get("instances/inst_1")).json()
    assert (instance["node"], instance["kv_used_tokens"], instance["reason"]) == ("local", 9, "room")
    assert (await http.get("instances")).json()["items"] == [instance]
    assert (await http.get("requests")).json()["items"] == [(await http.get("requests/req_1")).json()]
    assert (await http.get("status")).json()["generation"] == 1
    assert (await http.get(f"checkpoints/{_A}")).json()["models"] == ["tiny"]


async def test_specs_are_applied_together_and_answered_one_by_one(manager: _Manager, http: httpx.AsyncClient) -> None:
    spec = ModelSpec(name="new", source=PathSource("/m"))
    manager.runner.then = lambda event: (AppliedView(name=event.specs[0].name, action="created"),)
    body = {"models": [msgspec.to_builtins(spec)], "remove": ["tiny"], "deploy": False, "dry_run": True}
    (told,) = (await http.post("apply", json=body)).json()["items"]
    assert (told["name"], told["action"], told["changes"], told["fault"]) == ("new", "created", [], None)
    assert manager.runner.events == [ApplyModels(7, (spec,), ("tiny",), False, True)]
    assert _refusal(await http.post("apply", json={"models": [{"name": "new"}]}))[:2] == (400, "invalid_input")
    assert _refusal(await http.post("apply", json={"model": []}))[:2] == (400, "invalid_input")


async def test_what_is_not_there_is_answered_by_the_nearest_name(http: httpx.AsyncClient) -> None:
    said = {path: (await http.get(path)).json()["error"]["message"] for path in ("models/tinny", "nodes/lokal", "models/x")}
    assert said == {
        "models/tinny": "there is no model 'tinny'; did you mean 'tiny'?",
        "nodes/lokal": "there is no node 'lokal'; did you mean 'local'?",
        "models/x": "there is no model 'x'; `sllmctl model ls` shows what there is",
    }


async def test_a_checkpoint_is_found_by_the_beginning_of_its_digest(http: httpx.AsyncClient) -> None:
    assert (await http.get("checkpoints/ababa")).json()["digest"] == _A
    assert (await http.get("checkpoints/abcd")).json()["digest"] == _B
    assert _refusal(await http.get("checkpoints/ab")) == (400, "invalid_input", "digest")
    assert _refusal(await http.get("checkpoints/ffff")) == (404, "not_found", None)


async def test_a_checkpoint_is_found_by_its_model(http: httpx.AsyncClient) -> None:
    assert (await http.get("checkpoints/tiny")).json()["digest"] == _A
    assert _refusal(await http.get("checkpoints/coming")) == (409, "conflict", None)


async def test_operations_are_asked_for_and_waited_for(manager: _Manager, http: httpx.AsyncClient) -> None:
    operation = Operation("op_7", 7, "verify", _A, "node_1", Tier.DISK, 4096, 30.0)
    manager.runner.then = lambda _: manager.view.operations.update(
        {"op_7": operation, "op_6": Operation("op_6", 6, "drop", _A, "node_1", Tier.DISK, 1, 29.0)}
    )
    (begun,) = (await http.post("checkpoints/tiny/verify", json={"node": "local"})).json()["items"]
    assert (begun["id"], begun["node"], begun["ended_at"]) == ("op_7", "local", None)
    for verb, tier in (("prefetch", "dram"), ("drop", "disk")):
        assert (await http.post(f"checkpoints/{_A}/{verb}", json={"tier": tier})).status_code == 200
    assert manager.runner.events == [
        Operate(7, "verify", "tiny", "local", None),
        Operate(7, "prefetch", _A, None, Tier.DRAM),
        Operate(7, "drop", _A, None, Tier.DISK),
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
    assert _refusal(await http.get("operations/op_9")) == (404, "not_found", None)
    assert _refusal(await http.get("operations/op_7", params={"wait": "ready"})) == (400, "invalid_input", "wait")
    assert _refusal(await http.post("checkpoints/tiny/verify", json={"tier": "attic"}))[:2] == (400, "invalid_input")


async def test_two_checkpoints_of_one_beginning_are_a_conflict(manager: _Manager, http: httpx.AsyncClient) -> None:
    manager.view.add_checkpoint(Checkpoint("abcd" + "1" * 60, "X", 1, 1, 1, 1.0))
    assert _refusal(await http.get("checkpoints/abcd"))[:2] == (409, "conflict")


async def test_events_are_asked_of_the_database(manager: _Manager, http: httpx.AsyncClient) -> None:
    assert (await http.get("events")).json()["items"][0]["id"] == "ev_1"
    await http.get("events", params={"kind": "model", "object": "tiny", "limit": "5", "after": "ev_0"})
    assert manager.database.asked == [(None, None, 100, None), ("model", "tiny", 5, "ev_0")]


async def test_a_kind_of_event_that_is_none(manager: _Manager, http: httpx.AsyncClient) -> None:
    refused = await http.get("events", params={"kind": "bogus"})
    assert _refusal(refused) == (400, "invalid_input", "kind")
    assert refused.json()["error"]["message"] == "kind: 'bogus' is none of model, instance, node, checkpoint"
    assert manager.database.asked == []


@pytest.mark.parametrize("limit", ["0", "-1", "10001", "1.5", "1e3", "1_0", "many", "nan", "inf", ""])
async def test_a_limit_that_is_none(http: httpx.AsyncClient, limit: str) -> None:
    assert _refusal(await http.get("events", params={"limit": limit})) == (400, "invalid_input", "limit")


async def test_a_flag_is_0_or_1(manager: _Manager, http: httpx.AsyncClient) -> None:
    spec = {"name": "new", "source": {"kind": "path", "path": "/m"}}
    assert _refusal(await http.post("models?deploy=yes", json=spec)) == (400, "invalid_input", "deploy")
    assert manager.runner.events == []


async def test_commands_are_events_with_a_ticket(manager: _Manager, http: httpx.AsyncClient) -> None:
    spec = {"name": "new", "source": {"kind": "path", "path": "/m"}}
    manager.runner.then = lambda event: (
        manager.view.add_model(_model("new", ModelState.INGESTING)) if isinstance(event, AddModel) else None
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
    manager: _Manager, http: httpx.AsyncClient, error: SllmError, expected: tuple[int, str, str | None]
) -> None:
    def refuse(_: object) -> None:
        raise error

    manager.runner.then = refuse
    answer = await http.post("models/tiny/stop")
    assert _refusal(answer) == expected
    assert answer.json()["error"]["message"] == str(error)


async def test_a_full_queue_says_when_to_come_again(manager: _Manager, http: httpx.AsyncClient) -> None:
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
    manager: _Manager, http: httpx.AsyncClient, path: str, body: bytes, expected: tuple[int, str, str | None]
) -> None:
    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert _refusal(answer) == expected
    assert manager.runner.events == []


async def test_a_body_must_be_said_to_be_json(manager: _Manager, http: httpx.AsyncClient) -> None:
    answer = await http.post("models", content=b"{}", headers={"content-type": "text/plain"})
    assert _refusal(answer)[:2] == (415, "unsupported_media_type")
    assert manager.runner.events == []


@pytest.mark.parametrize(
    "headers", [{"origin": "http://sllmctl"}, {"origin": "null"}, {"host": "evil.example"}, {"host": ""}, {"host": "127.0.0.1"}]
)
async def test_a_web_page_is_kept_out(manager: _Manager, http: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert _refusal(await http.post("models/tiny/stop", headers=headers))[:2] == (401, "unauthorised")
    assert manager.runner.events == []
    assert (await http.get("status", headers={"host": "localhost:80"})).status_code == 200


async def test_paths_and_methods_that_are_not_there(http: httpx.AsyncClient) -> None:
    assert _refusal(await http.get("gadgets"))[:2] == (404, "unknown_path")
    assert _refusal(await http.get("models/"))[:2] == (404, "unknown_path")
    assert _refusal(await http.get("models/x"))[:2] == (404, "not_found")
    assert _refusal(await http.get("models?colour=red")) == (400, "invalid_input", "colour")
    assert _refusal(await http.get("events?kind=a&kind=b")) == (400, "invalid_input", "kind")
    refused = await http.put("models/tiny")
    assert _refusal(refused)[:2] == (405, "method_not_allowed")
    assert refused.headers["allow"] == "DELETE, GET, HEAD"


async def test_a_defect_is_said_without_its_insides(manager: _Manager, http: httpx.AsyncClient) -> None:
    manager.broken = True
    answer = await http.get("status")
    assert _refusal(answer)[:2] == (500, "internal")
    assert "secret" not in answer.text


async def test_a_wait_ends_when_the_model_is_ready(manager: _Manager, http: httpx.AsyncClient) -> None:
    waiting = asyncio.create_task(http.get("models/tiny", params={"wait": "ready"}))
    assert (await http.get("models/tiny", params={"wait": "ready", "timeout": "0"})).status_code == 202
    assert not waiting.done()
    manager.view.set_state(manager.view.instances["inst_1"], InstanceState.READY)
    answer = await waiting
    assert (answer.status_code, answer.json()["instances"]) == (200, {"ready": 1})


async def test_a_wait_is_no_longer_than_the_limit() -> None:
    manager = _Manager(AdminSettings(wait_limit_s=0.01, wait_look_s=0.001))
    async with manager.http() as http:
        assert (await http.get("models/tiny", params={"wait": "ready", "timeout": "3600"})).status_code == 202


@pytest.mark.parametrize(
    ("state", "until", "expected"),
    [
        (ModelState.INGESTING, "ingested", 202),
        (ModelState.STOPPED, "ingested", 200),
        (ModelState.DEPLOYED, "ingested", 200),
        (ModelState.FAILED, "ingested", 422),
        (ModelState.FAILED, "ready", 422),
        (ModelState.INGESTING, "ready", 202),
        (ModelState.STOPPED, "ready", 409),
        (ModelState.DEPLOYED, "ready", 200),
        (ModelState.STOPPED, "stopped", 200),
        (ModelState.DEPLOYED, "stopped", 202),
        (ModelState.DELETING, "stopped", 409),
        (ModelState.DELETING, "ready", 409),
        (ModelState.DELETING, "gone", 202),
        (ModelState.STOPPED, "gone", 202),
    ],
)
async def test_what_each_wait_waits_for(
    manager: _Manager, http: httpx.AsyncClient, state: ModelState, until: str, expected: int
) -> None:
    fault = Fault("invalid_checkpoint", "cut short") if state is ModelState.FAILED else None
    manager.view.add_model(_model("it", state, fault=fault))
    answer = await http.get("models/it", params={"wait": until, "timeout": "0"})
    assert answer.status_code == expected


async def test_a_wait_for_an_instance_that_failed_raises_its_fault(manager: _Manager, http: httpx.AsyncClient) -> None:
    manager.view.add_instance(_instance("inst_2", "tiny", InstanceState.FAILED, Fault("out_of_space", "no room for its KV")))
    answer = await http.get("models/tiny", params={"wait": "ready"})
    assert _refusal(answer)[:2] == (507, "out_of_space")


async def test_a_wait_for_what_is_gone_or_unknown(manager: _Manager, http: httpx.AsyncClient) -> None:
    waiting = asyncio.create_task(http.get("models/coming", params={"wait": "gone"}))
    assert (await http.get("models/coming", params={"wait": "gone", "timeout": "0"})).status_code == 202
    manager.view.drop_model("coming")
    assert _refusal(await waiting)[:2] == (404, "not_found")
    assert _refusal(await http.get("models/tiny", params={"wait": "happy"})) == (400, "invalid_input", "wait")
    assert _refusal(await http.get("models/tiny", params={"wait": "ready", "timeout": "soon"})) == (
        400,
        "invalid_input",
        "timeout",
    )


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def test_the_typed_client_understands_it(manager: _Manager) -> None:
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="sl") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        path = Path(directory) / "admin.sock"
        listener.bind(str(path))
        listener.listen(8)
        server = _Server(uvicorn.Config(manager.app, lifespan="off", ws="none", log_config=None))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with AsyncAdminClient(path, ClientSettings()) as admin:
                assert [model.name for model in await admin.ask(client.models())] == ["coming", "tiny"]
                assert (await admin.ask(client.node("local"))).id == "node_1"
                assert (await admin.ask(client.checkpoint("ababa"))).placements[0].node == "local"
                assert not (await admin.ask(client.wait_model("tiny", "ready", 0.0))).done
                manager.view.set_state(manager.view.instances["inst_1"], InstanceState.READY)
                assert (await admin.ask(client.wait_model("tiny", "ready", 5.0))).done
                assert (await admin.ask(client.explain_model("tiny"))).decision.candidates[0].node == "local"
                assert (await admin.ask(client.explain_request("req_1"))).decisions[0].reason == "no room"
                assert (await admin.ask(client.estimates())).errors[0].count == 5
                await admin.ask(client.remove_model("tiny"))
                await admin.ask(client.cancel_request("req_1"))
                with pytest.raises(NotFound, match="no instance 'x'"):
                    await admin.ask(client.instance("x"))
        finally:
            server.should_exit = True
            await serving


async def test_decisions_are_explained(http: httpx.AsyncClient) -> None:
    model = (await http.get("models/tiny/explain")).json()
    assert (model["at"], model["decision"]["kind"], model["decision"]["waiting"]) == (77.0, "wait", 0)
    assert model["decision"]["reason"] == "at 77 tiny is better served by waiting"
    assert [(node["node"], node["candidate"]["cost_s"]) for node in model["nodes"]] == [("local", 2.0)]
    assert (model["last"]["kind"], model["last"]["rejected"]) == ("refused", {"cordoned": 1})
    request = (await http.get("requests/req_1/explain")).json()
    assert (request["request"]["id"], request["kept"], request["decisions"]) == ("req_1", True, [model["last"]])
    assert _refusal(await http.get("models/x/explain")) == (404, "not_found", None)
    assert _refusal(await http.get("requests/req_9/explain")) == (404, "not_found", None)
    assert _refusal(await http.get("models/tiny/explain?wide=1")) == (400, "invalid_input", "wide")


async def test_estimates_are_summed_up_over_all_and_shown_by_the_newest(http: httpx.AsyncClient) -> None:
    everything = (await http.get("estimates")).json()
    assert [outcome["at"] for outcome in everything["outcomes"]] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert everything["coefficients"] == {"disk": 2e9}
    ((error),) = everything["errors"]
    assert (error["kind"], error["source"], error["count"]) == ("start", "disk", 5)
    assert error["bias_s"] == pytest.approx(0.2)
    few = (await http.get("estimates?limit=2")).json()
    assert few["errors"] == everything["errors"]
    assert [outcome["at"] for outcome in few["outcomes"]] == [3.0, 4.0]
    assert (await http.get("estimates?limit=0")).json()["outcomes"] == []
    for limit in ("-1", "1.5", "1e300"):
        assert _refusal(await http.get(f"estimates?limit={limit}")) == (400, "invalid_input", "limit")
