"""What the kernel says of this process's memory."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["mapping_flags"]


def mapping_flags(address: int) -> list[str]:
    """Of the mapping that holds an address, as the kernel shows them."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif within and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(f"no mapping holds {address:#x}")
