"""The admin API that each test asks."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.sllmctl.gateway.admin.rig import Manager


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
async def http(manager: Manager) -> AsyncIterator[httpx.AsyncClient]:
    async with manager.http() as http:
        yield http
