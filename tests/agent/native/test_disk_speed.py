"""A look at how fast a disk reads: bounded, given up when told, and nothing left behind."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from agent.native.disk_speed import measure_read_bps


@pytest.fixture(autouse=True)
def _direct(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_RDONLY | os.O_DIRECT, 0o600))
    except OSError:
        pytest.skip("the file system of the temporary directory knows no direct I/O")
    (tmp_path / "probe").unlink()


def measure(directory: Path, file: Path | None = None, *, limit_s: float = 5.0, stop: threading.Event | None = None) -> float:
    return measure_read_bps(directory, file, threads=2, limit_s=limit_s, stop=stop or threading.Event())


def test_without_a_file_one_is_made_and_is_gone(tmp_path: Path) -> None:
    assert measure(tmp_path) > 0
    assert not list(tmp_path.iterdir())


def test_a_file_is_read_and_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    content = os.urandom(1 << 20) * 16 + b"tail"
    file.write_bytes(content)
    assert measure(tmp_path, file) > 0
    assert file.read_bytes() == content


def test_it_ends_when_told_and_then_says_nothing(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert measure(tmp_path, stop=stop) == 0


def test_its_time_is_bounded_also_where_nothing_is_fast_enough(tmp_path: Path) -> None:
    began = time.monotonic()
    assert measure(tmp_path, limit_s=0.0) == 0
    assert time.monotonic() - began < 2


def test_what_is_too_small_or_no_plain_file_gives_no_figure(tmp_path: Path) -> None:
    small, pipe = tmp_path / "small", tmp_path / "pipe"
    small.write_bytes(bytes(1 << 20))
    os.mkfifo(pipe)
    assert measure(tmp_path, small) == 0
    assert measure(tmp_path, pipe) == 0


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        measure(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        measure(tmp_path, tmp_path / "link")
