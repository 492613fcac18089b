"""A real agent with its real store, zygote and workers: every process killed, nothing lost, nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import NodeConfig
from schema.ids import Epoch, epoch_of
from schema.link import (
    Acked,
    EngineOptions,
    FileChunk,
    Ingest,
    InstanceUpdate,
    OperationDone,
    PlacementUpdate,
    ReadFile,
    Role,
    SamplingParams,
    Shutdown,
    StartInstance,
    StopInstance,
    Submit,
    TokenRun,
    Tokens,
    Welcome,
)
from schema.spec import PathSource
from schema.states import EndReason, InstanceState, Tier
from tests.agent.daemon.peers import Manager, alive, hello
from tests.checkpoints import make_llama_dir

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 60.0
LONG = 1 << 16
"""Tokens that no worker generates before a test that the machine lets wait has gone on."""


class Machine:
    """One node's directories and the agent that runs in them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = NodeConfig(
            run_dir=str(directory / "run"), data_dir=str(directory / "data"), arena_bytes=64 << 20, threads=1, adopt_s=WAIT_S
        )
        self.agent: subprocess.Popen[bytes] | None = None
        self.managers: list[Manager] = []
        self.generation = 0
        self.digest = ""
        self.seen: set[int] = set()

    def spawn(self) -> subprocess.Popen[bytes]:
        args = [sys.executable, "-m", "agent", "agent", "--config-json", msgspec.json.encode(self.config).decode()]
        with (self.directory / "agent.log").open("ab") as log:
            return subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)

    def start(self) -> None:
        self.agent = self.spawn()

    async def manager(self) -> Manager:
        """A newer manager that has the whole truth."""
        self.generation += 1
        manager = Manager()
        self.managers.append(manager)
        words = hello(Role.MANAGER, cluster="c1", generation=self.generation, node="n1")
        await manager.dial(self.config.socket_path, words)
        await manager.take(Welcome, timeout_s=WAIT_S)
        await asyncio.wait_for(manager.whole_truth(), WAIT_S)
        self.roster()
        return manager

    async def ingest(self, manager: Manager) -> str:
        source = make_llama_dir(self.directory / "model", eos=False, context=LONG)
        manager.send(Ingest(op="op_1", source=PathSource(str(source))))
        done = await manager.take(OperationDone, timeout_s=WAIT_S)
        assert done.fault is None, done
        return done.digest

    async def ready(self, manager: Manager, epoch: Epoch) -> StartInstance:
        options = EngineOptions(kv_bytes=36 << 20)
        start = StartInstance(instance="inst_1", epoch=epoch, model="m", digest=self.digest, devices=(0,), options=options)
        manager.send(start)
        while True:
            truth = await manager.instance_update(WAIT_S)
            assert truth.fault is None, (truth, self.log())
            if truth.state is InstanceState.READY and truth.epoch == epoch:
                self.roster()
                return start

    def roster(self) -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError):
            document: dict[str, Any] = json.loads((Path(self.config.run_dir) / "roster.json").read_bytes())
            found = {entry["role"]: entry.get("pid", 0) for entry in document["processes"]}
            self.seen.update(pid for pid in found.values() if pid)
            return found
        return {}

    def kill(self, role: str) -> int:
        pid = self.roster()[role]
        os.kill(pid, signal.SIGKILL)
        if role == "agent":
            assert self.agent is not None
            self.agent.wait()
        return pid

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def log(self) -> str:
        paths = [self.directory / "agent.log", *sorted((self.directory / "data" / "log").glob("*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in paths if path.exists())

    async def stop(self) -> int:
        assert self.agent is not None
        self.roster()
        self.agent.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.agent.wait, WAIT_S)

    def left(self) -> list[int]:
        return [pid for pid in self.seen if alive(pid)]

    def files(self) -> dict[str, int]:
        """Modes of the run directory and what is in it."""
        run = Path(self.config.run_dir)
        return {str(path.relative_to(run)): stat.S_IMODE(path.stat().st_mode) for path in (run, *run.iterdir())}

    def close(self) -> None:
        for manager in self.managers:
            manager.close()
        self.roster()
        if self.agent is not None and self.agent.poll() is None:
            self.agent.kill()
            self.agent.wait()
        for pid in self.seen:
            if alive(pid) and str(self.directory).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    made = Machine(Path(tempfile.mkdtemp(dir="/tmp", prefix="sl")))
    try:
        yield made
    finally:
        made.close()


def job(start: StartInstance, attempt: Epoch, max_tokens: int, generated: tuple[int, ...] = ()) -> Submit:
    return Submit(
        attempt=attempt,
        instance=start.instance,
        instance_epoch=start.epoch,
        request="req_1",
        model="m",
        prompt=(5, 6, 7),
        generated=generated,
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
    )


class Stream:
    """The tokens of one attempt, over any number of managers' connections."""

    def __init__(self, attempt: Epoch, position: int = 0) -> None:
        self.attempt = attempt
        self.ids: list[int] = [-1] * position
        self.reason: EndReason | None = None

    def take(self, run: TokenRun) -> None:
        assert run.start <= len(self.ids), "no gap"
        self.ids.extend(run.ids[len(self.ids) - run.start :])

    def adopt(self, manager: Manager) -> None:
        for stated in manager.attempts:
            if stated.submit.attempt == self.attempt:
                self.take(TokenRun(self.attempt, len(stated.submit.generated), stated.new_ids))
                self.reason = stated.end.reason if stated.end is not None else None

    async def read(self, manager: Manager, until: Callable[[Stream], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not until(self):
                frame = await manager.take(Tokens, timeout_s=WAIT_S)
                for run in frame.runs:
                    if run.attempt == self.attempt:
                        self.take(run)
                for end in frame.ends:
                    if end.attempt == self.attempt:
                        self.reason = end.reason
                manager.send(Acked(frame=frame.frame, ends=tuple(end.attempt for end in frame.ends)))


def ended(stream: Stream) -> bool:
    return stream.reason is not None


def has(count: int) -> Callable[[Stream], bool]:
    return lambda stream: len(stream.ids) >= count or ended(stream)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_nodes_whole_life_with_every_kill(machine: Machine) -> None:
    """One long walk rather than many tests: what takes the time is the start of the real processes."""
    machine.start()
    manager = await machine.manager()
    assert manager.truth.inventory.arena.id
    machine.digest = await machine.ingest(manager)
    manager.send(ReadFile(op="r", digest=machine.digest, file="tokenizer.json"))
    assert (await manager.take(FileChunk)).fault is None

    start = await machine.ready(manager, epoch_of(1, 1))
    undisturbed = Stream(epoch_of(1, 2))
    manager.send(job(start, undisturbed.attempt, 600))
    await undisturbed.read(manager, ended)
    assert (len(undisturbed.ids), undisturbed.reason) == (600, EndReason.LENGTH)

    # the store: another gets the arena back, the worker notices nothing
    stream = Stream(epoch_of(1, 3))
    manager.send(job(start, stream.attempt, 600))
    await stream.read(manager, has(5))
    before = len(manager.seen)
    killed = machine.kill("store")
    await stream.read(manager, ended)
    assert stream.ids == undisturbed.ids
    await machine.until(lambda: machine.roster().get("store", killed) != killed)
    if not any(isinstance(message, PlacementUpdate) for message in manager.seen[before:]):
        await manager.take(PlacementUpdate, timeout_s=WAIT_S)  # it has the arena: with its agent it would be gone

    # the zygote
    killed_zygote = machine.kill("zygote")

    # the agent: store and worker are adopted, the stream goes on from what the truth says
    worker = machine.roster()["worker"]
    stream = Stream(epoch_of(1, 4))
    manager.send(job(start, stream.attempt, 600))
    await stream.read(manager, has(5))
    store = machine.roster()["store"]
    machine.kill("agent")
    machine.start()
    manager = await machine.manager()
    (instance,) = manager.truth.instances
    assert (instance.state, instance.pid, instance.epoch) == (InstanceState.READY, worker, start.epoch)
    assert instance.phases is not None
    assert instance.phases.loaded_from is Tier.DISK
    stream.adopt(manager)
    await stream.read(manager, ended)
    assert (stream.ids, stream.reason) == (undisturbed.ids, EndReason.LENGTH)
    assert machine.roster()["store"] == store

    # the worker: its attempt is lost, its next life finds the weights in memory and goes on from the journal
    await machine.until(lambda: machine.roster().get("zygote", killed_zygote) != killed_zygote)
    stream = Stream(epoch_of(3, 1))
    manager.send(job(start, stream.attempt, LONG - 8))
    await stream.read(manager, has(5))
    machine.kill("worker")
    await stream.read(manager, ended)
    assert stream.reason is EndReason.LOST
    # Told before that end. What killed it only its parent surely knows, and that was the zygote that has gone.
    (stopped,) = (m.truth for m in manager.seen if isinstance(m, InstanceUpdate) and m.truth.state is InstanceState.STOPPED)
    assert stopped.fault is not None
    assert f"pid {worker}" in stopped.fault.message
    start = await machine.ready(manager, epoch_of(3, 2))
    known = stream.ids[:500]
    rest = Stream(epoch_of(3, 3), len(known))
    manager.send(job(start, rest.attempt, 600, tuple(known)))
    await rest.read(manager, ended)
    assert known + rest.ids[len(known) :] == undisturbed.ids
    again = await machine.manager()
    assert again.truth.instances[0].phases is not None
    assert (again.truth.instances[0].phases.loaded_from, again.truth.instances[0].phases.loaded_bytes) == (Tier.DRAM, 0)

    # a stop, then the end of all
    again.send(StopInstance(instance=start.instance, epoch=start.epoch, grace_s=1))
    await again.instance(InstanceState.STOPPED)
    start = await machine.ready(again, epoch_of(4, 1))
    assert await machine.stop() == 0, machine.log()
    assert machine.left() == []
    assert not machine.files().keys() & {"agent.sock", "agent.lock", "agent.token", "roster.json"}


@pytest.mark.slow
async def test_a_second_agent_is_refused_and_the_first_serves_on(machine: Machine) -> None:
    machine.start()
    await machine.manager()
    assert await asyncio.to_thread(machine.spawn().wait, WAIT_S) == 6
    assert "another agent" in machine.log()
    modes = machine.files()
    assert modes["."] == 0o700
    assert [modes[name] for name in ("agent.sock", "agent.token", "node.json", "roster.json")] == [0o600] * 4
    manager = await machine.manager()
    manager.send(Shutdown())
    assert machine.agent is not None
    assert await asyncio.to_thread(machine.agent.wait, WAIT_S) == 0
    assert machine.left() == []


@pytest.mark.parametrize(
    ("settings", "word"),
    [('{"run_dir": 5}', "run_dir"), ("{", "settings"), (f'{{"run_dir": "/{"x" * 120}", "data_dir": "/tmp"}}', "too long")],
)
def test_wrong_settings_are_refused_by_name(settings: str, word: str) -> None:
    args = [sys.executable, "-m", "agent", "agent", "--config-json", settings]
    answer = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert answer.returncode == 2
    assert word in answer.stderr
    assert "Traceback" not in answer.stderr
