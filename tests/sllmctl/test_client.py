"""The typed client, both transports, against a manager on a unix socket; and what a dead or foreign socket gives."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from schema.errors import (
    Conflict,
    InvalidInput,
    LinkError,
    NotFound,
    Overloaded,
    SllmError,
    TimedOut,
)
from schema.spec import ModelSpec, PathSource, ScaleSpec
from schema.states import Tier
from sllmctl import client
from sllmctl.client import AdminClient, AsyncAdminClient, Call, NoManager
from sllmctl.config import ClientSettings
from tests.sllmctl.fake_manager import (
    CHECKPOINTS,
    ESTIMATES,
    EVENTS,
    EXPLAINS,
    INSTANCES,
    MODELS,
    NODES,
    OPERATIONS,
    REQUEST_EXPLAINS,
    REQUESTS,
    FakeManager,
    fake_manager,
)

_SETTINGS = ClientSettings(connect_s=60.0, answer_s=60.0)
Ask = Callable[[Call[Any]], Any]


@pytest.fixture(scope="module")
def running() -> Iterator[FakeManager]:
    with fake_manager() as manager:
        yield manager


@pytest.fixture
def manager(running: FakeManager) -> FakeManager:
    running.forget()
    return running


@pytest.fixture(params=["sync", "async"])
def ask(manager: FakeManager, request: pytest.FixtureRequest) -> Iterator[Ask]:
    """Carries a call by one transport or the other."""
    if request.param == "sync":
        with AdminClient(manager.socket, _SETTINGS) as admin:
            yield admin.ask
        return

    async def once(call: Call[Any]) -> Any:
        async with AsyncAdminClient(manager.socket, _SETTINGS) as admin:
            return await admin.ask(call)

    yield lambda call: asyncio.run(once(call))


def test_views_come_back_as_they_were_sent(ask: Ask) -> None:
    assert ask(client.nodes()) == NODES
    assert ask(client.node("gpu1")) == NODES[1]
    assert ask(client.models()) == MODELS
    assert ask(client.model("qwen")) == MODELS[0]
    assert ask(client.instances()) == INSTANCES
    assert ask(client.instance("inst_2")) == INSTANCES[1]
    assert ask(client.checkpoints()) == CHECKPOINTS
    assert ask(client.checkpoint(CHECKPOINTS[0].digest)) == CHECKPOINTS[0]
    assert ask(client.requests()) == REQUESTS
    assert ask(client.request("req_1")) == REQUESTS[0]
    assert ask(client.events()) == EVENTS
    assert ask(client.explain_model("qwen")) == EXPLAINS["qwen"]
    assert ask(client.explain_request("req_1")) == REQUEST_EXPLAINS["req_1"]
    assert ask(client.estimates()) == ESTIMATES
    assert ask(client.status()).generation == 7


def test_operations_come_back_and_are_waited_for(manager: FakeManager, ask: Ask) -> None:
    for verb, call in (
        ("prefetch", client.prefetch_checkpoint("qwen", "local", Tier.DRAM)),
        ("verify", client.verify_checkpoint("qwen", "local")),
        ("drop", client.drop_checkpoint("qwen", "local", Tier.DISK)),
    ):
        manager.answer(f"POST checkpoints/qwen/{verb}", 200, {"items": OPERATIONS})
        assert ask(call) == OPERATIONS
    assert ask(client.operations()) == OPERATIONS
    assert ask(client.wait_operation("op_1", 0.5)) == OPERATIONS[0]
    assert manager.asked[-1][:2] == ("GET", "operations/op_1?wait=ended&timeout=0.5")
    assert [body["tier"] for _, _, body in manager.asked[:3]] == ["dram", None, "disk"]


def test_what_is_asked_for(manager: FakeManager, ask: Ask) -> None:
    spec = ModelSpec(name="qwen", source=PathSource("/m"))
    for call in (client.stop_model("qwen"), client.deploy_model("qwen", ScaleSpec(min=1))):
        manager.answer(f"POST {call.path}", 200, MODELS[0])
        assert ask(call) == MODELS[0]
    manager.answer("POST models", 201, MODELS[0])
    ask(client.add_model(spec))
    for nothing in (client.remove_model("qwen"), client.stop_instance("inst_1"), client.cancel_request("req_1")):
        assert ask(nothing) is None
    ask(client.events("model", "qwen", 5))
    assert [(method, path) for method, path, _ in manager.asked] == [
        ("POST", "models/qwen/stop"),
        ("POST", "models/qwen/deploy"),
        ("POST", "models"),
        ("DELETE", "models/qwen"),
        ("POST", "instances/inst_1/stop"),
        ("POST", "requests/req_1/cancel"),
        ("GET", "events?kind=model&object=qwen&limit=5"),
    ]
    assert manager.asked[1][2]["scale"]["min"] == 1
    assert manager.asked[2][2]["source"] == {"kind": "path", "path": "/m", "node": "", "in_place": False}


def test_a_wait_says_whether_it_is_over(manager: FakeManager, ask: Ask) -> None:
    manager.answer("GET models/qwen", 202, MODELS[0])
    manager.answer("GET models/qwen", 200, MODELS[0])
    assert not ask(client.wait_model("qwen", "ready", 2.5)).done
    assert ask(client.wait_model("qwen", "ready", 2.5)).done
    assert manager.asked[0][1] == "models/qwen?wait=ready&timeout=2.5"


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "not_found", NotFound),
        (409, "conflict", Conflict),
        (400, "invalid_input", InvalidInput),
        (429, "overloaded", Overloaded),
        (504, "timed_out", TimedOut),
        (500, "of_a_newer_version", SllmError),
    ],
)
def test_an_error_comes_back_as_its_class(manager: FakeManager, ask: Ask, status: int, code: str, kind: type) -> None:
    manager.refuse("GET models/x", status, code, "what happened", "name")
    with pytest.raises(SllmError, match="what happened") as caught:
        ask(client.model("x"))
    assert type(caught.value) is kind
    if isinstance(caught.value, InvalidInput):
        assert caught.value.param == "name"


def test_answers_that_are_no_managers(manager: FakeManager, ask: Ask) -> None:
    manager.answers["GET models/x"] = [(502, b"<html>")]
    with pytest.raises(LinkError, match="answered 502 without an error body"):
        ask(client.model("x"))
    manager.answers["GET models/x"] = [(200, b'{"name": 3}')]
    with pytest.raises(LinkError, match="of one version"):
        ask(client.model("x"))


@pytest.mark.parametrize("name", ["", ".", "..", "../instances", "org/model"])
def test_what_is_no_name_is_not_asked_for(manager: FakeManager, ask: Ask, name: str) -> None:
    with pytest.raises(InvalidInput, match="not a name"):
        ask(client.remove_model(name))
    assert manager.asked == []


@pytest.mark.parametrize("name", ["a?wait=gone", "a#b", "a b", "%2e%2e"])
def test_a_name_stays_one_part_of_the_path(manager: FakeManager, ask: Ask, name: str) -> None:
    with pytest.raises(NotFound):
        ask(client.model(name))
    ((_, path, _),) = manager.asked
    assert path.startswith("models/")
    assert "?" not in path


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="sl") as path:
        yield Path(path)


@pytest.mark.parametrize("left_behind", [False, True])
async def test_without_a_manager_it_says_how_to_start_one(directory: Path, left_behind: bool) -> None:
    path = directory / "admin.sock"
    if left_behind:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    with AdminClient(path, _SETTINGS) as admin, pytest.raises(NoManager, match="start it with `sllmctl serve`"):
        admin.ask(client.status())
    async with AsyncAdminClient(path, _SETTINGS) as twin:
        with pytest.raises(NoManager, match="start it with `sllmctl serve`"):
            await twin.ask(client.status())


def test_a_manager_that_is_silent(directory: Path) -> None:
    path = directory / "admin.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)
        settings = ClientSettings(connect_s=60.0, answer_s=0.05)
        with AdminClient(path, settings) as admin, pytest.raises(NoManager, match="did not answer in time"):
            admin.ask(client.status())


def test_a_manager_that_breaks_off(directory: Path) -> None:
    path = directory / "admin.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)
        breaker = threading.Thread(target=_break_off, args=(listener,))
        breaker.start()
        with AdminClient(path, _SETTINGS) as admin, pytest.raises(NoManager, match="broke off"):
            admin.ask(client.status())
        breaker.join()


def _break_off(listener: socket.socket) -> None:
    """Close every connection as soon as something is said on it."""
    said = b""
    while not said:
        connection, _ = listener.accept()
        with connection:
            said = connection.recv(1)


@pytest.mark.parametrize("kind", [AdminClient, AsyncAdminClient])
def test_no_certificates_are_read_for_a_socket_without_tls(
    kind: type[AdminClient | AsyncAdminClient], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("certificates were read")

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", read)
    kind(directory / "admin.sock", ClientSettings())


def test_another_users_socket(directory: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from schema.errors import Unauthorised;"
        "from sllmctl.client import AdminClient, status; from sllmctl.config import ClientSettings\n"
        "admin = AdminClient(Path(sys.argv[1]), ClientSettings())\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: admin.ask(status())\n"
        "except Unauthorised as error: print(error)"
    )
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(directory / "admin.sock"))
        (directory / "admin.sock").chmod(0)
        foreign.listen(1)
        said = subprocess.run(
            [sys.executable, "-c", program, directory / "admin.sock"], capture_output=True, text=True, timeout=60
        )
    assert "another user's" in said.stdout, said.stderr
