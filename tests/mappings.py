"""What the kernel says of this process's memory, and what it keeps of files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from agent.native.cold import forget

__all__ = ["make_cold", "mapping_flags"]


def mapping_flags(address: int) -> list[str]:
    """Of the mapping that holds an address, as the kernel shows them."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif within and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(f"no mapping holds {address:#x}")


def make_cold(path: Path) -> None:
    """Take a file out of the page cache. Skips the test where its file system keeps it there, or knows no direct reads."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no direct reads here: {error.strerror}")
    if forget(path):
        pytest.skip("this file system keeps what it has read")
