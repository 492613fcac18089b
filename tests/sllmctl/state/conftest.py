"""A database in a directory of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sllmctl.state import Database


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/state.db"


@pytest.fixture
async def database(url: str, tmp_path: Path) -> AsyncIterator[Database]:
    database = await Database.open(url, backup_dir=tmp_path / "backups")
    yield database
    await database.close()
