from __future__ import annotations

import pytest

from agent.engine.threads import threads_for


@pytest.mark.parametrize(
    ("mebibytes", "cores", "threads"),
    [(0, 8, 1), (7, 8, 1), (127, 8, 1), (128, 8, 2), (1200, 64, 18), (1200, 8, 8), (9000, 1, 1)],
)
def test_larger_models_get_more(mebibytes: int, cores: int, threads: int) -> None:
    assert threads_for(mebibytes << 20, cores) == threads
