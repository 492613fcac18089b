"""What a check of `sllmctl doctor` returns, and what several of them read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["Finding", "meminfo", "read_text"]


class Finding(msgspec.Struct, frozen=True):
    """``advice`` says what to do, where there is something to do."""

    check: str
    level: Literal["ok", "warn", "fault"]
    message: str
    advice: str = ""


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
    """The content of a small file of the kernel's, or "" where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
