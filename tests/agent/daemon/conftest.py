from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from agent.daemon import ingest, zygote
from tests.agent.daemon.peers import WAIT_S, Node, make_checkpoint


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers answer in this process: how long the agent waits for them says how loaded the machine is."""
    monkeypatch.setattr(ingest, "TERM_S", WAIT_S)
    monkeypatch.setattr(zygote, "_FORK_S", WAIT_S)
    monkeypatch.setattr(zygote, "_ABSENT_S", WAIT_S)
    monkeypatch.setattr(zygote, "_IMPORT_S", WAIT_S)


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    """A node with one checkpoint on its disk, served by an agent in this process."""
    made = Node()
    make_checkpoint(made.config.checkpoints_path)
    async with made:
        yield made
