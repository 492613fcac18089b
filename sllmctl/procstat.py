"""What the kernel says of a process in ``/proc/PID/stat``; its names and units are those of proc_pid_stat(5)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["ProcessStat", "process_stat"]

_PROC = Path("/proc")


class ProcessStat(NamedTuple):
    """``state`` is a letter, Z of one that has ended and was not collected; ``cpu_s`` was spent in it and in the kernel for it,
    ``began_ticks`` is when it began, in clock ticks since the machine's boot, which tells it from a later one of its pid."""

    state: str
    parent: int
    cpu_s: float
    began_ticks: int

    @property
    def began_s(self) -> float:
        """When it began, in seconds since the machine's boot."""
        return self.began_ticks / os.sysconf("SC_CLK_TCK")


def process_stat(pid: int, proc: Path = _PROC) -> ProcessStat:
    """Raises ProcessLookupError when there is no such process, and OSError when it cannot be read."""
    try:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(f"there is no process {pid}") from None
    # The name in parentheses may hold anything, so fields are counted from behind it: the third is the first here.
    fields = text.rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ProcessStat(fields[0], int(fields[1]), ticks / os.sysconf("SC_CLK_TCK"), int(fields[19]))
