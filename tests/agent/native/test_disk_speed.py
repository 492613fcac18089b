"""A look at how fast a disk reads: bounded, given up when told, and nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.native import disk_speed
from agent.native.disk_speed import measure_read_bps


def measure(directory: Path, file: Path | None = None, *, limit_s: float = 60.0, stop: threading.Event | None = None) -> float:
    return measure_read_bps(directory, file, huge=False, threads=2, limit_s=limit_s, stop=stop or threading.Event())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed, "SCRATCH_BYTES", disk_speed.LEAST_BYTES)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(1 << 20) * 16 + b"tail")
    return file


@pytest.fixture
def no_direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A file system that refuses direct I/O; holds the descriptors for which it did."""
    refused: list[int] = []
    real = fcntl.fcntl

    def refusing(descriptor: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, value)

    monkeypatch.setattr(disk_speed.fcntl, "fcntl", refusing)
    return refused


def test_without_a_file_one_is_made_and_is_gone(tmp_path: Path) -> None:
    assert measure(tmp_path) > 0
    assert not list(tmp_path.iterdir())


def test_a_file_is_read_and_left_as_it_is(tmp_path: Path, weights: Path) -> None:
    content = weights.read_bytes()
    assert measure(tmp_path, weights) > 0
    assert weights.read_bytes() == content
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.parametrize("made", [True, False])
def test_where_direct_io_is_refused_pages_are_forgotten_first(
    tmp_path: Path, weights: Path, no_direct: list[int], monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    forgotten: list[tuple[int, int, int]] = []

    def forget(descriptor: int, offset: int, length: int, advice: int) -> None:
        forgotten.append((offset, length, advice))

    monkeypatch.setattr(disk_speed.os, "posix_fadvise", forget)
    assert measure(tmp_path, None if made else weights) > 0
    size_bytes = disk_speed.SCRATCH_BYTES if made else weights.stat().st_size
    assert len(no_direct) == 1
    assert forgotten == [(0, size_bytes, os.POSIX_FADV_DONTNEED)]


def test_direct_reads_that_want_another_alignment_are_ordinary_ones(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def strict(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(disk_speed.os, "preadv", strict)
    assert measure(tmp_path, weights) > 0


def test_it_ends_when_told_and_then_says_nothing(tmp_path: Path, weights: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert measure(tmp_path, stop=stop) == 0
    assert measure(tmp_path, weights, stop=stop) == 0


def test_its_time_is_bounded_and_nothing_read_is_no_figure(tmp_path: Path, weights: Path) -> None:
    began = time.monotonic()
    assert measure(tmp_path, weights, limit_s=0.0) == 0
    with pytest.raises(OSError, match="only 0 bytes"):  # it was not written in that time either
        measure(tmp_path, limit_s=0.0)
    assert time.monotonic() - began < 60


def test_what_is_too_small_or_no_plain_file_is_an_error(tmp_path: Path) -> None:
    small, pipe, link = tmp_path / "small", tmp_path / "pipe", tmp_path / "link"
    small.write_bytes(bytes(1 << 20))
    os.mkfifo(pipe)
    link.symlink_to(small)
    for file, why in ((small, "only 1048576 bytes"), (pipe, "not a file"), (link, "symbolic")):
        with pytest.raises(OSError, match=why):
            measure(tmp_path, file)


def test_a_disk_with_little_room_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed.os, "fstatvfs", lambda _: SimpleNamespace(f_bavail=2000, f_frsize=4096))
    with pytest.raises(OSError, match="No space"):
        measure(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_is_an_error(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk_speed.os, "preadv", failing)
    with pytest.raises(OSError, match="Input/output"):
        measure(tmp_path, weights)


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        measure(tmp_path / "nowhere")
