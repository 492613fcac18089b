"""An agent with its peers around it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from agent.config import NodeConfig
from agent.daemon.agent import Agent
from agent.daemon.main import read_or_make_token
from agent.daemon.supervisor import spawn_process
from schema.link import (
    Hello,
    Ingest,
    Role,
    StartInstance,
    Welcome,
)
from schema.states import InstanceState
from tests.agent.daemon.peers.base import WAIT_S, Peer
from tests.agent.daemon.peers.manager import Manager
from tests.agent.daemon.peers.store import Store
from tests.agent.daemon.peers.words import hello, start_instance
from tests.agent.daemon.peers.worker import Worker
from tests.agent.daemon.peers.zygote import Zygote


class Node:
    """An agent in this process, whose kin are played here over real sleeping processes."""

    def __init__(self, directory: Path | None = None, **settings: Any) -> None:
        self.directory = directory or Path(tempfile.mkdtemp(dir="/tmp", prefix="sl"))
        # None of these is over because a loaded machine lets this process wait: a test that is about one sets it.
        settings = {"adopt_s": 600.0, "manager_grace_s": 600.0, "spawn_s": 600.0} | settings
        self.config = NodeConfig(run_dir=str(self.directory / "run"), data_dir=str(self.directory / "data"), **settings)
        for name in ("run", "data/checkpoints", "data/tmp", "data/log"):
            (self.directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.token = read_or_make_token(self.config.token_path)
        self.stores: list[Store] = []
        self.zygotes: list[Zygote] = []
        self.workers: list[Worker] = []
        self.managers: list[Manager] = []
        self.strangers: list[Peer] = []
        self.pids: list[int] = []
        self.worker_becomes_ready = True
        self.store_answers = True
        self.zygote_answers = True
        self.numerics = "torch 1"
        self.zygote_imported = asyncio.Event()
        self.zygote_imported.set()
        self.store_fetching: tuple[str, ...] = ()
        self.ingest_args: list[str] = ["/bin/false"]
        self.forked_args: list[str] = []
        self.kin_dial = True
        self.agent: Agent | None = None
        self.task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Node:
        self.begin()
        return self

    def begin(self) -> None:
        self.agent = Agent(self.config, self.token, spawn=self._spawn, ingest=self._ingest)
        self.task = asyncio.create_task(self.agent.run())

    async def __aexit__(self, *_: object) -> None:
        try:
            if self.task is not None and self.agent is not None:
                self.agent.shut_down()
                async with asyncio.timeout(WAIT_S):
                    await self.task
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            peers: list[Any] = [*self.stores, *self.zygotes, *self.workers, *self.managers, *self.strangers]
            for peer in peers:
                peer.close()
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)  # noqa: ASYNC222 - it was just killed
            shutil.rmtree(self.directory, ignore_errors=True)

    def change(self, **settings: Any) -> None:
        """Change settings of the agent that runs, for what it begins from now on."""
        for name, value in settings.items():
            msgspec.structs.force_setattr(self.config, name, value)

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for what has no event to await: it is looked at on every turn of the loop."""
        async with asyncio.timeout(WAIT_S):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    def go(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        return task

    def sleeper(self) -> int:
        pid = spawn_process(["/bin/sleep", "600"], self.directory / "data" / "log" / "sleeper.log")
        self.pids.append(pid)
        return pid

    def kin_hello(self, role: Role, **fields: Any) -> Hello:
        return hello(role, token=self.token, **fields)

    def _spawn(self, config: NodeConfig, role: str) -> int:
        pid = self.sleeper()
        if self.kin_dial:
            self.play(role, pid)
        return pid

    def play(self, role: str, pid: int) -> None:
        if role == "store":
            store = Store(self, pid)
            if self.stores:
                store.residents = dict(self.stores[-1].residents)
            self.stores.append(store)
            self.go(store.run())
        else:
            self.zygotes.append(Zygote(self, pid))
            self.go(self.zygotes[-1].run())

    def _ingest(self, config: NodeConfig, message: Ingest) -> list[str]:
        return [*self.ingest_args, message.op]

    async def manager(self, generation: int = 1, cluster: str = "c1", node: str = "n1") -> Manager:
        """A manager that has the node's whole truth."""
        manager = await self.dial_manager(generation, cluster, node)
        await manager.take(Welcome)
        await manager.whole_truth()
        return manager

    async def dial_manager(self, generation: int = 1, cluster: str = "c1", node: str = "n1", **fields: Any) -> Manager:
        manager = Manager()
        self.managers.append(manager)
        words = hello(Role.MANAGER, cluster=cluster, generation=generation, node=node, **fields)
        await manager.dial(self.config.socket_path, words)
        return manager

    async def ready(self, manager: Manager, start: StartInstance | None = None) -> tuple[StartInstance, Worker]:
        """An instance that is ready, and its worker."""
        start = start or start_instance()
        manager.send(start)
        await manager.instance(InstanceState.READY, start.epoch)
        return start, self.workers[-1]

    def roster(self) -> list[dict[str, Any]]:
        processes: list[dict[str, Any]] = msgspec.json.decode((self.directory / "run" / "roster.json").read_bytes())[
            "processes"
        ]
        return processes
