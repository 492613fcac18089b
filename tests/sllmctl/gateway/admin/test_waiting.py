"""How the admin API holds an answer until a model is as waited for."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from schema.errors import Fault
from schema.states import InstanceState, ModelState
from sllmctl.config import AdminSettings
from tests.sllmctl.gateway.admin.rig import Manager, made_instance, made_model, refusal


async def test_a_wait_ends_when_the_model_is_ready(manager: Manager, http: httpx.AsyncClient) -> None:
    waiting = asyncio.create_task(http.get("models/tiny", params={"wait": "ready"}))
    assert (await http.get("models/tiny", params={"wait": "ready", "timeout": "0"})).status_code == 202
    assert not waiting.done()
    manager.view.set_state(manager.view.instances["inst_1"], InstanceState.READY)
    answer = await waiting
    assert (answer.status_code, answer.json()["instances"]) == (200, {"ready": 1})


async def test_a_wait_is_no_longer_than_the_limit() -> None:
    manager = Manager(AdminSettings(wait_limit_s=0.01, wait_look_s=0.001))
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
    manager: Manager, http: httpx.AsyncClient, state: ModelState, until: str, expected: int
) -> None:
    fault = Fault("invalid_checkpoint", "cut short") if state is ModelState.FAILED else None
    manager.view.add_model(made_model("it", state, fault=fault))
    answer = await http.get("models/it", params={"wait": until, "timeout": "0"})
    assert answer.status_code == expected


async def test_a_wait_for_an_instance_that_failed_raises_its_fault(manager: Manager, http: httpx.AsyncClient) -> None:
    manager.view.add_instance(
        made_instance("inst_2", "tiny", InstanceState.FAILED, Fault("out_of_space", "no room for its KV"))
    )
    answer = await http.get("models/tiny", params={"wait": "ready"})
    assert refusal(answer)[:2] == (507, "out_of_space")


async def test_a_wait_for_what_is_gone_or_unknown(manager: Manager, http: httpx.AsyncClient) -> None:
    waiting = asyncio.create_task(http.get("models/coming", params={"wait": "gone"}))
    assert (await http.get("models/coming", params={"wait": "gone", "timeout": "0"})).status_code == 202
    manager.view.drop_model("coming")
    assert refusal(await waiting)[:2] == (404, "not_found")
    assert refusal(await http.get("models/tiny", params={"wait": "happy"})) == (400, "invalid_input", "wait")
    assert refusal(await http.get("models/tiny", params={"wait": "ready", "timeout": "soon"})) == (
        400,
        "invalid_input",
        "timeout",
    )
