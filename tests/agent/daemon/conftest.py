from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.agent.daemon.peers import Node, make_checkpoint


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    """A node with one checkpoint on its disk, served by an agent in this process."""
    made = Node()
    make_checkpoint(made.config.checkpoints_path)
    async with made:
        yield made
