"""Memory of blocks: where it begins, and which pages it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.native.address import address_of
from agent.native.blocks import block_memory
from tests.mappings import mapping_flags


@pytest.mark.parametrize("size", [4096, 4 << 20, (4 << 20) + 8192])
def test_it_begins_at_a_huge_page(size: int) -> None:
    view = block_memory(size)
    assert len(view) == size
    assert address_of(view) % (2 << 20) == 0
    view[0] = view[-1] = 7


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages to ask for")
def test_huge_pages_are_asked_for() -> None:
    view = block_memory(4 << 20)
    assert "hg" in mapping_flags(address_of(view))
