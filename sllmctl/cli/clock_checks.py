"""What `sllmctl doctor` looks at in the clock: behind what was written, kept by a time server, set while the manager ran."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

from sllmctl.cli.findings import Finding, seen
from sllmctl.cli.format import age
from sllmctl.cli.looks import Check
from sllmctl.procstat import process_stat

__all__ = ["check_clock", "clock", "clock_jump", "clock_sync", "manager_began"]

_SLACK_S = 60.0
_JUMP_S = 60.0
"""A manager says that it started some seconds after its process began."""
_STA_UNSYNC, _TIME_ERROR = 0x0040, 5
_SET = "`sudo timedatectl set-ntp true`"


class _Timex(ctypes.Structure):
    """The beginning of the kernel's struct timex, and room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def check_clock(state_dir: Path, manager: tuple[int, float] | None) -> list[Check]:
    """``manager``: the pid of one that runs here, and when it says that it started."""
    return [
        ("clock", lambda: clock(_written_at(state_dir), time.time())),
        ("clock_sync", lambda: clock_sync(_synchronised())),
        ("clock_jump", lambda: clock_jump(None if manager is None else _began(*manager))),
    ]


def _written_at(state_dir: Path) -> float:
    written = (path.stat().st_mtime for path in (state_dir, state_dir / "state.db", state_dir / "state.db-wal") if seen(path))
    return max(written, default=0.0)


def clock(written_at: float, now: float) -> Finding:
    """A clock behind what was already written would put new ids and events before old ones."""
    ahead_s = written_at - now
    if ahead_s > _SLACK_S:
        text = f"the state was written {age(ahead_s)} in the future"
        return Finding("clock", "fault", text, f"{_SET} before starting the manager")
    return Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


def clock_sync(synchronised: bool | None) -> Finding:
    """Ids and events are in the order of this clock, so it should not wander; nodes need no common one."""
    if synchronised is None:
        return Finding("clock_sync", "ok", "the kernel does not say whether a time server keeps the clock")
    if not synchronised:
        text = "no time server keeps this clock, by what the kernel knows"
        return Finding("clock_sync", "warn", text, f"{_SET}; in a container or a virtual machine the host may keep it")
    return Finding("clock_sync", "ok", "a time server keeps the clock")


def clock_jump(began: tuple[float, float] | None) -> Finding:
    """``began``: when the manager's process began by today's clock, and by the clock of that moment."""
    if began is None:
        return Finding("clock_jump", "ok", "no manager runs that has seen the clock being set")
    jump_s = began[0] - began[1]
    if abs(jump_s) > _JUMP_S:
        text = f"the clock was set {'forward' if jump_s > 0 else 'back'} by {age(abs(jump_s))} since the manager started"
        advice = f"ages of that time are wrong by as much; {_SET} keeps the clock by small steps"
        return Finding("clock_jump", "warn", text, advice)
    return Finding("clock_jump", "ok", "the clock was not set since the manager started")


def manager_began(pid: int, now: float) -> float | None:
    """When a process of this machine began, by the clock as it is now; None when there is none."""
    try:
        began_s = process_stat(pid).began_s
    except OSError:
        return None
    return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - began_s)


def _began(pid: int, said: float) -> tuple[float, float] | None:
    began = manager_began(pid, time.time())
    return None if began is None else (began, said)


def _synchronised() -> bool | None:
    timex = _Timex()
    answer = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    if answer < 0:
        return None
    return answer != _TIME_ERROR and not timex.status & _STA_UNSYNC
