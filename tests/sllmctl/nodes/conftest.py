from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A scratch directory with a path that a socket's address can hold."""
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="sl"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
