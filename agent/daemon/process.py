"""A process that is surely the one meant: held by a pidfd, told from a later one of the same pid by its start time."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Process", "become_subreaper", "describe_status", "reap_orphans", "start_ticks"]

_PR_SET_CHILD_SUBREAPER = 36
_log = logging.getLogger(__name__)


def start_ticks(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None when there is none, or only a zombie of it."""
    try:
        data = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = data[data.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def describe_status(status: int | None) -> str:
    """How a process ended, in words: an exit code, negative for a signal, None when nobody could tell."""
    if status is None:
        return "ended (its exit status is not known)"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
        return f"was killed by signal {-status}"
    return f"exited with status {status}"


def become_subreaper() -> None:
    """Orphans of the zygote become children of this process, so that their exit status can be read and no zombie stays."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        _log.warning("cannot adopt orphans: %s", os.strerror(ctypes.get_errno()))


def reap_orphans() -> None:
    """Collect whatever has ended and was left to this process, so that no zombie outlives it."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


class Process:
    """A living process under watch. ``died`` is set once it is proven dead; ``status`` is then its exit code, if known."""

    def __init__(self, pid: int, ticks: int, descriptor: int) -> None:
        self.pid = pid
        self.ticks = ticks
        self.status: int | None = None
        self.died = asyncio.Event()
        self._descriptor = descriptor
        self._heard: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(descriptor, self._ended)

    @classmethod
    def open(cls, pid: int, ticks: int | None = None) -> Process | None:
        """The process with this pid, if it is alive (and began at ``ticks``, where given)."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        except (OSError, OverflowError) as error:
            _log.error("cannot watch process %d: %s", pid, error)
            return None
        found = start_ticks(pid)
        if found is None or (ticks is not None and found != ticks):
            os.close(descriptor)
            return None
        return cls(pid, found, descriptor)

    @property
    def alive(self) -> bool:
        return not self.died.is_set()

    @property
    def age_s(self) -> float:
        """Since it began."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.ticks / os.sysconf("SC_CLK_TCK")

    def when_dead(self, call: Callable[[], None]) -> None:
        """Call once it is proven dead; at once if it is."""
        if self.died.is_set():
            call()
        else:
            self._heard.append(call)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this very process; nothing happens when it is dead."""
        if not self.died.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    async def wait(self, timeout_s: float) -> bool:
        """True when it is dead within ``timeout_s`` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.died.wait(), timeout_s)
        return self.died.is_set()

    async def end(self, term_s: float, kill_s: float) -> bool:
        """SIGTERM, SIGKILL after ``term_s``; True when it is dead within ``kill_s`` more."""
        self.signal(signal.SIGTERM)
        if await self.wait(term_s):
            return True
        self.signal(signal.SIGKILL)
        return await self.wait(kill_s)

    def forget(self) -> None:
        """Watch no more."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _ended(self) -> None:
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            self.status = _zombie_status(self.pid)
        self.died.set()
        self.forget()
        heard, self._heard = self._heard, []
        for call in heard:
            call()


def _zombie_status(pid: int) -> int | None:
    """The exit status of another's child, while its parent has not yet asked for it; None when it cannot be told.

    A status of 0 is also what a reader without the right sees, so it is left to the parent to say.
    """
    try:
        data = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = data[data.rindex(b")") + 2 :].split()
    code = int(fields[49])
    return os.waitstatus_to_exitcode(code) if fields[0] == b"Z" and code else None
