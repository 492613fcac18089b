"""The single file, built once and run where there is a Python of its version and nothing else."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_START_S, _BUILD_S = 180.0, 600.0
_ALONE = "a node on this machine needs"


class Bare:
    """A machine with a Python and a user who has nothing yet: no variables, a HOME of its own."""

    def __init__(self, home: Path, file: Path) -> None:
        self.home, self.file, self.state = home, file, home / "state"
        binaries = Path(sys.base_prefix) / "bin"
        self.environment = {"HOME": str(home), "PATH": f"{binaries}:/usr/bin:/bin", "TERM": "xterm-256color", "LANG": "C.UTF-8"}

    def command(self, *arguments: str) -> list[str]:
        return [str(self.file), "--state-dir", str(self.state), *arguments]

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=self.environment,
        )  # fmt: skip

    def run(self, *arguments: str, code: int = 0) -> str:
        process = self.popen(*arguments)
        out, err = process.communicate(timeout=_START_S)
        assert process.returncode == code, out + err
        return out


@pytest.fixture(scope="module")
def bare() -> Iterator[Bare]:
    with tempfile.TemporaryDirectory(prefix="slb", dir="/tmp") as directory:
        home, file = Path(directory, "home"), Path(directory, "bin", "sllmctl")
        home.mkdir()
        said = subprocess.run(
            [ROOT / "install.sh", "bundle", file], env={**os.environ, "SLLM_VENV": sys.prefix},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_BUILD_S,
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        assert [path.name for path in file.parent.iterdir()] == ["sllmctl"], "nothing else is left beside it"
        yield Bare(home, file)


def until(what: Callable[[], bool], seconds: float = _START_S) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_file_is_the_manager_its_commands_and_its_dashboard(bare: Bare) -> None:
    first = [bare.popen("version") for _ in range(2)]
    for process in first:
        out, err = process.communicate(timeout=_START_S)
        assert (process.returncode, err) == (0, ""), "the first starts, both at once"
        assert "single file, unpacked in " + str(bare.home / ".cache" / "sllmctl" / "bundle-") in out
    (cache,) = (bare.home / ".cache" / "sllmctl").iterdir()
    older = cache.with_name("bundle-000000000000")
    older.mkdir()
    os.utime(older, (0, 0))

    assert "sllmctl doctor" in bare.run("--help")
    assert "_SLLMCTL_COMPLETE=bash_complete" in bare.run("completion", "bash")
    assert "opt-30b-gsm8k" in bare.run("simulate", "--list"), "data files come along"
    assert bare.run("model", "ls", code=3) == ""

    manager = bare.popen("serve", "--port", "0", "--arena", "64MiB")
    try:
        until((bare.state / "admin.sock").exists)
        until(lambda: _status(bare) is not None)
        assert json.loads(bare.run("model", "ls", "-o", "json")) == []
        assert [node["name"] for node in json.loads(bare.run("node", "ls", "-o", "json"))] == ["local"]
        assert not older.exists()
        status = _status(bare)
        assert status is not None
        metrics = httpx.get(f"{status['api_url']}/metrics", timeout=60)
        assert metrics.status_code == 200
        assert "sllm_" in metrics.text
        findings = {each["check"]: each for each in json.loads(bare.run("doctor", "-o", "json"))}
        assert (findings["python"]["level"], findings["manager"]["level"]) == ("ok", "warn")
        assert "manager alone" in findings["agent"]["message"]
        assert "live" in _first_screen(bare)
    finally:
        manager.send_signal(signal.SIGTERM)
        _, said = manager.communicate(timeout=_START_S)
    assert manager.returncode == 0
    assert said.count(_ALONE) >= 1
    assert "Traceback" not in said
    assert not _descendants(cache), "nothing is left running"


def test_what_it_cannot_do_there_is_said(bare: Bare) -> None:
    process = bare.popen("demo")
    _, err = process.communicate(timeout=_START_S)
    assert (process.returncode, "the demo needs numpy, torch" in err) == (2, True)
    nowhere = {**bare.environment, "PATH": "/nowhere"}
    said = subprocess.run(
        ["/bin/sh", bare.file, "version"], env=nowhere | {"PEX_ROOT": "/nowhere"}, capture_output=True, text=True
    )
    assert said.returncode == 1
    assert f"python{sys.version_info[0]}.{sys.version_info[1]}\n" in said.stderr


def _status(bare: Bare) -> dict[str, str] | None:
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(bare.state / "admin.sock")), timeout=60) as client:
            found: dict[str, str] = client.get("http://sllmctl/admin/v1/status").json()
            return found
    except httpx.TransportError:
        return None


def _first_screen(bare: Bare) -> str:
    """What the dashboard draws until it is live, without the terminal's sequences; it is left with q."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(bare.file, bare.command("tui"), {**bare.environment, "LINES": "24", "COLUMNS": "100"})
    drawn, text, deadline = b"", "", time.monotonic() + _START_S
    try:
        while "live" not in text and time.monotonic() < deadline:
            if select.select([terminal], [], [], 1.0)[0]:
                drawn += os.read(terminal, 65536)
                text = re.sub(r"\x1b\[[0-9;?<>=]*[a-zA-Z]", "", drawn.decode(errors="replace"))
        os.write(terminal, b"q")
        while True:
            try:
                if not os.read(terminal, 65536):
                    break
            except OSError:
                break  # its other side is closed
    finally:
        _, code = os.waitpid(pid, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(code) == 0, text
    return text


def _descendants(cache: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(cache).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found
