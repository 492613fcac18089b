"""The agent of this machine as real processes: made, adopted, made again after a kill, ended, killed when it must be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from schema.errors import Conflict, Fault, TimedOut
from schema.nodesettings import NodeSettings
from sllmctl.control.events import FromNode, NodeLost
from sllmctl.nodes.links import Links
from sllmctl.nodes.local import LocalAgent, is_locked
from sllmctl.nodes.settings import LinkSettings, LocalSettings
from tests.sllmctl.nodes.fake_agent import WAIT_S, Recorder, fake_agent

COMMAND = (sys.executable, "-m", "tests.sllmctl.nodes.scripted_agent")


@pytest.fixture
def node(short_dir: Path) -> Iterator[NodeSettings]:
    """Where the agent under test lives; whatever is left of it in the end is killed by what its roster says."""
    settings = NodeSettings(run_dir=str(short_dir / "run"), data_dir=str(short_dir / "data"))
    yield settings
    for pid in roster(settings).values():
        if str(short_dir).encode() in cmdline(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def roster(node: NodeSettings) -> dict[str, int]:
    path = Path(node.run_dir) / "roster.json"
    if not path.exists():
        return {}
    return {entry["role"]: entry["pid"] for entry in json.loads(path.read_text())["processes"]}


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def log_of(node: NodeSettings) -> str:
    return (Path(node.data_dir) / "log" / "agent.log").read_text()


@contextlib.contextmanager
def locked_elsewhere(run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the agent's lock."""
    run_dir.mkdir(parents=True)
    command = ["flock", str(run_dir / "agent.lock"), "cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"locked\n")
        other.stdin.flush()
        other.stdout.readline()
        yield other


@asynccontextmanager
async def managed(local: LocalAgent, recorder: Recorder) -> AsyncIterator[Links]:
    links = Links(
        cluster="c", generation=1, software="t", router=recorder, post=recorder.post, settings=LinkSettings(), local=local
    )
    links.connect("n", local.address)
    try:
        yield links
    finally:
        await links.close()


async def test_an_agent_is_made_when_none_is_there_and_ends_when_told(node: NodeSettings) -> None:
    local = LocalAgent(node, command=COMMAND)
    async with managed(local, Recorder()) as links:
        await links.ready("n", WAIT_S)
        pid = roster(node)["agent"]
        assert os.getsid(pid) == pid
        config = json.loads(log_of(node).split("--config-json', '")[1].split("'")[0])
        assert (config["run_dir"], config["arena_bytes"]) == (node.run_dir, node.arena_bytes)
        assert await local.shutdown(WAIT_S) == ()
        assert not is_locked(Path(node.run_dir) / "agent.lock")
        assert cmdline(pid) == b""
        await local.ensure()
        assert roster(node)["agent"] == pid


async def test_a_living_agent_is_adopted_and_outlives_its_manager(node: NodeSettings) -> None:
    first = LocalAgent(node, command=COMMAND)
    async with managed(first, Recorder()) as links:
        await links.ready("n", WAIT_S)
        pid = roster(node)["agent"]
    second = LocalAgent(node, command=("/bin/false",))
    async with managed(second, Recorder()) as links:
        await links.ready("n", WAIT_S)
        assert roster(node)["agent"] == pid
        assert await second.shutdown(WAIT_S) == ()
        assert not is_locked(Path(node.run_dir) / "agent.lock")
    # Both managers are this one process: who made the agent collects its end.
    assert await first.shutdown(WAIT_S) == ()


async def test_a_killed_agent_is_made_again_at_once(node: NodeSettings) -> None:
    recorder = Recorder()
    local = LocalAgent(node, command=COMMAND)
    async with managed(local, recorder) as links:
        await links.ready("n", WAIT_S)
        await recorder.until(FromNode)
        pid = roster(node)["agent"]
        os.kill(pid, signal.SIGKILL)
        await recorder.until(NodeLost)
        await recorder.until(FromNode)
        assert roster(node)["agent"] != pid
        assert await local.shutdown(WAIT_S) == ()


async def test_an_agent_that_keeps_dying_is_made_ever_more_seldom(node: NodeSettings, caplog: pytest.LogCaptureFixture) -> None:
    """The first death costs no wait; the second one waits for longer than this test."""
    caplog.set_level("INFO", "sllmctl.local")
    local = LocalAgent(node, LocalSettings(respawn_first_s=1000.0, respawn_longest_s=1000.0), ("/bin/false",))
    async with managed(local, Recorder()) as links:
        async with asyncio.timeout(WAIT_S):
            while caplog.text.count("started the local agent") < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        with pytest.raises(TimedOut, match="ended with 1"):
            await links.ready("n", 0.7)
    assert caplog.text.count("started the local agent") == 2


async def test_a_command_that_is_not_there_is_a_failure_that_is_said(node: NodeSettings) -> None:
    local = LocalAgent(node, command=("/nonexistent/agent",))
    await local.ensure()
    assert local.failure is not None
    assert "No such file" in local.failure
    assert await local.shutdown(WAIT_S) == ()


async def test_a_log_that_cannot_be_written_is_named_and_not_the_interpreter(node: NodeSettings) -> None:
    local = LocalAgent(node, command=COMMAND)
    (log := Path(node.data_dir) / "log" / "agent.log").mkdir(parents=True)
    await local.ensure()
    assert local.failure is not None
    assert str(log) in local.failure
    assert sys.executable not in local.failure


async def test_a_lock_that_cannot_be_looked_at_is_a_failure_that_is_said_and_passes(node: NodeSettings) -> None:
    lock = Path(node.run_dir) / "agent.lock"
    lock.mkdir(parents=True)
    local = LocalAgent(node, command=COMMAND)
    async with managed(local, Recorder()) as links:
        with pytest.raises(TimedOut, match="Is a directory"):
            await links.ready("n", 1.0)
        lock.rmdir()
        await links.ready("n", WAIT_S)
        assert await local.shutdown(10) == ()


async def test_an_agent_that_does_not_end_is_killed_with_its_kin_and_nobody_else(node: NodeSettings) -> None:
    local = LocalAgent(node, command=(*COMMAND, "--deaf", "--kin"))
    async with managed(local, Recorder()) as links:
        await links.ready("n", WAIT_S)
        pids = roster(node)
        killed = await local.shutdown(0.1)
    assert sorted(killed) == sorted([f"agent {pids['agent']}", f"store {pids['store']}"])
    assert not is_locked(Path(node.run_dir) / "agent.lock")
    assert [cmdline(pids[role]) for role in ("agent", "store")] == [b"", b""]


async def test_the_agent_of_another_manager_is_a_conflict_and_is_left_alone(node: NodeSettings) -> None:
    with locked_elsewhere(Path(node.run_dir)) as other:
        local = LocalAgent(node, command=("/bin/false",))
        async with fake_agent(Path(node.run_dir) / "agent.sock") as agent, managed(local, Recorder()) as links:
            refusing = asyncio.create_task(agent.refuse(Fault("conflict", "this agent belongs to cluster x")))
            with pytest.raises(Conflict, match="cluster x"):
                await links.ready("n", WAIT_S)
            await refusing
            assert await local.shutdown(WAIT_S) == ()
        assert other.poll() is None


async def test_the_package_beside_this_manager_is_what_is_run(node: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in the working directory, ``-m agent`` finds the right package."""
    stray = Path(node.run_dir).parent / "agent"
    stray.mkdir()
    (stray / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(stray.parent)
    local = LocalAgent(node, command=(sys.executable, "-c", "import agent; print(agent.__file__)"))
    await local.ensure()
    await local.shutdown(WAIT_S)
    assert Path(log_of(node).strip()) == Path(__file__).parents[3] / "agent" / "__init__.py"
