"""A manager with its node in a scratch directory, as `sllmctl demo` runs one: made, watched, and stopped without a trace."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from schema.errors import SllmError, TimedOut, Unreachable
from sllmctl.cli.diagnostics import note
from sllmctl.config import Settings

if TYPE_CHECKING:
    from schema.admin import StatusView

__all__ = ["ScratchManager"]

READY_S = 60.0
"""How long the manager may take until it and its node are ready."""
STOP_S = 40.0
"""How long it may take to stop after SIGTERM, before it is killed."""
GONE_S = 5.0
"""How long its node's processes may take to be gone once it has stopped, or once they are killed."""
_POLL_S = 0.05
_LOG_LINES = 20
_MARK = "SCRATCH_MANAGER"
"""The variable by which every descendant is known, whatever it has made of its command line."""

_CONFIG = """\
state_dir = "{directory}/state"

[api]
host = "127.0.0.1"
port = 0

[node]
run_dir = "{directory}/run"
data_dir = "{directory}/data"
arena_bytes = {arena_bytes}
manager_grace_s = 30
agent_grace_s = 10

[gateway]
drain_s = 2
"""


class ScratchManager:
    """`sllmctl serve` as a child in a session of its own, over one new directory; every path of it begins with ``directory``.

    The caller's SLLM_* variables do not reach it.
    """

    def __init__(self, arena_bytes: int) -> None:
        # Short, because unix sockets lie below it.
        self.directory = Path(tempfile.mkdtemp(prefix="sllm-", dir="/tmp"))
        self.config = self.directory / "config.toml"
        self.log = self.directory / "manager.log"
        self.config.write_text(_CONFIG.format(directory=self.directory, arena_bytes=arena_bytes))
        self.settings = Settings.load({}, {}, self.config)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SLLM_")}
        environ[_MARK] = str(self.directory)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sllmctl", "--config", str(self.config), "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The packages lie here, installed or in a checkout; the caller's own directory may hold others of these names.
                cwd=Path(__file__).resolve().parents[2],
                env=environ,
                start_new_session=True,
            )

    def wait_ready(self, ask_status: Callable[[], StatusView], waiting: Callable[[], None]) -> StatusView:
        """The status once manager and node are ready; ``waiting`` is called now and then until they are.

        Raises SllmError when the manager has ended, TimedOut when it is not ready in time.
        """
        assert self._process is not None
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise SllmError(f"the manager ended with exit code {self._process.returncode} before it was ready")
            with contextlib.suppress(Unreachable):
                status = ask_status()
                if status.ready and status.nodes_ready:
                    return status
            waiting()
            time.sleep(_POLL_S)
        raise TimedOut(f"the manager was not ready within {READY_S:g} s")

    def log_end(self) -> str:
        """The last lines of what the manager said."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        except OSError:
            return ""

    def stop(self, waiting: Callable[[], None]) -> list[int]:
        """Ask the manager to stop, wait, make sure that all is gone, remove the directory; ``waiting`` is called meanwhile.

        Returns the pids of what had to be killed: none if all went as it should. An interrupt does not wait, but still leaves
        nothing running.
        """
        killed: list[int] = []
        try:
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + STOP_S
                while self._process.poll() is None and time.monotonic() < deadline:
                    waiting()
                    time.sleep(_POLL_S)
            self._wait_gone()
        finally:
            killed = self.processes()
            for pid in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self._process is not None:
                self._process.wait()
            if self._wait_gone():
                shutil.rmtree(self.directory, ignore_errors=True)
            else:
                note(f"still running: {self.processes()}; the directory {self.directory} is kept")
        return killed

    def processes(self) -> list[int]:
        """Every living process that descends from `start`, or whose command line names the node's run directory."""
        marks = {"environ": os.fsencode(f"{_MARK}={self.directory}\0"), "cmdline": os.fsencode(f"{self.directory}/run")}
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            for file, mark in marks.items():
                with contextlib.suppress(OSError):
                    if mark in (entry / file).read_bytes():
                        found.append(int(entry.name))
                        break
        return found

    def _wait_gone(self) -> bool:
        deadline = time.monotonic() + GONE_S
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True
