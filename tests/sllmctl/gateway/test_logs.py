"""Logs over the admin API: merged by time, narrowed, followed, and what is said where there are none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from schema.admin import LogFrame
from schema.errors import NotFound, SllmError, Unreachable
from schema.link import LogChunk, LogLine, ReadLog
from schema.states import NodeState
from sllmctl.cluster.records import Node
from sllmctl.cluster.view import ClusterView
from sllmctl.config import LogSettings
from sllmctl.gateway.admin.answers import refuse
from sllmctl.gateway.admin.logs import Logs


class FakeLinks:
    """Pages by node, told one after the other; the last one again and again, without lines."""

    def __init__(self) -> None:
        self.pages: dict[str, list[LogChunk | SllmError]] = {}
        self.asked: list[tuple[str, ReadLog]] = []

    def is_up(self, node: str) -> bool:
        return node in self.pages

    async def read_log(self, node: str, wanted: ReadLog) -> LogChunk:
        self.asked.append((node, wanted))
        if node not in self.pages:
            raise Unreachable(f"{node} is away")
        pages = self.pages[node]
        page = pages.pop(0) if pages else LogChunk(op="", cursors={})
        if isinstance(page, SllmError):
            raise page
        return page


@pytest.fixture
def links() -> FakeLinks:
    return FakeLinks()


@pytest.fixture
async def admin(links: FakeLinks) -> AsyncIterator[httpx.AsyncClient]:
    view = ClusterView()
    for node in ("n1", "n2"):
        view.add_node(Node(node, f"name-{node}", "unix:/x", NodeState.JOINING, False, 0.0, 0.0))
    logs = Logs(view, links, LogSettings(every_s=0.01, followers=1))
    routes = [Route("/" + path, endpoint, methods=[method]) for (method, path), endpoint in logs.routes().items()]
    app = Starlette(routes=routes, exception_handlers={SllmError: refuse})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://sllmctl") as client:
        yield client
    logs.close()


def page(*lines: tuple[str, float | None, str], more: bool = False, cursor: str = "1-0") -> LogChunk:
    return LogChunk(op="", lines=tuple(LogLine(*line) for line in lines), cursors={"i": cursor}, more=more)


async def test_lines_of_all_nodes_come_in_order_of_time(admin: httpx.AsyncClient, links: FakeLinks) -> None:
    links.pages["n1"] = [page(("i1", 1.0, "a"), ("i1", None, " trace of a"), more=True, cursor="1-9"), page(("i1", 4.0, "d"))]
    links.pages["n2"] = [page(("i2", 2.0, "b"), ("i2", 3.0, "c"))]
    answer = await admin.get("/models/m/logs", params={"tail": 5, "since": 60, "instance": "i1"})
    assert [item["text"] for item in answer.json()["items"]] == ["a", " trace of a", "b", "c", "d"]
    assert answer.json()["items"][0] == {"node": "name-n1", "source": "i1", "at": 1.0, "text": "a"}
    first, second = (wanted for node, wanted in links.asked if node == "n1")
    assert (first.model, first.instance, first.tail, first.newer_s, first.cursors) == ("m", "i1", 5, 60.0, None)
    assert second.cursors == {"i": "1-9"}


async def test_what_is_not_there_is_said(admin: httpx.AsyncClient, links: FakeLinks) -> None:
    assert (await admin.get("/models/m/logs")).status_code == 503
    links.pages["n1"] = []
    assert (await admin.get("/models/m/logs")).status_code == 404
    none = NotFound("this node has no log of instance i")
    links.pages["n1"] = [none]
    answer = await admin.get("/instances/i/logs")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "n2 is away"), "it may have one"
    links.pages = {"n1": [none], "n2": [none]}
    answer = await admin.get("/instances/i/logs")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert answer.json()["error"]["message"] == "there is no instance 'i', and no node has a log of it"
    assert (await admin.get("/nodes/none/logs")).status_code == 404
    for wrong in ("tail=-1", "tail=1.5", "follow=yes", "process=agent"):
        assert (await admin.get(f"/models/m/logs?{wrong}")).status_code == 400, wrong


@pytest.mark.parametrize("why", [Unreachable("gone"), SllmError("the log cannot be read: [Errno 5] Input/output error")])
async def test_one_node_that_cannot_tell_does_not_hide_the_others(
    admin: httpx.AsyncClient, links: FakeLinks, why: SllmError
) -> None:
    links.pages = {"n1": [why], "n2": [page(("i2", 2.0, "b"))]}
    answer = await admin.get("/models/m/logs")
    assert [item["text"] for item in answer.json()["items"]] == ["b"]
    assert answer.json()["lost"] == {"name-n1": why.message}
    links.pages = {"n1": [why]}
    answer = await admin.get("/nodes/name-n1/logs")
    assert (answer.is_success, answer.json()["error"]["message"]) == (False, why.message)


async def test_a_node_that_is_away_is_told_of_and_one_without_such_a_log_is_not(
    admin: httpx.AsyncClient, links: FakeLinks
) -> None:
    links.pages = {"n2": [page(("i2", 2.0, "b"))]}
    answer = (await admin.get("/models/m/logs")).json()
    assert ([item["text"] for item in answer["items"]], answer["lost"]) == (["b"], {"name-n1": "n1 is away"})
    links.pages = {"n1": [NotFound("this node has no log of it")], "n2": [page(("i2", 2.0, "b"))]}
    assert (await admin.get("/instances/i2/logs")).json()["lost"] == {}


@pytest.mark.parametrize("why", [Unreachable("broke"), SllmError("broke")], ids=["the link", "the disk"])
async def test_followed_it_goes_on_over_what_breaks(links: FakeLinks, why: SllmError) -> None:
    view = ClusterView()
    view.add_node(Node("n1", "name", "unix:/x", NodeState.JOINING, False, 0.0, 0.0))
    logs = Logs(view, links, LogSettings(every_s=0.01, idle_s=0.05))
    links.pages["n1"] = [page(("agent", 1.0, "a")), why, page(("agent", 2.0, "b"))]
    route = Route("/nodes/{name}/logs", logs.of_node)
    frames: list[LogFrame] = []
    seen = asyncio.Event()

    async def send(message: dict[str, object]) -> None:
        body = message.get("body", b"")
        assert isinstance(body, bytes)
        frames.extend(msgspec.json.decode(line[6:], type=LogFrame) for line in body.splitlines() if line.startswith(b"data: "))
        if body.startswith(b": alive") and len(frames) == 3:
            seen.set()

    async def receive() -> dict[str, object]:
        await asyncio.sleep(60)
        raise AssertionError

    scope = {
        "type": "http", "method": "GET", "path": "/nodes/name/logs", "query_string": b"follow=1&process=store", "headers": [],
        "asgi": {"spec_version": "2.4"},
    }  # fmt: skip
    task = asyncio.create_task(Starlette(routes=[route])(scope, receive, send))  # type: ignore[arg-type]
    await asyncio.wait_for(seen.wait(), 60)
    logs.close()
    await asyncio.wait_for(task, 60)
    assert [[item.text for item in frame.items] for frame in frames] == [["a"], [], ["b"]]
    assert [dict(frame.lost) for frame in frames] == [{}, {"name": "broke"}, {}]
    assert links.asked[0][1].process == "store"
