"""Keeps one process of a role running: adopts the one that lives, makes another when it is gone, backs off when it crashes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from agent.config import NodeConfig
from agent.daemon.connection import Connection
from agent.daemon.files import is_locked
from agent.daemon.process import Process, describe_status
from agent.daemon.roster import Roster, RosterEntry
from schema.errors import Conflict
from schema.link import Message, Ping, Shutdown
from schema.pauses import growing_pause_s

__all__ = ["KILL_S", "TERM_S", "Kin", "Spawn", "log_path", "spawn_kin", "spawn_process"]

Spawn = Callable[[NodeConfig, str], int]
"""Starts the process of a role ("store" or "zygote") and returns its pid. Raises OSError."""

SHUTDOWN_S: Final = 3.0
"""From `Shutdown` to SIGTERM."""
TERM_S: Final = 3.0
"""From SIGTERM to SIGKILL."""
KILL_S: Final = 5.0
"""How long a killed process may take to be gone: the kernel frees its memory first."""
STABLE_S: Final = 10.0
"""One that lived so long is made again at once."""
_FIRST_DELAY_S: Final = 0.1
_LONGEST_DELAY_S: Final = 10.0
_log = logging.getLogger(__name__)


def log_path(config: NodeConfig, name: str) -> Path:
    return config.log_path / f"{name}.log"


def spawn_process(args: list[str], log: Path) -> int:
    """Start a process in a session of its own, without input, its output in ``log``. Returns its pid. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return os.posix_spawn(args[0], args, os.environ, file_actions=actions, setsid=True)


def spawn_kin(config: NodeConfig, role: str) -> int:
    """The product's Spawn."""
    return spawn_process([sys.executable, "-m", "agent", role, "--run-dir", config.run_dir], log_path(config, role))


class Kin:
    """The one process of a role. `run` is its whole care; `claim` is called when a process of the role dials."""

    def __init__(self, role: str, config: NodeConfig, roster: Roster, spawn: Spawn) -> None:
        self.role = role
        self.connection: Connection | None = None
        self._config = config
        self._roster = roster
        self._spawn = spawn
        self._process: Process | None = None
        self._dialled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def adopt(self, entry: RosterEntry | None) -> None:
        """Take over what an earlier life of the agent left, if it lives."""
        process = entry.open() if entry is not None else None
        if process is not None:
            self._take(process)
        elif entry is not None:
            self._roster.remove(entry)

    def start(self) -> asyncio.Task[None]:
        """Begin to care for the process; the task ends only with `stop`, or by an error."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"supervise {self.role}")
        return self._task

    def claim(self, connection: Connection, pid: int) -> None:
        """A process of this role has dialled; it replaces its own earlier connection. Raises Conflict if it is another one."""
        if self._process is not None and self._process.alive and self._process.pid != pid:
            raise Conflict(f"process {self._process.pid} is this agent's {self.role}, not {pid}")
        if self._process is None or not self._process.alive:
            process = Process.open(pid)
            if process is None:
                raise Conflict(f"no process {pid} is alive here")
            self._take(process)
        if self.connection is not None:
            self.connection.close("it dialled again")
        self.connection = connection
        self._dialled.set()

    def disclaim(self, connection: Connection) -> bool:
        """A connection is lost; True if it was the present one."""
        if self.connection is not connection:
            return False
        self.connection = None
        self._dialled.clear()
        return True

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Say something to it, if it is there. ``descriptors`` are duplicated."""
        if self.connection is None:
            return False
        self.connection.send(message, descriptors)
        return True

    async def stop(self) -> None:
        """End the process, by word, then by signal, and wait until it is proven dead."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))  # what it may have failed by is told by whoever watches it
        process = self._process
        if process is None:
            return
        told = self.send(Shutdown())
        if (not told or not await process.wait(SHUTDOWN_S)) and not await process.end(TERM_S, KILL_S):
            _log.error("the %s (pid %d) could not be killed", self.role, process.pid)
            return
        self._gone()

    async def _run(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        if self._process is None and is_locked(self._config.lock_path(self.role)):
            await self._wait_dialled(self._config.adopt_s)
        limit_s = self._config.spawn_s
        if self._process is not None:  # an earlier agent may have made it only just now
            limit_s = max(self._config.adopt_s, limit_s - self._process.age_s)
        while True:
            began = loop.time()
            process = self._process or self._make()
            if process is not None:
                await self._watch(process, limit_s)
                self._gone()
            limit_s = self._config.spawn_s
            failures = 0 if loop.time() - began >= STABLE_S else failures + 1
            if failures > 1:
                await asyncio.sleep(growing_pause_s(_FIRST_DELAY_S, _LONGEST_DELAY_S, failures - 2))

    async def _watch(self, process: Process, limit_s: float) -> None:
        dead = asyncio.ensure_future(process.died.wait())
        dialled = asyncio.ensure_future(self._dialled.wait())
        try:
            await asyncio.wait((dead, dialled), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not dead.done() and not dialled.done():
                _log.error("the %s (pid %d) has not dialled within %g s; it is ended", self.role, process.pid, limit_s)
                await process.end(TERM_S, KILL_S)
            while not dead.done():
                await self._hear(process, dead)
            await dead
        finally:
            dead.cancel()
            dialled.cancel()

    async def _hear(self, process: Process, dead: asyncio.Future[Any]) -> None:
        """Ask whether it still answers, and end one that has not for ``hang_s``, or that dials no more."""
        hang_s = self._config.hang_s
        connection, asked_at = self.connection, asyncio.get_running_loop().time()
        if connection is not None:
            connection.send(Ping(nonce=0))
        for _ in range(4):
            await asyncio.wait((dead,), timeout=hang_s / 4)
            if dead.done() or (connection is not None and connection.heard_at >= asked_at):
                return
            if self.connection is not connection:
                return
        _log.error("the %s (pid %d) has not answered for %g s; it is ended", self.role, process.pid, hang_s)
        await process.end(TERM_S, KILL_S)

    async def _wait_dialled(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._dialled.wait(), timeout_s)

    def _make(self) -> Process | None:
        try:
            pid = self._spawn(self._config, self.role)
        except OSError as error:
            _log.error("cannot start the %s: %s", self.role, error)
            return None
        process = Process.open(pid)
        if process is None:
            with contextlib.suppress(ChildProcessError):
                _, status = os.waitpid(pid, 0)
                _log.error("the %s (pid %d) %s at once", self.role, pid, describe_status(os.waitstatus_to_exitcode(status)))
            return None
        self._take(process)
        _log.info("the %s runs as pid %d", self.role, pid)
        return process

    def _take(self, process: Process) -> None:
        self._process = process
        self._roster.put(RosterEntry(role=self.role, pid=process.pid, ticks=process.ticks))

    def _gone(self) -> None:
        if self._process is None:
            return
        log = log_path(self._config, self.role)
        level = logging.INFO if self._stopping else logging.WARNING
        _log.log(level, "the %s (pid %d) %s; see %s", self.role, self.pid, describe_status(self._process.status), log)
        self._process = None
        self._dialled.clear()
        self._roster.remove(RosterEntry(role=self.role))
        if self.connection is not None:
            self.connection.close("its process is dead")
