"""What serve refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from schema.errors import InvalidInput
from sllmctl import serve
from sllmctl.config import Settings


@pytest.mark.parametrize("key", ["node.arena_bytes", "node.device_bytes"])
def test_a_budget_beyond_the_machines_memory_is_refused_and_nothing_is_made(tmp_path: Path, key: str) -> None:
    state = tmp_path / "state"
    settings = Settings.load({"state_dir": str(state), key: str(1 << 60)}, {})
    with pytest.raises(InvalidInput, match=key) as caught:
        serve.run(settings)
    assert caught.value.param == key
    assert not state.exists()
