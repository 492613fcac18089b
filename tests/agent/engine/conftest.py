"""One thread for torch: the models are tiny, and the machine may be shared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from agent.engine import attention_paged
from agent.native import paged_attention


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["in place", "gathered"])
def attends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to attend on a CPU: by compiled code, and by torch's."""
    if request.param == "gathered":
        monkeypatch.setattr(attention_paged, "_width_for", lambda pool: None)
    elif not paged_attention.widths():
        pytest.skip("not compiled, or not for this processor")
