"""A store over an arena, for all tests; a checkpoint on a remote, and the remote's server, for those that fetch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.native.arena import Arena
from tests.agent.store.fetching import make_source
from tests.agent.store.images import CHUNK, Bench
from tests.remotes import WebServer, web_server


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(Arena.create(8 * CHUNK, CHUNK))
    yield bench
    bench.close()


@pytest.fixture
def source(tmp_path: Path) -> tuple[str, Path, bytes]:
    return make_source(tmp_path / "remote")


@pytest.fixture
def web(tmp_path: Path, source: tuple[str, Path, bytes]) -> Iterator[WebServer]:
    with web_server(tmp_path / "remote") as server:
        yield server
