"""A subject: a process that answers lines of JSON. What it needs to become ready is not timed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Subject", "SubjectFailed"]

_ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 300.0


class SubjectFailed(Exception):
    """A subject ended, or answered nothing in time; says the end of its log."""


class Subject:
    """Started at once; `ready` waits. It is halted until it is asked: OpenMP's threads may spin for minutes when idle."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `close`
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "TOKENIZERS_PARALLELISM": "false", **environment}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=_ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self._is_ready = False

    def ready(self) -> None:
        if not self._is_ready:
            if not self._line("ready\n"):
                raise SubjectFailed(self._why())
            self._is_ready = True
            self._signal(signal.SIGSTOP)

    def ask(self, request: str) -> dict[str, Any]:
        self.ready()
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SubjectFailed(self._why()) from None
        line = self._line("{")
        if not line:
            raise SubjectFailed(self._why())
        self._signal(signal.SIGSTOP)
        return dict(json.loads(line))

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.communicate(timeout=5)
        self._signal(signal.SIGKILL)
        self._process.communicate()
        self._log.close()

    def _signal(self, number: int) -> None:
        """To it and to every process it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _line(self, begins: str) -> str:
        """The next line that begins so; what libraries print there is passed over. Empty when there is none."""
        assert self._process.stdout is not None
        timer = threading.Timer(_LIMIT_S, self._process.kill)
        timer.start()
        try:
            return next((line for line in self._process.stdout if line.startswith(begins)), "")
        finally:
            timer.cancel()

    def _why(self) -> str:
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        told = [each.strip() for each in self._log.read().splitlines() if each.strip()]
        return told[-1] if told else f"it ended with {self._process.returncode} and said nothing"
