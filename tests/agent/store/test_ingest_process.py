"""The ingest child as a process: frames on standard output, cancel, kill, a full disk, a hub."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from agent.config import NodeConfig
from agent.store import catalog
from agent.store.ingest.hub import fetch
from schema.link import Committing, FrameDecoder, OperationDone, Progress
from schema.spec import HubSource, PathSource, Source
from tests.checkpoints import make_llama_dir

pytestmark = pytest.mark.slow

MAIN = "import sys; from agent.store.ingest.command import main; sys.exit(main(*sys.argv[1:]))"
UNCHECKED = """
from agent.store.ingest import convert
from schema.memory import StepCosts
costs = StepCosts(token_bytes=1, layer_kv_bytes=1, item_bytes=4, vocab_size=1)
convert.check_runnable = lambda facts, tensors: (tensors, {}, costs)
"""


class Node:
    """A run and data directory, and ingest children in it."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(dir="/tmp", prefix="sl"))
        self.configure()
        self.data = self.root / "data"
        self.children: list[subprocess.Popen[bytes]] = []

    def configure(self, **settings: Any) -> None:
        config = NodeConfig(run_dir=str(self.root), data_dir=str(self.root / "data"), **settings)
        (self.root / "node.json").write_bytes(msgspec.json.encode(config))

    def start(self, source: Source, *, checked: bool = False, before: str = "", **options: Any) -> subprocess.Popen[bytes]:
        """An ingest. Only one that is ``checked`` builds its model, for which it imports torch and transformers; that takes
        many times as long as all else that it does."""
        code = before + MAIN if checked else UNCHECKED + before + MAIN
        arguments = [sys.executable, "-c", code, str(self.root), "op1", msgspec.json.encode(source).decode()]
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, **options)
        self.children.append(child)
        return child

    def finish(self, child: subprocess.Popen[bytes]) -> tuple[int, list[Progress], OperationDone]:
        out, _ = child.communicate(timeout=100)
        *said, done = FrameDecoder[Any](Progress | Committing | OperationDone).feed(out)
        steps = [each for each in said if isinstance(each, Progress)]
        assert isinstance(done, OperationDone)
        assert done.op == "op1"
        return child.returncode, steps, done

    def nothing_left(self) -> bool:
        tmp, checkpoints = self.data / "tmp", self.data / "checkpoints"
        return not any(list(path.iterdir()) for path in (tmp, checkpoints) if path.exists())

    def close(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait(30)
            assert child.stdout is not None
            child.stdout.close()
        shutil.rmtree(self.root)


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


def large(path: Path) -> Path:
    return make_llama_dir(path, hidden=512, heads=8, layers=6, vocab=4000)


def test_frames_of_a_success(node: Node, tmp_path: Path) -> None:
    code, steps, done = node.finish(node.start(PathSource(str(large(tmp_path / "m"))), checked=True))
    assert (code, done.fault) == (0, None)
    assert list(catalog.scan(node.data / "checkpoints")) == [done.digest]
    assert steps
    assert all(step.stage == "ingest" and 0 < step.done_bytes <= step.total_bytes for step in steps)


def test_frames_of_a_failure(node: Node, tmp_path: Path) -> None:
    code, steps, done = node.finish(node.start(PathSource(str(tmp_path / "nowhere"))))
    assert code == 1
    assert steps == []
    assert done.fault is not None
    assert done.fault.code == "not_found"


def test_what_would_pass_the_disks_budget_is_refused_with_what_is_missing(node: Node, tmp_path: Path) -> None:
    source = PathSource(str(large(tmp_path / "m")))
    need = sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    node.configure(disk_bytes=need + need // 2)
    assert node.finish(node.start(source))[2].fault is None
    other = PathSource(str(make_llama_dir(tmp_path / "n", hidden=512, heads=8, layers=6, vocab=4000, seed=9)))
    _, steps, done = node.finish(node.start(other))
    assert done.fault is not None
    assert done.fault.code == "out_of_space"
    assert need // 3 < done.fault.short_bytes < need
    assert steps == []
    assert list((node.data / "tmp").iterdir()) == []
    assert len(catalog.scan(node.data / "checkpoints")) == 1
    node.configure(disk_bytes=need + need // 2 + done.fault.short_bytes + (1 << 20))
    assert node.finish(node.start(other))[2].fault is None


def test_source_that_is_none(node: Node) -> None:
    arguments = [sys.executable, "-c", MAIN, str(node.root), "op1", '{"kind": "ftp"}']
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    node.children.append(child)
    _, _, done = node.finish(child)
    assert done.fault is not None
    assert done.fault.code == "invalid_input"


def test_sigterm_cancels_and_leaves_what_the_next_one_goes_on_with(node: Node, tmp_path: Path) -> None:
    source = PathSource(str(large(tmp_path / "m")))
    child = node.start(source)
    assert child.stdout is not None
    head = os.read(child.stdout.fileno(), 1 << 16)
    child.send_signal(signal.SIGTERM)
    rest, _ = child.communicate(timeout=60)
    *_, done = FrameDecoder[Any](Progress | Committing | OperationDone).feed(head + rest)
    if done.fault is None:  # it was over before the signal came
        assert child.returncode == 0
    else:
        assert (child.returncode, done.fault.code) == (1, "cancelled")
        assert not list((node.data / "checkpoints").glob("*/*"))
        assert all("+" in path.name for path in (node.data / "tmp").iterdir())
        assert node.finish(node.start(source))[2].fault is None
        assert list((node.data / "tmp").iterdir()) == []


TIDIES_LATE = """
import contextlib, os, sys
real = convert.kept_directory

@contextlib.contextmanager
def kept_directory(*arguments):
    with real(*arguments) as path:
        yield path
        os.write(2, b"committed")
        sys.stdin.read()

convert.kept_directory = kept_directory
"""


def test_sigterm_after_the_commit_comes_too_late(node: Node, tmp_path: Path) -> None:
    source = PathSource(str(make_llama_dir(tmp_path / "m")))
    child = node.start(source, before=TIDIES_LATE, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stderr is not None
    assert child.stderr.read(len(b"committed")) == b"committed"
    child.send_signal(signal.SIGTERM)
    code, _, done = node.finish(child)
    assert (code, done.fault) == (0, None)
    assert list(catalog.scan(node.data / "checkpoints")) == [done.digest]
    assert list((node.data / "tmp").iterdir()) == []


def test_what_is_killed_after_the_commit_has_said_what_it_commits(node: Node, tmp_path: Path) -> None:
    source = PathSource(str(make_llama_dir(tmp_path / "m")))
    child = node.start(source, before=TIDIES_LATE, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stderr is not None
    assert child.stderr.read(len(b"committed")) == b"committed"
    child.kill()
    out, _ = child.communicate(timeout=60)
    *_, said = FrameDecoder[Any](Progress | Committing | OperationDone).feed(out)
    assert list(catalog.scan(node.data / "checkpoints")) == [said.digest]


def test_sigterm_during_a_download_waits_for_nothing(node: Node, hub: tuple[dict[str, str], list[str]]) -> None:
    environment, requested = hub
    Hub.held.clear()
    Hub.asked.clear()
    try:
        child = node.start(HubSource("org/name"), env=environment)
        assert Hub.asked.wait(60), requested
        child.send_signal(signal.SIGTERM)
        code, _, done = node.finish(child)
    finally:
        Hub.held.set()
    assert code == 1
    assert done.fault is not None
    assert done.fault.code == "cancelled"


def test_an_ingest_whose_agent_has_gone_ends_in_a_plain_line(
    node: Node, hub: tuple[dict[str, str], list[str]], tmp_path: Path
) -> None:
    environment, requested = hub
    Hub.held.clear()
    try:
        with (tmp_path / "log").open("wb") as log:
            child = node.start(HubSource("org/name"), env=environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}, stderr=log)
            assert Hub.asked.wait(60), requested
            assert child.stdout is not None
            child.stdout.close()
            assert child.wait(60) == 1, "it hears of that while it has nothing to say"
    finally:
        Hub.held.set()
    said = (tmp_path / "log").read_text()
    assert "the agent that asked for this has gone" in said
    assert "Traceback" not in said


def test_a_killed_ingest_is_gone_on_with(node: Node, tmp_path: Path) -> None:
    source = PathSource(str(large(tmp_path / "m")))
    child = node.start(source)
    assert child.stdout is not None
    os.read(child.stdout.fileno(), 1)
    lines = 0
    while child.poll() is None and lines < 3:
        for journal in (node.data / "tmp").glob("ingest+*/journal"):
            with contextlib.suppress(FileNotFoundError):
                lines = journal.read_bytes().count(b"\n")
    child.kill()
    child.communicate()
    code, steps, done = node.finish(node.start(source))
    assert (code, done.fault) == (0, None)
    assert list((node.data / "tmp").iterdir()) == []
    assert len(catalog.scan(node.data / "checkpoints")) == 1
    if done.note:  # something was complete when it was killed
        assert "bytes were there of an ingest that had been broken off" in done.note
        assert steps[-1].stage == "ingest, resumed"


def test_what_was_broken_off_counts_and_goes_when_room_is_needed(node: Node, tmp_path: Path) -> None:
    model = large(tmp_path / "m")
    need = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    left = node.data / "tmp" / "ingest+other"
    left.mkdir(parents=True)
    (left / "p.bin").write_bytes(b"x" * need)
    node.configure(disk_bytes=need + need // 2)
    assert node.finish(node.start(PathSource(str(model))))[2].fault is None
    assert not left.exists()


def test_two_ingests_of_one_model_agree(node: Node, tmp_path: Path) -> None:
    source = PathSource(str(large(tmp_path / "m")))
    ends = [node.finish(child) for child in [node.start(source), node.start(source)]]
    assert [code for code, _, _ in ends] == [0, 0]
    assert len({done.digest for _, _, done in ends}) == 1
    assert list((node.data / "tmp").iterdir()) == []


def test_file_size_limit_is_a_full_disk(node: Node, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    code, _, done = node.finish(node.start(PathSource(str(large(tmp_path / "m"))), preexec_fn=limit))
    assert code == 1
    assert done.fault is not None
    assert done.fault.code == "out_of_space"
    assert node.nothing_left()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_small_disk_is_full(node: Node, tmp_path: Path) -> None:
    node.data.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(node.data)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code, _, done = node.finish(node.start(PathSource(str(large(tmp_path / "m")))))
        assert code == 1
        assert done.fault is not None
        assert done.fault.code == "out_of_space"
        assert node.nothing_left()
    finally:
        subprocess.run(["umount", str(node.data)], check=True)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub's HTTP interface as a download uses, over one directory."""

    source: Path
    requested: list[str]
    refused: tuple[int, str] | tuple[()] = ()
    """How files are refused, if they are: the status, and the hub's word for it."""
    held = threading.Event()
    """While it is not set, weights are asked for in vain."""
    held.set()
    asked = threading.Event()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.requested.append(path)
        files = {file.name: file.read_bytes() for file in self.source.iterdir()}
        files["model/../../../climbs.safetensors"] = b"not asked for"
        if path.startswith("/api/models/org/name-of-list"):
            self.answer(b"[]")
        elif path.startswith("/api/models/org/name-of-page"):
            self.answer(b"<html>")
        elif path.startswith("/api/models/org/name-of-sizes"):
            self.answer(json.dumps({"id": "org/name", "siblings": [{"rfilename": "model.safetensors", "size": "12"}]}).encode())
        elif path.startswith("/api/models/org/name/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()[:40]}
                for name, data in files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self.answer(json.dumps({"id": "org/name", "sha": "a" * 40, "siblings": siblings}).encode())
        elif self.refused and path.startswith("/org/name/resolve/"):
            self.send_response(*self.refused[:1])
            self.send_header("X-Error-Code", *self.refused[1:])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path.startswith("/org/name/resolve/") and path.rpartition("/")[2] in files:
            if path.endswith(".safetensors") and self.command == "GET":
                self.asked.set()
                self.held.wait(60)
            self.answer(files[path.rpartition("/")[2]])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{sha256(data).hexdigest()[:40]}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # of a client that was cancelled
                self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class names it
        return


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    source = make_llama_dir(tmp_path / "hub", shards=2)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    requested: list[str] = []
    handler = type("Handler", (Hub,), {"source": source, "requested": requested})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        "HF_HUB_ETAG_TIMEOUT": "60",
        "NO_PROXY": "127.0.0.1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    yield environment, requested
    server.shutdown()
    thread.join()
    server.server_close()


def test_model_of_a_hub(
    node: Node, hub: tuple[dict[str, str], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    environment, requested = hub
    code, _, done = node.finish(node.start(HubSource("org/name"), checked=True, env=environment))
    assert (code, done.fault) == (0, None)
    code, _, local = node.finish(node.start(PathSource(str(tmp_path / "hub"))))
    assert local.digest == done.digest
    assert not any("pytorch_model.bin" in path for path in requested)
    assert "Fetching" not in capfd.readouterr().err, "a progress bar in a log"
    assert list((node.data / "tmp").iterdir()) == []


def test_model_that_a_hub_does_not_have(node: Node, hub: tuple[dict[str, str], list[str]]) -> None:
    _, _, done = node.finish(node.start(HubSource("org/other"), env=hub[0]))
    assert done.fault is not None
    assert done.fault.code == "not_found"
    assert "check the name, or set HF_TOKEN" in done.fault.message
    assert node.nothing_left()


@pytest.mark.parametrize("name", ["name-of-list", "name-of-page", "name-of-sizes"])
def test_what_answers_as_no_hub_does(node: Node, hub: tuple[dict[str, str], list[str]], name: str) -> None:
    _, _, done = node.finish(node.start(HubSource(f"org/{name}"), env=hub[0]))
    assert done.fault is not None
    assert done.fault.code == "unreachable"
    assert f"org/{name} at main does not answer as a hub does" in done.fault.message
    assert node.nothing_left()


@pytest.mark.parametrize("repo", ["org/name.git", "org/a--name"])
def test_a_name_that_no_model_of_a_hub_can_have(node: Node, hub: tuple[dict[str, str], list[str]], repo: str) -> None:
    _, _, done = node.finish(node.start(HubSource(repo), env=hub[0]))
    assert done.fault is not None
    assert done.fault.code == "invalid_input", done.fault
    assert repo in done.fault.message
    assert hub[1] == [], "nobody was asked"
    assert node.nothing_left()


@pytest.mark.parametrize(
    ("status", "word", "code"),
    [(403, "GatedRepo", "unauthorised"), (401, "RepoNotFound", "not_found"), (410, "", "unreachable")],
)
def test_what_a_hub_refuses_of_a_model_that_it_lists_is_no_fault_of_the_disk(
    node: Node, hub: tuple[dict[str, str], list[str]], monkeypatch: pytest.MonkeyPatch, status: int, word: str, code: str
) -> None:
    monkeypatch.setattr(Hub, "refused", (status, word))
    _, _, done = node.finish(node.start(HubSource("org/name"), env=hub[0]))
    assert done.fault is not None
    assert done.fault.code == code, done.fault
    assert "org/name at main" in done.fault.message


def test_a_mistake_of_ours_is_not_said_to_be_the_hubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    sizes = SimpleNamespace(rfilename="model.safetensors", size=12)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=None, siblings=[sizes]))

    def mistaken(need_bytes: int) -> int:
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        fetch(HubSource("org/name"), tmp_path, lambda done, total: None, mistaken)


def test_hub_that_does_not_answer(node: Node) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    _, _, done = node.finish(node.start(HubSource("org/name"), env=environment))
    assert done.fault is not None
    assert done.fault.code == "unreachable"
