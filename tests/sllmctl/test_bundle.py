"""What a single-file build knows of itself, over directories as pex makes them; tests/e2e/test_bundle.py builds one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from sllmctl.bundle import old_builds, remove_old_builds, unpacked_root


def unpacked(cache: Path, build: str, age_s: float = 7200.0) -> Path:
    root = cache / f"bundle-{build}"
    environment = root / "venvs" / "4" / "ab" / "cd"
    environment.mkdir(parents=True)
    (environment / "PEX-INFO").write_text("{}")
    then = time.time() - age_s
    os.utime(root, (then, then))
    return root


def test_an_installation_is_no_bundle_and_a_bundle_knows_its_root(tmp_path: Path) -> None:
    assert unpacked_root() is None
    root = unpacked(tmp_path, "1")
    short = tmp_path / "short"
    short.symlink_to(root / "venvs" / "4" / "ab" / "cd")
    assert unpacked_root(str(short)) == root


def test_older_builds_go_unless_they_are_new_or_run(tmp_path: Path) -> None:
    mine, old, fresh, running = (unpacked(tmp_path, name, age) for name, age in (("1", 0), ("2", 7200), ("3", 60), ("4", 7200)))
    (tmp_path / "something-else").mkdir()
    script = "import sys; print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, f"{running}/venvs/4/ab/cd"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert old_builds(mine) == [old]
        assert remove_old_builds(mine) == [old]
        assert fresh.is_dir()
        assert running.is_dir()
    assert old_builds(mine) == [running]
    assert (tmp_path / "something-else").is_dir()


def test_a_build_that_runs_by_way_of_a_link_stays(tmp_path: Path) -> None:
    cache, home = tmp_path / "data" / "cache", tmp_path / "home"
    mine, running = unpacked(cache, "1", 0), unpacked(cache, "2")
    home.symlink_to(tmp_path / "data")
    python = running / "venvs" / "4" / "ab" / "cd" / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    command = [f"{home}/cache/bundle-2/venvs/4/ab/cd/bin/python", "-c", "print('up', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert old_builds(mine) == []
    assert old_builds(mine) == [running]


def test_what_lies_beside_a_place_of_the_users_choice_is_left_alone(tmp_path: Path) -> None:
    unpacked(tmp_path, "2")
    (tmp_path / "mine").mkdir()
    assert old_builds(tmp_path / "mine") == []
