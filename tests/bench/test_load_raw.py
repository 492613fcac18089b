"""The raw reader in C reads every byte of every file to its place, in each of its ways."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bench.load.prepare import HERE

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
SIZES = (5 << 20, (9 << 20) + 8, 4096, 24, 3 * 4096 - 8)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("raw") / "raw"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, HERE / "raw.c", "-lpthread"], check=True)
    return program


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("files")
    paths = [directory / str(number) for number in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        path.write_bytes(os.urandom(size))
    return paths


@pytest.mark.parametrize(
    ("mode", "depth", "block"), [("uring", 4, 1 << 20), ("uring", 32, 4 << 20), ("threads", 3, 1 << 20), ("buffered", 2, 4096)]
)
def test_every_byte_arrives(program: Path, files: list[Path], mode: str, depth: int, block: int) -> None:
    done = subprocess.run(
        [program, mode, str(depth), str(block), *files], input="go\n", capture_output=True, text=True, timeout=60
    )
    if mode == "uring" and "io_uring_setup" in done.stderr:
        pytest.skip(done.stderr)
    ready, line = done.stdout.splitlines()
    answer = json.loads(line)
    assert (ready, answer["bytes"]) == ("ready", sum(SIZES))
    assert answer["check"] == sum(int(np.fromfile(path, "<u8").sum()) for path in files) % 2**64
    assert answer["seconds"] > 0


def test_a_file_that_is_not_there_is_an_error(program: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [program, "uring", "4", "4096", tmp_path / "x"], input="go\n", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "No such file" in done.stderr


def test_the_writer_replaces_a_file_by_as_much(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    done = subprocess.run([program, "write", "2", str(1 << 20), path], input="go\n", capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout.splitlines()[1])["bytes"] == 4 << 20
    assert path.stat().st_size == 4 << 20
    assert path.read_bytes()[:4096] != bytes(4096)


def test_a_copy_is_the_same_bytes(program: Path, tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "file"
    source.write_bytes(os.urandom((5 << 20) + 4096))
    path.write_bytes(bytes(5 << 20))
    done = subprocess.run(
        [program, "write", "3", str(1 << 20), path, source], input="go\n", capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout.splitlines()[1])["bytes"] == 5 << 20
    assert path.read_bytes() == source.read_bytes()[: 5 << 20]
