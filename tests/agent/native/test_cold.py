"""What the page cache holds of a file can be told, and changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.native.cold import cached_fraction, forget, remember


def test_a_file_is_forgotten_and_remembered(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(9 << 20))
    if forget(path) > 0:
        pytest.skip("this file system lives in the page cache")
    assert cached_fraction(path) == 0
    with path.open("rb") as file:
        file.seek(4 << 20)
        file.read(1)
    assert 0 < cached_fraction(path) < 1
    assert remember(path) == 1


def test_an_empty_file_has_no_pages_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert remember(tmp_path / "empty") == 0
    with pytest.raises(FileNotFoundError):
        cached_fraction(tmp_path / "missing")
