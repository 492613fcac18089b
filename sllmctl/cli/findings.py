"""What a check of `sllmctl doctor` is and returns, and what several of them read.

A check is a pure function of facts, which a function beside it gathers; it changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["CHECKS", "Finding", "existing", "meminfo", "read_text", "seen"]

CHECKS = {
    "python": "the version of Python",
    "packages": "what a node needs beside the manager's own packages",
    "compiled": "whether the code that generates on processors was compiled",
    "config": "flags, variables and the configuration file: keys, values, paths too long for a socket",
    "state_dir": "the state directory can be written, and by nobody else",
    "data_dir": "the node's directories, of checkpoints and of what runs, can be written",
    "permissions": "sockets, tokens, database and settings: whose they are, and who else can reach them",
    "manager": "whether a manager answers on the admin socket, or has left it behind",
    "versions": "the commands' version beside the manager's",
    "agent": "whether this machine's agent answers, or has left its socket behind",
    "port": "the API's port while no manager runs, and who holds it",
    "database": "the database is whole (SQLite's quick check) and can be read",
    "schema": "the database's schema revision beside those that this build knows",
    "wal": "how far the database's write-ahead log has grown",
    "generation": "the node's cluster and newest manager generation beside the database's",
    "memory": "memory that is available, within the limits of the control groups, beside the arena",
    "cgroup": "processes killed for memory in this control group, and its limit of processes",
    "shm": "room in /dev/shm",
    "swap": "how much of our processes has been swapped out",
    "oom": "whom of ours the kernel would kill first when memory runs out",
    "thp": "whether the kernel stops processes to make huge pages",
    "arena_pages": "which pages the arena has, or would get",
    "huge_pages": "the pool of huge pages beside the arena",
    "memlock": "how much memory may be locked",
    "open_files": "how many files may be open, and are",
    "zombies": "children of ours that have ended and that nobody has collected",
    "cuda": "devices, the driver and the CUDA bindings beside each other",
    "io_uring": "whether the kernel lets the store read through io_uring",
    "direct_reads": "whether the checkpoints' file system reads past the page cache",
    "disk": "room for checkpoints",
    "state_disk": "room, and files left, where the database lies",
    "disk_budget": "checkpoints beside node.disk_bytes",
    "leftovers": "what was broken off and never gone on with, and older single-file builds, with sizes",
    "disk_start": "what bounds a start of the largest deployed model from disk",
    "load_times": "how long each deployed model takes from this disk, beside its cold_start_timeout_s",
    "clock": "the clock beside what was already written",
    "clock_sync": "whether the clock is kept by a time server",
    "clock_jump": "how far the clock was set since the manager started",
    "node_versions": "the versions of agents, stores, zygotes and workers beside the manager's",
    "quarantine": "copies of checkpoints that are wrong",
    "instances": "instances that failed",
    "places": "models that no node could hold when an instance was wanted",
}
"""What each check looks at, by its id; docs/doctor.md has the same table with levels."""


class Finding(msgspec.Struct, frozen=True):
    """``advice`` says what to do, where there is something to do."""

    check: str
    level: Literal["ok", "warn", "fault"]
    message: str
    advice: str = ""


def existing(path: Path) -> Path:
    """The path itself, or the first above it that is there; what this user may not see is not."""
    while not seen(path) and path != path.parent:
        path = path.parent
    return path


def seen(path: Path) -> bool:
    """Whether there is such a path, and this user may look at it."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; counts of pages as they are."""
    found = {}
    for line in read_text(Path("/proc/meminfo")).splitlines():
        name, _, rest = line.partition(":")
        amount, _, unit = rest.strip().partition(" ")
        if amount.isdigit():
            found[name] = int(amount) * (1024 if unit == "kB" else 1)
    return found


def read_text(path: Path) -> str:
    """The content of a small file of the kernel's, or "" where there is none; names in it may be bytes of any kind."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
