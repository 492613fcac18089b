"""A real manager with its local node in a scratch directory: processes, sockets and files as an admin would have them.

Used by the end-to-end tests and the benchmarks. Nothing here knows how the product works inside, but for the files an admin
can read: the agent's roster (pids) and the logs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "sllmctl" / "bundled" / "docs-2m"
START_S = 180.0


class Cluster:
    """One manager at a time over one scratch directory; leaving the context stops all and checks that nothing is left.

    It begins with the state and the data of the stopped cluster ``like``, if one is given, but without its logs.
    """

    def __init__(
        self,
        *,
        arena_bytes: int = 256 << 20,
        settings: str = "",
        entry: tuple[str, ...] = ("-m", "sllmctl"),
        like: Cluster | None = None,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(dir="/tmp", prefix="sl"))
        if like is not None:
            shutil.copytree(like.directory / "state", self.directory / "state")
            shutil.copytree(like.directory / "data", self.directory / "data", ignore=shutil.ignore_patterns("log"))
        self.entry = entry
        self.config = self.directory / "config.toml"
        self.config.write_text(
            f'state_dir = "{self.directory}/state"\n'
            '[api]\nhost = "127.0.0.1"\nport = 0\n'
            f'[node]\nrun_dir = "{self.directory}/run"\ndata_dir = "{self.directory}/data"\narena_bytes = {arena_bytes}\n'
            + settings
        )
        self.manager: subprocess.Popen[bytes] | None = None
        self.admin_socket = self.directory / "state" / "admin.sock"
        transport = httpx.HTTPTransport(uds=str(self.admin_socket))
        self.admin = httpx.Client(transport=transport, base_url="http://sllmctl/admin/v1", timeout=120)
        self.url = ""

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.admin.close()
        try:
            if self.manager is not None and self.manager.poll() is None:
                self.stop()
        finally:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Start a manager and wait until it is ready."""
        self.manager = self.spawn()
        status = self.until(self.ready_status, "the manager is ready", START_S)
        self.url = status["api_url"]

    def spawn(self, *flags: str) -> subprocess.Popen[bytes]:
        with (self.directory / "manager.log").open("ab") as log:
            args = [sys.executable, *self.entry, "--config", str(self.config), "serve", *flags]
            # Tests say themselves when weights come into DRAM.
            environment = {"SLLM_CONTROL_PREFETCH_EVERY_S": "0"} | os.environ
            return subprocess.Popen(
                args, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def ready_status(self) -> dict[str, Any] | None:
        assert self.manager is not None
        if self.manager.poll() is not None:
            raise AssertionError(f"the manager ended with {self.manager.returncode}:\n{self.log()}")
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            # A refused connection leaks its socket in the HTTP library, so whether anybody listens is found out by hand.
            probe.connect(str(self.admin_socket))
            answer = self.admin.get("/status")
            if answer.status_code == 200 and answer.json()["ready"]:
                status: dict[str, Any] = answer.json()
                return status
        return None

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, and wait for the end; the manager stops its agent first. Returns the exit code."""
        assert self.manager is not None
        self.manager.send_signal(signal.SIGTERM)
        try:
            return self.manager.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the manager did not stop within {timeout_s} s:\n{self.log()}") from None

    def kill_manager(self) -> None:
        assert self.manager is not None
        self.manager.kill()
        self.manager.wait()

    # --- what an admin sees

    def get(self, path: str) -> Any:
        answer = self.admin.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: object = None) -> Any:
        answer = self.admin.post(path, json=body if body is not None else {})
        assert answer.status_code < 300, answer.text
        return answer.json() if answer.content else None

    def add_model(self, name: str = "docs", path: Path = BUNDLED, **spec: Any) -> None:
        """Register, wait for the ingest, deploy."""
        self.post("/models", {"name": name, "source": {"kind": "path", "path": str(path)}, **spec})
        model = self.until(lambda: self._ended_ingest(name), f"{name} is ingested", 240)
        assert model["state"] == "stopped", model
        self.post(f"/models/{name}/deploy")

    def _ended_ingest(self, name: str) -> dict[str, Any] | None:
        model: dict[str, Any] = self.get(f"/models/{name}")
        return None if model["state"] == "ingesting" else model

    def instances(self, model: str = "docs") -> list[dict[str, Any]]:
        return [item for item in self.get("/instances")["items"] if item["model"] == model]

    def ready_instance(self, model: str = "docs", timeout_s: float = 180) -> dict[str, Any]:
        """An instance that is ready, and that the node has stated in this manager's life: before, its pid is not known."""

        def ready() -> dict[str, Any] | None:
            return next((item for item in self.instances(model) if item["state"] == "ready" and item["pid"]), None)

        return self.until(ready, f"an instance of {model} is ready", timeout_s)

    def roster(self) -> dict[str, int]:
        """Pids of the node's living processes by role; a worker's role is ``worker:<instance>``."""
        try:
            entries = json.loads((self.directory / "run" / "roster.json").read_text())["processes"]
        except FileNotFoundError:
            return {}
        return {
            f"worker:{entry['instance']}" if entry["role"] == "worker" else entry["role"]: entry["pid"]
            for entry in entries
            if entry.get("pid")
        }

    def processes(self) -> list[int]:
        """Every process whose command line or environment names this scratch directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                named = str(self.directory).encode() in (entry / "cmdline").read_bytes()
                if named and "\nState:\tZ" not in (entry / "status").read_text():
                    found.append(int(entry.name))
        return found

    def log(self) -> str:
        paths = [self.directory / "manager.log", *sorted((self.directory / "data" / "log").glob("*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-6000:]}" for path in paths if path.exists())

    def until(self, probe: Callable[[], T | None], what: str, timeout_s: float) -> T:
        """The first result of ``probe`` that is not None or False; AssertionError with the logs after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        pause = 0.005
        while True:
            late = time.monotonic() > deadline
            result = probe()
            if result is not None and result is not False:
                return result
            if late:
                raise AssertionError(f"waited {timeout_s} s in vain until {what}:\n{self.log()}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)


def gone(pid: int) -> bool:
    """Whether a process has ended; init collects those whose parents have ended when it comes to it, or never."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.contextmanager
def killed_at_exit(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
