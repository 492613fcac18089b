"""`sllmctl` alone, in a terminal: it starts a manager, shows it, and ends it on leaving."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import pytest

from tests.e2e.test_demo import ROOT, living

pytestmark = pytest.mark.slow
LIMIT_S = 240


def _read_until(terminal: int, *wanted: bytes) -> bytes:
    """What is written until all of these have been, in any order: what has not changed is not written again."""
    seen, deadline = b"", time.monotonic() + LIMIT_S
    while not all(word in seen for word in wanted):
        assert time.monotonic() < deadline, seen[-2000:]
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                seen += os.read(terminal, 65536)
            except OSError:
                break
    return seen


def test_it_starts_a_manager_shows_it_and_ends_it() -> None:
    directory = tempfile.mkdtemp(dir="/tmp", prefix="sd")
    config = Path(directory) / "config.toml"
    config.write_text(f'state_dir = "{directory}/st"\n[api]\nport = 0\n[node]\narena_bytes = 67108864\n')
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLLM_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "sllmctl", "--config", str(config)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environ, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        _read_until(ours, b"live", b"ready")
        os.write(ours, b"q")
        with contextlib.suppress(OSError):
            while select.select([ours], [], [], LIMIT_S)[0] and os.read(ours, 65536):
                pass
        assert process.wait(LIMIT_S) == 0
        assert living(directory) == []
        assert "ready; the API is at" in (Path(directory) / "st" / "manager.log").read_text()
    finally:
        process.kill()
        process.wait()
        for pid in living(directory):
            os.kill(pid, signal.SIGKILL)
        os.close(ours)
        shutil.rmtree(directory, ignore_errors=True)
