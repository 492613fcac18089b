"""What the admin API shows of a real view, of the router and of the database."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from schema.errors import NotFound
from schema.states import InstanceState
from sllmctl import client
from sllmctl.client import AsyncAdminClient
from sllmctl.cluster.records import Checkpoint
from sllmctl.config import ClientSettings
from tests.sllmctl.gateway.admin.rig import A, B, Manager, refusal


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
    assert (await http.get(f"checkpoints/{A}")).json()["models"] == ["tiny"]


async def test_what_is_not_there_is_answered_by_the_nearest_name(http: httpx.AsyncClient) -> None:
    said = {path: (await http.get(path)).json()["error"]["message"] for path in ("models/tinny", "nodes/lokal", "models/x")}
    assert said == {
        "models/tinny": "there is no model 'tinny'; did you mean 'tiny'?",
        "nodes/lokal": "there is no node 'lokal'; did you mean 'local'?",
        "models/x": "there is no model 'x'; `sllmctl model ls` shows what there is",
    }


async def test_a_checkpoint_is_found_by_the_beginning_of_its_digest(http: httpx.AsyncClient) -> None:
    assert (await http.get("checkpoints/ababa")).json()["digest"] == A
    assert (await http.get("checkpoints/abcd")).json()["digest"] == B
    assert refusal(await http.get("checkpoints/ab")) == (400, "invalid_input", "digest")
    assert refusal(await http.get("checkpoints/ffff")) == (404, "not_found", None)


async def test_a_checkpoint_is_found_by_its_model(http: httpx.AsyncClient) -> None:
    assert (await http.get("checkpoints/tiny")).json()["digest"] == A
    assert refusal(await http.get("checkpoints/coming")) == (409, "conflict", None)


async def test_two_checkpoints_of_one_beginning_are_a_conflict(manager: Manager, http: httpx.AsyncClient) -> None:
    manager.view.add_checkpoint(Checkpoint("abcd" + "1" * 60, "X", 1, 1, 1, 1.0))
    assert refusal(await http.get("checkpoints/abcd"))[:2] == (409, "conflict")


async def test_events_are_asked_of_the_database(manager: Manager, http: httpx.AsyncClient) -> None:
    assert (await http.get("events")).json()["items"][0]["id"] == "ev_1"
    await http.get("events", params={"kind": "model", "object": "tiny", "limit": "5", "after": "ev_0"})
    assert manager.database.asked == [(None, None, 100, None), ("model", "tiny", 5, "ev_0")]


async def test_a_kind_of_event_that_is_none(manager: Manager, http: httpx.AsyncClient) -> None:
    refused = await http.get("events", params={"kind": "bogus"})
    assert refusal(refused) == (400, "invalid_input", "kind")
    assert refused.json()["error"]["message"] == "kind: 'bogus' is none of model, instance, node, checkpoint"
    assert manager.database.asked == []


@pytest.mark.parametrize("limit", ["0", "-1", "10001", "1.5", "1e3", "1_0", "many", "nan", "inf", ""])
async def test_a_limit_that_is_none(http: httpx.AsyncClient, limit: str) -> None:
    assert refusal(await http.get("events", params={"limit": limit})) == (400, "invalid_input", "limit")


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def test_the_typed_client_understands_it(manager: Manager) -> None:
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="sl") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        path = Path(directory) / "admin.sock"
        listener.bind(str(path))
        listener.listen(8)
        server = Server(uvicorn.Config(manager.app, lifespan="off", ws="none", log_config=None))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with AsyncAdminClient(path, ClientSettings()) as admin:
                assert [model.name for model in await admin.ask(client.models())] == ["coming", "tiny"]
                assert (await admin.ask(client.node("local"))).id == "node_1"
                assert (await admin.ask(client.checkpoint("ababa"))).placements[0].node == "local"
                assert not (await admin.ask(client.wait_model("tiny", "ready", 0.0))).done
                manager.view.set_state(manager.view.instances["inst_1"], InstanceState.READY)
                assert (await admin.ask(client.wait_model("tiny", "ready", 60.0))).done
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
    assert refusal(await http.get("models/x/explain")) == (404, "not_found", None)
    assert refusal(await http.get("requests/req_9/explain")) == (404, "not_found", None)
    assert refusal(await http.get("models/tiny/explain?wide=1")) == (400, "invalid_input", "wide")


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
        assert refusal(await http.get(f"estimates?limit={limit}")) == (400, "invalid_input", "limit")
