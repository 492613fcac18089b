"""`wait --for`: what it waits for, what ends it, and how it exits."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from msgspec.structs import replace

from schema.admin import FailingView, PublicationView
from schema.errors import Fault
from schema.states import InstanceState, NodeState, RequestState, TierState
from sllmctl.cli import wait, waiting
from sllmctl.cli.main import run
from sllmctl.client import AdminClient, Call, NoManager, transport
from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import CHECKPOINTS, INSTANCES, MODELS, NODES, OPERATIONS, REQUESTS, FakeManager

_CHECKPOINT = CHECKPOINTS[0]
_WHOLE = replace(_CHECKPOINT, placements=tuple(replace(each, state=TierState.RESIDENT) for each in _CHECKPOINT.placements))
_PUBLISHED = replace(_CHECKPOINT, publications=(PublicationView(url="file:///a", layout="exec1", published_at=1.0),))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "_LOOK_S", 0.001)
    # A busy machine may take its time for the last answer, too.
    monkeypatch.setattr(transport, "_LEAST_S", 60.0)


@pytest.mark.parametrize(
    ("target", "condition", "before", "after"),
    [
        ("node/gpu1", "ready", NODES[1], replace(NODES[1], state=NodeState.READY)),
        ("node/local", "drained", NODES[0], replace(NODES[0], instances=0)),
        ("node/local", "unreachable", NODES[0], NODES[1]),
        ("node/local", "removed", NODES[0], None),
        ("instance/inst_1", "ready", replace(INSTANCES[0], state=InstanceState.STARTING), INSTANCES[0]),
        ("instance/inst_1", "stopped", INSTANCES[0], None),
        ("checkpoint/qwen", "on=local:dram", _CHECKPOINT, _WHOLE),
        ("checkpoint/qwen", "published", _CHECKPOINT, _PUBLISHED),
        ("checkpoint/qwen", "removed", _CHECKPOINT, None),
        ("operation/op_1", "ended", replace(OPERATIONS[0], ended_at=None), OPERATIONS[0]),
        ("request/req_2", "running", replace(REQUESTS[1], state=RequestState.WAITING), REQUESTS[1]),
        ("request/req_2", "ended", REQUESTS[1], REQUESTS[0]),
    ],
)
def test_it_waits_until_it_is_so(
    sllmctl: Sllmctl, manager: FakeManager, target: str, condition: str, before: Any, after: Any
) -> None:
    noun, _, name = target.partition("/")
    path = f"GET {noun}s/{name}"
    manager.answer(path, 200, before)
    manager.answer(path, 200, before)
    if after is None:
        manager.refuse(path, 404, "not_found", "gone")
    else:
        manager.answer(path, 200, after)
    said = sllmctl("wait", target, "--for", condition, "--timeout", "600")
    assert (said.code, said.out, said.err) == (0, "", f"{target}: {condition}\n")
    assert len(manager.asked) == 3


def test_models_are_waited_for_one_after_the_other(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("GET models/coming", 202, MODELS[2])
    manager.answer("GET models/coming", 200, MODELS[0])
    assert sllmctl("wait", "model/qwen", "model/coming", "--for", "ready").code == 0
    assert [path.split("&")[0] for _, path, _ in manager.asked] == [
        "models/qwen?wait=ready",
        "models/coming?wait=ready",
        "models/coming?wait=ready",
    ]
    assert sllmctl("wait", "model/nobody", "--for", "removed").code == 0


def test_a_wait_that_ran_out_says_for_how_long_it_was(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("GET models/qwen", 202, MODELS[0])
    ended = sllmctl("wait", "model/qwen", "--for", "ready", "--timeout", "0.0125")
    assert (ended.code, "model qwen is not ready after 0.0125 s" in ended.err) == (7, True), ended.err


def test_a_wait_for_a_model_without_a_place_says_why(sllmctl: Sllmctl, manager: FakeManager) -> None:
    manager.answer("GET models/qwen", 202, msgspec.structs.replace(MODELS[0], instances={}, no_place="there is no node"))
    ended = sllmctl("wait", "model/qwen", "--for", "ready", "--timeout", "0.01")
    assert (ended.code, "is not ready after 0.01 s: there is no node; it goes on" in ended.err) == (7, True), ended.err


def test_a_wait_for_a_model_whose_instance_fails_says_why(sllmctl: Sllmctl, manager: FakeManager) -> None:
    fault = Fault("out_of_space", "no room")
    failing = FailingView(instance="inst_1", node="local", state=InstanceState.BACKOFF, fault=fault, retry_at=None)
    manager.answer("GET models/qwen", 202, replace(MODELS[0], instances={"backoff": 1}, failing=failing))
    ended = sllmctl("wait", "model/qwen", "--for", "ready", "--timeout", "0.01")
    assert (ended.code, "is not ready after 0.01 s: no room; it goes on" in ended.err) == (7, True), ended.err


@pytest.mark.parametrize(
    ("target", "condition", "code", "said"),
    [
        ("node/gpu1", "ready", 7, "error: node gpu1 is not ready after 0.01 s"),
        ("operation/op_9", "ended", 5, "there is no operation 'op_9'"),
        ("operation/op_2", "ended", 1, "partition_0.bin"),
        ("node/gpu1", "redy", 2, "did you mean 'ready'?"),
        ("nodes/gpu1", "ready", 2, "did you mean 'node'?"),
        ("node", "ready", 2, "write node/NAME"),
        ("checkpoint/qwen", "on=local", 2, "wait for on=NODE:disk|dram|device, published, removed"),
        ("checkpoint/qwen", "on=NODE:disk|dram|device", 2, "is never"),
        ("qwen", "ready", 2, "'qwen' does not say of what it is the name; write model/qwen, or another of"),
        ("checkpoint/qwen", "on=local:attic", 2, "wait for on=NODE:disk|dram|device, published, removed"),
    ],
)
def test_what_cannot_come_ends_it(sllmctl: Sllmctl, target: str, condition: str, code: int, said: str) -> None:
    ended = sllmctl("wait", target, "--for", condition, "--timeout", "0.01")
    assert (ended.code, said in ended.err) == (code, True), ended.err


def test_an_instance_that_failed_will_not_be_ready(sllmctl: Sllmctl, manager: FakeManager) -> None:
    fault = Fault("out_of_space", "no room")
    manager.answer("GET instances/inst_1", 200, replace(INSTANCES[0], state=InstanceState.FAILED, fault=fault))
    ended = sllmctl("wait", "instance/inst_1", "--for", "ready")
    assert (ended.code, ended.err) == (1, "error: instance inst_1: no room\n")


def test_each_of_several_is_waited_for_and_a_fault_says_whose_it_is(sllmctl: Sllmctl, manager: FakeManager) -> None:
    ended = sllmctl("wait", "operation/op_2", "operation/op_9", "operation/op_1", "--for", "ended")
    assert ended.code == 1
    fault, unknown, good = ended.err.splitlines()
    assert fault.startswith("error: operation op_2: partition_0.bin: the 4194304 bytes")
    assert (unknown, good) == ("error: there is no operation 'op_9'", "operation/op_1: ended")


# --- a manager that is not there


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="sl") as directory:
        yield Path(directory) / "admin.sock"


def _leave_behind(path: Path) -> None:
    """A socket whose manager died."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


@pytest.mark.parametrize("target", ["node/local", "model/qwen"])
@pytest.mark.parametrize("left_behind", [False, True])
def test_a_manager_that_is_not_there_yet_is_waited_for(
    sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch, socket_path: Path, target: str, left_behind: bool
) -> None:
    if left_behind:
        _leave_behind(socket_path)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            socket_path.unlink(missing_ok=True)
            socket_path.symlink_to(manager.socket)

    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    monkeypatch.setenv("SLLM_ADMIN_SOCKET", str(socket_path))
    said = sllmctl("wait", target, "--for", "ready", "--timeout", "600")
    assert (said.code, said.err) == (0, f"{target}: ready\n")
    assert len(naps) == 3


@pytest.mark.parametrize("target", ["node/local", "model/qwen"])
def test_a_manager_that_goes_meanwhile_is_waited_for(
    sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    asked: list[str] = []

    def ask(admin: AdminClient, call: Call[Any]) -> Any:
        asked.append(call.path)
        if len(asked) in (2, 3):
            raise NoManager("it restarts")
        return real(admin, call)

    real = AdminClient.ask
    noun, _, name = target.partition("/")
    manager.answer(f"GET {noun}s/{name}", *((202, MODELS[2]) if noun == "model" else (200, NODES[1])))
    manager.answer(f"GET {noun}s/{name}", 200, MODELS[0] if noun == "model" else NODES[0])
    monkeypatch.setattr(AdminClient, "ask", ask)
    monkeypatch.setattr(waiting, "_AGAIN_S", 0.001)
    said = sllmctl("wait", target, "--for", "ready", "--timeout", "600")
    assert (said.code, said.err, len(asked)) == (0, f"{target}: ready\n", 4)


def test_a_manager_that_does_not_come_in_time(sllmctl: Sllmctl, monkeypatch: pytest.MonkeyPatch, socket_path: Path) -> None:
    monkeypatch.setenv("SLLM_ADMIN_SOCKET", str(socket_path))
    said = sllmctl("wait", "node/local", "--for", "ready", "--timeout", "0.0125")
    assert said.code == 7
    assert "no manager answers at" in said.err
    assert "`sllmctl serve` (0.0125 s were waited)" in said.err


@contextlib.contextmanager
def _hanging(path: Path) -> Iterator[None]:
    """A manager that takes every connection, and never answers."""
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(path))
        hung.listen(64)
        yield


@pytest.mark.parametrize(
    "command",
    [
        "wait node/local node/gpu1 --for ready",
        "wait model/qwen model/coming --for ready",
        "model add qwen ORG/NAME --deploy",
        "model deploy qwen --wait",
        "model scale qwen --min 1",
        "model stop qwen coming -y --wait",
        "model rm qwen -y",
        "checkpoint prefetch qwen",
        "checkpoint verify qwen --no-wait",
        "checkpoint publish qwen",
        "checkpoint fetch qwen",
        "checkpoint rm qwen -y",
        "checkpoint rm qwen",
        "apply -f SPEC",
    ],
)
def test_a_manager_that_hangs_is_waited_for_no_longer_than_was_said(
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    socket_path: Path,
    tmp_path: Path,
    command: str,
) -> None:
    spec = tmp_path / "model.yaml"
    spec.write_text("name: qwen\nsource: {kind: hub, repo: ORG/NAME}\n")
    patience: list[httpx.Timeout] = []
    real = httpx.Client.request

    def request(client: httpx.Client, *args: Any, timeout: httpx.Timeout, **more: Any) -> httpx.Response:
        patience.append(timeout)
        return real(client, *args, timeout=timeout, **more)

    monkeypatch.setattr(httpx.Client, "request", request)
    monkeypatch.setattr(transport, "_LEAST_S", 0.01)
    monkeypatch.setenv("SLLM_ADMIN_SOCKET", str(socket_path))
    with _hanging(socket_path):
        code = run([*(str(spec) if word == "SPEC" else word for word in command.split()), "--timeout", "0.1"])
    said = capsys.readouterr().err
    assert code == 7, said
    assert "did not answer in time" in said
    assert "(0.1 s were waited)" in said
    assert said.count("error:") == 1, "it was asked for something else afterwards"
    for each in patience:
        assert each.read is not None
        assert each.read <= 0.1


def test_what_is_no_socket_is_not_waited_for(sllmctl: Sllmctl, monkeypatch: pytest.MonkeyPatch, socket_path: Path) -> None:
    socket_path.write_text("a note")
    for path, why in ((socket_path, "is no socket"), (socket_path / "below", "Not a directory")):
        monkeypatch.setenv("SLLM_ADMIN_SOCKET", str(path))
        said = sllmctl("wait", "node/local", "--for", "ready", "--timeout", "600")
        assert (said.code, why in said.err) == (3, True), said.err


def test_another_users_manager_is_not_waited_for(alone: None, socket_path: Path) -> None:
    program = (
        "import os, sys; from sllmctl.cli.main import run; os.environ['HOME'] = '/tmp/nowhere'\n"
        "words = ['wait', 'node/local', '--for', 'ready', '--timeout']\n"
        "early = run(['--socket', '/tmp/nowhere/admin.sock', *words, '0.001'])\n"  # which imports all that root alone may read
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "print(early, run(['--socket', sys.argv[1], *words, '600']))"
    )
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(socket_path))
        socket_path.chmod(0)
        foreign.listen(1)
        said = subprocess.run([sys.executable, "-c", program, socket_path], capture_output=True, text=True, timeout=60)
    assert said.stdout == "7 4\n", said.stderr
    assert "another user's" in said.stderr


def test_what_a_manager_says_of_something_unreachable_is_not_taken_for_its_absence(
    sllmctl: Sllmctl, manager: FakeManager
) -> None:
    fault = Fault("unreachable", "its node went away")
    manager.answer("GET instances/inst_1", 200, replace(INSTANCES[0], state=InstanceState.FAILED, fault=fault))
    manager.refuse("GET models/qwen", 503, "unreachable", "its node went away")
    for target in ("instance/inst_1", "model/qwen"):
        ended = sllmctl("wait", target, "--for", "ready", "--timeout", "600")
        assert (ended.code, ended.err) == (3, "error: its node went away\n")
