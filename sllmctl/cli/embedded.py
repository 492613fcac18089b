"""A manager started for the dashboard when none answers: `sllmctl serve` as a child that may outlive us."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from schema.errors import InvalidInput, SllmError, TimedOut, Unreachable

if TYPE_CHECKING:
    from schema.admin import StatusView

__all__ = ["EmbeddedManager"]

_ANSWERS_S = 60.0
_STOP_S = 60.0
_POLL_S = 0.05
_LOG_LINES = 12


class EmbeddedManager:
    """``flags`` are those given before the command; its log is ``log``. It has a session of its own, so that the terminal's
    signals do not reach it."""

    def __init__(self, flags: Sequence[str], log: Path) -> None:
        self._flags, self.log = list(flags), log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises InvalidInput when its log cannot be written."""
        root = str(Path(__file__).resolve().parents[2])
        known = os.environ.get("PYTHONPATH")
        try:
            self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            log = self.log.open("wb")
        except OSError as error:
            raise InvalidInput(f"cannot write the manager's log {self.log}: {error.strerror}", "state_dir") from error
        with log:
            self._process = subprocess.Popen(
                # -P: the user's directory may hold packages of our names.
                [sys.executable, "-P", "-m", "sllmctl", *self._flags, "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root},
                start_new_session=True,
            )

    def wait(self, ask_status: Callable[[], StatusView], waiting: Callable[[], None]) -> None:
        """Until it answers. Raises SllmError, with the end of its log, when it has ended, TimedOut when it takes too long."""
        assert self._process is not None
        deadline = time.monotonic() + _ANSWERS_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise SllmError(
                    f"the manager ended with exit code {self._process.returncode}; its log ends:\n{self._log_end()}"
                )
            with contextlib.suppress(Unreachable):
                ask_status()
                return
            waiting()
            time.sleep(_POLL_S)
        raise TimedOut(f"the manager did not answer within {_ANSWERS_S:g} s; its log is {self.log}")

    def end(self, how: Literal["drain", "stop"], waiting: Callable[[], None]) -> None:
        """Ask it to end, its requests first under "drain", and wait. Raises TimedOut; it then goes on ending by itself."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        hurried = how == "drain"
        while self._process.poll() is None:
            if not hurried and time.monotonic() > deadline - _STOP_S + 0.2:
                # It takes a second signal as "do not wait".
                self._process.send_signal(signal.SIGTERM)
                hurried = True
            if time.monotonic() > deadline:
                raise TimedOut(f"the manager (process {self._process.pid}) is still stopping; its log is {self.log}")
            waiting()
            time.sleep(_POLL_S)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _log_end(self) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        except OSError:
            return ""
