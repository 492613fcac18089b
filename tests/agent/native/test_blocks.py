"""Memory of blocks: where it begins, and which pages it asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.native.address import address_of
from agent.native.blocks import block_memory


@pytest.mark.parametrize("size", [4096, 4 << 20, (4 << 20) + 8192])
def test_it_begins_at_a_huge_page(size: int) -> None:
    view = block_memory(size)
    assert len(view) == size
    assert address_of(view) % (2 << 20) == 0
    view[0] = view[-1] = 7


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages to ask for")
def test_huge_pages_are_asked_for() -> None:
    view = block_memory(4 << 20)
    assert "hg" in _flags(address_of(view))


def _flags(address: int) -> list[str]:
    """Of the mapping that holds an address, as the kernel shows them."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif within and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(f"no mapping holds {address:#x}")
