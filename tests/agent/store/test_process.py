"""The store as a process, with a test in the agent's place: hand-over of the arena, truth, kills, grace, signals."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from agent.config import NodeConfig
from agent.native.calibration import Tuning
from agent.native.disk_record import DiskRecord, record_path
from schema.errors import Fault
from schema.link import (
    PROTOCOL,
    ArenaState,
    CancelFetch,
    Descriptors,
    DropResident,
    Evicted,
    Fetching,
    FetchStored,
    FillArena,
    FrameDecoder,
    Hello,
    HoldCheckpoint,
    Message,
    OperationDone,
    Ping,
    Pong,
    Progress,
    Refused,
    Resident,
    Role,
    Shutdown,
    StoreMessage,
    StoreTruth,
    Welcome,
    encode_frame,
)
from schema.states import Tier
from tests.agent.store.images import CHUNK, commit, read_image
from tests.remotes import NO_LIMIT, web_server

M = TypeVar("M")
WAIT_S = 60.0
MAIN = "import sys; from agent.store.process import main; sys.exit(main(sys.argv[1]))"


class Agent:
    """The agent's end: listens, starts stores, speaks frames."""

    def __init__(self, **settings: Any) -> None:
        self.root = Path(tempfile.mkdtemp(dir="/tmp", prefix="sl"))
        self.config = NodeConfig(
            run_dir=str(self.root),
            data_dir=str(self.root),
            **{"arena_bytes": 4 * CHUNK, "chunk_bytes": CHUNK, "reader_threads": 2} | settings,
        )
        (self.root / "node.json").write_bytes(msgspec.json.encode(self.config))
        self.config.token_path.write_text("kin")
        self.config.checkpoints_path.mkdir()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.config.socket_path))
        self.listener.listen()
        self.listener.settimeout(WAIT_S)
        self.stores: list[subprocess.Popen[bytes]] = []
        self.link: socket.socket | None = None
        self.arenas: list[int] = []

    def spawn(self) -> subprocess.Popen[bytes]:
        self.stores.append(subprocess.Popen([sys.executable, "-c", MAIN, str(self.root)]))
        return self.stores[-1]

    def accept(self, arena: int | None = None) -> tuple[Hello, StoreTruth]:
        """Takes the next connection, hands the arena over, and returns the truth; a new arena is appended to ``arenas``."""
        self.hang_up()
        self.link, _ = self.listener.accept()
        self.link.settimeout(WAIT_S)
        self.decoder: FrameDecoder[Any] = FrameDecoder(Hello | StoreMessage)
        self.inbox: list[Any] = []
        self.received: list[int] = []
        hello = self.next(Hello)
        self.send(Welcome(protocol=PROTOCOL, software="test", node="", pid=os.getpid(), descriptors=int(arena is not None)))
        if arena is not None:
            self.send(Descriptors(what="arena"), [arena])
        message = self.next(Descriptors, StoreTruth)
        if isinstance(message, Descriptors):
            assert message.what == "arena"
            self.arenas += self.received
            message = self.next(StoreTruth)
        return hello, message

    def hang_up(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None

    def send(self, message: Message, descriptors: list[int] | None = None) -> None:
        assert self.link is not None
        socket.send_fds(self.link, [encode_frame(message)], descriptors or [])

    def next(self, *kinds: Any) -> Any:
        """The next message of these kinds; Progress and ArenaState in between are passed over, anything else is a failure."""
        assert self.link is not None
        while True:
            while not self.inbox:
                data, descriptors, _, _ = socket.recv_fds(self.link, 1 << 16, 4)
                assert data, "the store hung up"
                self.received += descriptors
                self.inbox += self.decoder.feed(data)
            message = self.inbox.pop(0)
            if isinstance(message, kinds):
                return message
            assert isinstance(message, Progress | ArenaState), message

    def close(self) -> None:
        self.hang_up()
        self.listener.close()
        for store in self.stores:
            if store.poll() is None:
                store.kill()
            store.wait(WAIT_S)
        for descriptor in self.arenas:
            os.close(descriptor)
        shutil.rmtree(self.root)


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.close()


def fill(agent: Agent, number: int, size: int, op: str = "op", users: int = 1) -> tuple[str, Path, bytes]:
    made = commit(agent.config.checkpoints_path, number, size)
    agent.send(FillArena(op=op, digest=made[0], directory=f"{made[0]}/exec1", users=users))
    return made


def test_life_of_a_store(agent: Agent) -> None:
    store = agent.spawn()
    hello, truth = agent.accept()
    assert (hello.role, hello.token, hello.pid) == (Role.STORE, "kin", store.pid)
    assert truth.residents == ()
    assert truth.arena.budget_bytes == 4 * CHUNK
    assert truth.arena.reader in ("io_uring", "threads")
    digest, _, image = fill(agent, 1, 2 * CHUNK - 5)
    resident = agent.next(Resident)
    assert (resident.op, resident.digest, resident.users) == ("op", digest, 1)
    assert read_image(agent.arenas[0], resident) == image
    agent.send(DropResident(op="d1", digest=digest))
    assert agent.next(OperationDone).fault.code == "conflict"
    agent.send(HoldCheckpoint(digest=digest, users=0))
    other = fill(agent, 2, 3 * CHUNK, "op2")
    evicted = agent.next(Evicted)
    assert (evicted.digest, evicted.why, evicted.for_digest) == (digest, "to make room", other[0])
    assert agent.next(Resident).digest == other[0]
    agent.send(Ping(nonce=7))
    assert agent.next(Pong).nonce == 7
    agent.send(FillArena(op="op3", digest=digest, directory=f"../{digest}"))
    assert agent.next(OperationDone).fault.code == "invalid_input"
    agent.send(DropResident(op="d2", digest=digest))
    assert agent.next(OperationDone).fault.code == "not_found"
    agent.send(Shutdown())
    assert store.wait(WAIT_S) == 0


def test_killed_store_takes_its_arena_back_and_reads_nothing_again(agent: Agent) -> None:
    store = agent.spawn()
    _, first = agent.accept()
    digest, directory, image = fill(agent, 1, 2 * CHUNK)
    agent.next(Resident)
    store.kill()
    store.wait(WAIT_S)
    shutil.rmtree(directory)
    agent.spawn()
    _, truth = agent.accept(agent.arenas[0])
    assert truth.arena.id == first.arena.id
    assert len(agent.arenas) == 1
    (resident,) = truth.residents
    assert (resident.digest, resident.users) == (digest, 1)
    agent.send(FillArena(op="again", digest=digest, directory=f"{digest}/exec1"))
    answer = agent.next(Resident)
    assert (answer.op, answer.read_bytes) == ("again", 0)
    assert read_image(agent.arenas[0], answer) == image


def test_store_killed_while_it_fills_leaves_nothing_half(agent: Agent) -> None:
    store = agent.spawn()
    agent.accept()
    fill(agent, 1, 4 * CHUNK)
    agent.next(Progress)
    store.kill()
    store.wait(WAIT_S)
    agent.spawn()
    _, truth = agent.accept(agent.arenas[0])
    assert all(read_image(agent.arenas[0], each) for each in truth.residents)
    assert truth.arena.used_bytes in (0, 4 * CHUNK)
    assert truth.filling == ()


def test_store_outlives_its_agent_and_offers_its_arena(agent: Agent) -> None:
    agent.spawn()
    _, before = agent.accept()
    digest, _, image = fill(agent, 1, CHUNK)
    agent.next(Resident)
    _, kept = agent.accept(agent.arenas[0])
    assert len(agent.arenas) == 1, "an agent that holds this arena is not offered it"
    _, after = agent.accept()
    assert {kept.arena.id, after.arena.id} == {before.arena.id}
    assert kept.arena.used_bytes == after.arena.used_bytes == CHUNK  # its pages are still being touched: their count may differ
    assert len(agent.arenas) == 2, "an agent without an arena is offered it"
    assert read_image(agent.arenas[1], after.residents[0]) == image
    assert after.residents[0].digest == digest


def test_foreign_memory_is_refused_and_a_fresh_arena_made(agent: Agent) -> None:
    agent.spawn()
    foreign = os.memfd_create("foreign")
    os.ftruncate(foreign, 1 << 20)
    _, truth = agent.accept(foreign)
    os.close(foreign)
    assert len(agent.arenas) == 1
    assert truth.arena.used_bytes == 0


def test_command_before_the_announced_arena_closes_the_link(agent: Agent) -> None:
    agent.spawn()
    agent.accept()
    agent.send(Welcome(protocol=PROTOCOL, software="test", node="", pid=1, descriptors=1))
    agent.send(HoldCheckpoint(digest="0" * 64, users=0))
    assert agent.link is not None
    while agent.link.recv(1 << 16):  # what it says of its arena's pages may come before
        pass
    _, truth = agent.accept(agent.arenas[0])
    assert truth.residents == ()


def test_a_refused_store_ends(agent: Agent) -> None:
    store = agent.spawn()
    agent.accept()
    agent.send(Refused(fault=Fault("invalid_input", "upgrade the store")))
    assert store.wait(30) == 1


def test_store_ends_by_itself_without_an_agent() -> None:
    agent = Agent(agent_grace_s=5.0)  # which is also what this test has to welcome it
    try:
        store = agent.spawn()
        agent.accept()
        agent.hang_up()
        agent.listener.close()
        assert store.wait(WAIT_S) == 0
    finally:
        agent.close()


def test_sigterm_ends_it_at_once_also_during_a_fill(agent: Agent) -> None:
    store = agent.spawn()
    agent.accept()
    fill(agent, 1, 4 * CHUNK)
    store.send_signal(signal.SIGTERM)
    assert store.wait(WAIT_S) == 0


def test_second_store_of_a_run_directory_leaves(agent: Agent) -> None:
    agent.spawn()
    agent.accept()
    assert agent.spawn().wait(WAIT_S) == 6


def test_store_without_settings_says_so() -> None:
    with tempfile.TemporaryDirectory() as empty:
        result = subprocess.run([sys.executable, "-c", MAIN, empty], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "cannot read the node's settings" in result.stderr


def test_store_imports_no_torch() -> None:
    code = "import sys, agent.store.process; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_fetch_goes_to_disk_and_memory_and_on_after_a_kill(agent: Agent, tmp_path: Path) -> None:
    digest, directory, image = commit(tmp_path / "remote", 5, 3 * CHUNK)
    agent.spawn()
    agent.accept()
    with web_server(tmp_path / "remote") as web:
        web.limit_bytes = len(image) - web.block_bytes  # two of its three chunks at least are whole
        fetch = FetchStored(op="f1", digest=digest, url=web.url, in_memory=True, users=1)
        agent.send(fetch)
        assert agent.next(Fetching).in_memory
        while (step := agent.next(Progress)).done_bytes <= CHUNK:  # as long as the first chunk may not be whole
            assert (step.stage, step.source) == ("fetch", Tier.REMOTE)
        agent.stores[0].kill()
        agent.stores[0].wait()
        web.limit_bytes = NO_LIMIT
        agent.spawn()
        _, truth = agent.accept(agent.arenas[0])
        assert truth.residents == ()
        before = len(web.ranges)
        agent.send(fetch)
        coming = agent.next(Fetching)
        assert (coming.op, coming.digest, coming.layout, coming.in_memory) == ("f1", digest, "exec1", True)
        done = agent.next(OperationDone)
        assert (done.op, done.fault, done.layout) == ("f1", None, "exec1")
        assert CHUNK <= done.read_bytes < len(image), "what was there of the fetch before did not come from the remote"
        assert web.asked_bytes(before) < len(image)
        assert (agent.config.checkpoints_path / digest / "exec1" / "partition_0.bin").read_bytes() == image
        told = agent.next(Resident)
        assert (told.op, told.digest, told.users) == ("", digest, 1)
        agent.send(FillArena(op="f2", digest=digest, directory=f"{digest}/exec1"))
        resident = agent.next(Resident)
        assert resident.read_bytes == 0
        assert read_image(agent.arenas[0], resident) == image
        (directory / "manifest.json").unlink()
        agent.send(FetchStored(op="f3", digest="e" * 64, url=web.url))
        assert agent.next(OperationDone).fault.code == "not_found"
        agent.send(FetchStored(op="f4", digest="e" * 64, url=web.url))
        agent.send(CancelFetch(op="f4"))
        agent.send(Ping(nonce=1))
        assert agent.next(Pong, OperationDone) == Pong(nonce=1)


def test_the_disk_is_read_as_the_agent_found_it_best(agent: Agent, capfd: pytest.CaptureFixture[str]) -> None:
    store = agent.spawn()
    agent.accept()
    checkpoints = agent.config.checkpoints_path
    record = DiskRecord(str(checkpoints), checkpoints.stat().st_dev, time.time(), 3e9, Tuning(8 << 20, 16))
    record_path(agent.config.data_dir).write_bytes(msgspec.json.encode(record))
    digest, _, image = fill(agent, 1, 2 * CHUNK)
    resident = agent.next(Resident)
    assert resident.digest == digest
    assert read_image(agent.arenas[0], resident) == image
    agent.send(Shutdown())
    assert store.wait(WAIT_S) == 0
    assert "reading 16 blocks of 8388608 bytes at a time" in capfd.readouterr().err
