"""The agent of this machine: adopted if it is there, made if it is not, and ended with everything it started.

Nothing of the agent is imported: it gets its settings as JSON, and is known by its lock, its roster and its socket, as
agent/config.py describes the run directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from schema.errors import InvalidInput, SllmError
from schema.link import ManagerMessage, Shutdown
from schema.nodesettings import NodeSettings
from schema.pauses import growing_pause_s
from sllmctl.nodes.settings import LocalSettings
from sllmctl.procstat import process_stat

__all__ = ["LocalAgent", "missing_node_packages", "need_memory", "need_node_packages", "node_processes"]

_NODE_PACKAGES = ("numpy", "torch", "transformers", "xxhash")
"""What the processes of a node import beside the manager's own packages; a single-file build holds none of them."""

log = logging.getLogger("sllmctl.local")


class LocalAgent:
    """``say`` is set by whoever holds the link to it; it returns False while that is down. ``command`` starts an agent, given
    ``--config-json``; by default the package beside this manager, with this interpreter."""

    def __init__(
        self, node: NodeSettings, settings: LocalSettings | None = None, command: tuple[str, ...] | None = None
    ) -> None:
        self.address = f"unix:{node.run_dir}/agent.sock"
        self.say: Callable[[ManagerMessage], bool] = lambda message: False
        self.failure: str | None = None
        self._node = node
        self._settings = settings or LocalSettings()
        self._command = command
        self._lock_path = Path(node.run_dir) / "agent.lock"
        self._roster_path = Path(node.run_dir) / "roster.json"
        self._log_path = Path(node.data_dir) / "log" / "agent.log"
        self._child: int | None = None
        self._spawned_at = 0.0
        self._spawn_after = 0.0
        self._early_deaths = 0
        self.ending = False
        self._busy = asyncio.Lock()

    async def ensure(self) -> None:
        """Called when its socket does not answer: make an agent unless one is starting, or lives and is only busy.

        Never raises for what is outside; ``failure`` says why there is none. One that dies again and again is made again
        with growing delays.
        """
        async with self._busy:
            if self.ending or self._child_lives() or time.monotonic() < self._spawn_after:
                return
            try:
                if is_locked(self._lock_path):
                    return
                self._child = await asyncio.to_thread(self._spawn)
            except (OSError, SllmError) as error:
                self._failed(f"the local agent cannot be started: {error}")
                self._delay()
                return
            self._spawned_at = time.monotonic()
            log.info("started the local agent, pid %d", self._child)

    async def shutdown(self, timeout_s: float) -> tuple[str, ...]:
        """End the agent with its store, zygote and workers, and wait until they are gone; it is not made again.

        The agent is the last of its processes to end, so its lock tells. What is left after ``timeout_s`` is killed. Returns
        what had to be killed, as "role pid"; empty after a clean end.
        """
        self.ending = True
        async with self._busy:
            asked = False  # and a spawn that was under way is over
        agents = [entry for entry in _read_roster(self._roster_path) if entry.role == "agent"]
        handles = [handle for entry in agents if (handle := _open_process(entry)) is not None]
        try:
            async with asyncio.timeout(timeout_s):
                # Its lock is free a moment before the process is gone.
                while self._child_lives() or is_locked(self._lock_path) or not all(_ended(handle) for handle in handles):
                    asked = asked or self.say(Shutdown())
                    if not asked and self._child is None:
                        # Never ours, and not to be spoken to: another manager's, perhaps.
                        log.warning("the local agent is not linked to this manager and is left as it is")
                        return ()
                    await asyncio.sleep(self._settings.poll_s)
        except TimeoutError:
            killed = await asyncio.to_thread(self._kill)
            self._child_lives()
            log.warning("the local agent did not end within %g s; killed: %s", timeout_s, ", ".join(killed) or "nothing")
            return killed
        finally:
            for handle in handles:
                os.close(handle)
        return ()

    def _child_lives(self) -> bool:
        """Look after the child that was spawned, if any: its end is collected, and decides when the next may be made."""
        if self._child is None:
            return False
        try:
            pid, status = os.waitpid(self._child, os.WNOHANG)
        except ChildProcessError:
            pid, status = self._child, 0
        if pid == 0:
            return True
        self._child = None
        code = os.waitstatus_to_exitcode(status)
        lived_s = time.monotonic() - self._spawned_at
        if not self.ending:
            self._failed(f"the local agent (pid {pid}) ended with {code} after {lived_s:.1f} s; see {self._log_path}")
            if lived_s >= self._settings.stable_s:
                self._early_deaths = 0
            self._delay()
        return False

    def _failed(self, why: str) -> None:
        if why != self.failure:
            log.error("%s", why)
        self.failure = why

    def _delay(self) -> None:
        """The first death costs no wait: it is the one that a running stream is waiting for."""
        settings = self._settings
        delay_s = 0.0
        if self._early_deaths:
            delay_s = growing_pause_s(settings.respawn_first_s, settings.respawn_longest_s, self._early_deaths - 1)
        self._early_deaths += 1
        self._spawn_after = time.monotonic() + delay_s

    def _spawn(self) -> int:
        """Start the agent in a session of its own, so that it outlives this manager; its pid. Raises OSError, SllmError."""
        command = self._command or _installed_agent()
        self._log_path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        config = msgspec.json.encode(self._node).decode()
        # Opened here: a file that a spawn cannot open for its child is told as an error of the program.
        output = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return os.posix_spawn(
                command[0],
                [*command, "--config-json", config],
                _environment(),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_DUP2, output, 2),
                ],
                setsid=True,
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM],
            )
        finally:
            os.close(output)

    def _kill(self) -> tuple[str, ...]:
        """Kill what the roster names, the agent first so that it makes nothing new, and wait for them to be gone."""
        killed: list[str] = []
        deadline = time.monotonic() + self._settings.kill_timeout_s
        child = self._child
        self._kill_all([] if child is None else [(f"agent {child}", os.pidfd_open(child))], deadline, killed)
        for agents in (True, False):
            known = [entry for entry in _read_roster(self._roster_path) if entry.pid != child]
            opened = [
                (f"{entry.role} {entry.pid}", _open_process(entry)) for entry in known if (entry.role == "agent") is agents
            ]
            self._kill_all([(name, handle) for name, handle in opened if handle is not None], deadline, killed)
        return tuple(killed)

    def _kill_all(self, handles: list[tuple[str, int]], deadline: float, killed: list[str]) -> None:
        for name, handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                killed.append(name)
        for name, handle in handles:
            if not _ended(handle, max(0.0, deadline - time.monotonic())):
                log.error("%s was killed and is still there", name)
            os.close(handle)


class _RosterEntry(msgspec.Struct, frozen=True):
    role: str
    pid: int = 0
    ticks: int = 0


class _Roster(msgspec.Struct, frozen=True):
    processes: tuple[_RosterEntry, ...] = ()


def node_processes(run_dir: Path) -> list[tuple[str, int]]:
    """Role and pid of the node's processes that are alive, by what its agent has written down."""
    found = []
    for entry in _read_roster(run_dir / "roster.json"):
        handle = _open_process(entry)
        if handle is not None:
            os.close(handle)
            found.append((entry.role, entry.pid))
    return found


def missing_node_packages() -> list[str]:
    """Those that the processes of a node import, and that are not installed beside this manager."""
    return [name for name in _NODE_PACKAGES if importlib.util.find_spec(name) is None]


def need_node_packages(who: str) -> None:
    """Raises InvalidInput, saying what ``who`` lacks, unless all of them are installed."""
    missing = missing_node_packages()
    if missing:
        raise InvalidInput(
            f"{who} needs {', '.join(missing)}, not installed with this sllmctl, which is a manager alone; "
            "./install.sh installs all that a node needs"
        )


def need_memory(node: NodeSettings) -> None:
    """Refuse budgets that this machine cannot have: its store would die of them again and again. Raises InvalidInput."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for key, size_bytes in (("node.arena_bytes", node.arena_bytes), ("node.device_bytes", node.device_bytes)):
        if size_bytes > whole:
            raise InvalidInput(f"{key} is {size_bytes} bytes, and this machine has {whole}; set it lower", key)


def is_locked(path: Path) -> bool:
    """True while some process holds the flock on ``path``. Raises OSError when that cannot be seen."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _installed_agent() -> tuple[str, ...]:
    """The command of the agent beside this manager. Raises InvalidInput when what its processes need is not installed."""
    need_node_packages("a node on this machine")
    return sys.executable, "-m", "agent", "agent"


def _environment() -> dict[str, str]:
    """This process's, with what makes ``-m agent`` find the package that belongs to this manager, and no other.

    A working directory with something called agent in it must not come first, hence the safe path.
    """
    spec = importlib.util.find_spec("agent")
    if spec is None or spec.origin is None:
        raise InvalidInput("the agent is not installed beside this manager; install it, or run a manager without a local node")
    root = str(Path(spec.origin).resolve().parent.parent)
    environment = dict(os.environ)
    environment["PYTHONSAFEPATH"] = "1"
    inherited = environment.get("PYTHONPATH", "")
    if root not in inherited.split(os.pathsep) and not root.startswith(sys.prefix + os.sep):
        environment["PYTHONPATH"] = os.pathsep.join(part for part in (root, inherited) if part)
    return environment


def _read_roster(path: Path) -> tuple[_RosterEntry, ...]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Roster).processes
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError) as error:
        log.error("the agent's roster %s cannot be read: %s", path, error)
        return ()


def _open_process(entry: _RosterEntry) -> int | None:
    """A descriptor of the process, if it is alive and surely the one that was written down."""
    if entry.pid <= 0:
        return None
    try:
        handle = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return None
    try:
        if process_stat(entry.pid).began_ticks == entry.ticks:
            return handle
    except ProcessLookupError:
        pass
    os.close(handle)
    return None


def _ended(handle: int, wait_s: float = 0.0) -> bool:
    """True if the process of this descriptor has ended, or does within ``wait_s``: then it can be read."""
    return bool(select.select([handle], [], [], wait_s)[0])
