"""install.sh: what is asked wrongly is named; huge pages are set with consent alone, beside what others have, and undone."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "install.sh"
_NAMESPACE = ["unshare", "--mount", "--propagation", "private"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("bundel",), "no command bundel"),
        (("bundle", "--here"), "no option --here"),
        (("bundle", "a", "b"), "one file, not a b"),
        (("uninstall", "--prge"), "no option --prge"),
        (("install", "node"), "not node"),
    ],
)
def test_what_is_asked_wrongly_is_named_and_nothing_is_done(arguments: tuple[str, ...], named: str) -> None:
    said = run(*arguments)
    assert said.returncode == 2
    assert named in said.stderr
    assert run("bundle", "--help").stdout.startswith("usage: ./install.sh")


@pytest.mark.parametrize("arguments", [("hugepages",), ("hugepages", "2G")])
def test_without_a_terminal_and_without_yes_nothing_is_set(arguments: tuple[str, ...]) -> None:
    pool, conf = Path("/proc/sys/vm/nr_hugepages"), Path("/etc/sysctl.d/90-sllmctl-hugepages.conf")
    before = pool.read_text(), conf.exists() and conf.read_text()
    said = run(*arguments)
    assert said.returncode == 2
    assert "-y" in said.stderr
    assert (pool.read_text(), conf.exists() and conf.read_text()) == before


@pytest.mark.parametrize("size", ["lots", "1X", "-1G", "1.5G", "1G; reboot", ""])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    assert run("hugepages", size, "-y").returncode == 2


def test_an_interrupted_step_takes_what_it_kept_with_it(tmp_path: Path) -> None:
    """A Python that unpacks something and takes its time, as pip does."""
    python, scratch, begun = tmp_path / "python", tmp_path / "scratch", tmp_path / "begun"
    scratch.mkdir()
    os.mkfifo(begun)
    python.write_text(
        f'#!/bin/sh\ncase "$*" in "-m venv"*) echo much > "$TMPDIR/unpacked"; echo > {begun}; exec sleep 60;; esac\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "SLLM_PYTHON": str(python), "SLLM_VENV": str(tmp_path / "venv"), "TMPDIR": str(scratch)}
    with subprocess.Popen([str(SCRIPT), "bundle", str(tmp_path / "file")], stderr=subprocess.PIPE, env=environment) as process:
        begun.read_text()
        assert list(scratch.rglob("unpacked"))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, b"Interrupted" in said) == (130, True)
    assert list(scratch.iterdir()) == []


def test_types_are_checked_beside_the_tests_and_before_those_that_run_alone(tmp_path: Path) -> None:
    """Tools that only say that they were there; mypy waits for the tests to begin, and finds something."""
    tools, said, together = tmp_path / "venv" / "bin", tmp_path / "said", tmp_path / "together"
    tools.mkdir(parents=True)
    os.mkfifo(together)
    for name, does in {
        "ruff": ":",
        "lint-imports": ":",
        "mypy": f"echo > {together}; echo mypy >> {said}; echo a type is wrong; exit 1",
        "python": f'case "$*" in *"not alone") cat {together}; echo tests >> {said};; *"-m alone") echo alone >> {said};; esac',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "SLLM_PYTHON"} | {
        "SLLM_VENV": str(tools.parent)
    }
    done = subprocess.run([str(SCRIPT), "test"], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "install.sh: failed: mypy")
    assert "a type is wrong" in done.stdout
    assert sorted(said.read_text().split()) == ["alone", "mypy", "tests"]
    assert said.read_text().endswith("alone\n")


def test_what_was_installed_without_a_compiler_is_installed_again_with_one(tmp_path: Path) -> None:
    """As doctor advises where something was not compiled: all else is as it was."""
    tools, said = tmp_path / "venv" / "bin", tmp_path / "said"
    tools.mkdir(parents=True)
    for name, does in {"python": f'echo "$*" >> {said}', "sllmctl": ":", "cc": "exit 1"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "SLLM_PYTHON"} | {
        "SLLM_VENV": str(tools.parent), "CC": str(tools / "cc"),
    }  # fmt: skip
    installs = []
    for does in ("exit 1", "exit 1", "echo 11.3.0", "echo 11.3.0", "echo 12.2.0"):
        (tools / "cc").write_text(f"#!/bin/sh\n{does}\n")
        subprocess.run([str(SCRIPT), "demo"], check=True, capture_output=True, timeout=60, env=environment)
        installs.append(said.read_text().count("pip install"))
    assert installs == [1, 1, 2, 2, 3]


def _can_unshare() -> bool:
    if os.geteuid() != 0:
        return False
    try:
        return subprocess.run([*_NAMESPACE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not _can_unshare(), reason="takes root and a mount namespace")
def test_pages_are_added_to_those_of_others_kept_for_the_next_boot_and_taken_back(tmp_path: Path) -> None:
    """In a mount namespace where files of ours stand for the kernel's and for /etc/sysctl.d."""
    pool, sysctl = tmp_path / "nr_hugepages", tmp_path / "sysctl.d"
    sysctl.mkdir()
    pool.write_text("100\n")
    conf = sysctl / "90-sllmctl-hugepages.conf"

    def inside(*arguments: str) -> subprocess.CompletedProcess[str]:
        mounts = f"mount --bind {sysctl} /etc/sysctl.d && mount --bind {pool} /proc/sys/vm/nr_hugepages"
        command = [*_NAMESPACE, "sh", "-c", f'{mounts} && exec "$@"', "sh", str(SCRIPT), *arguments]
        environment = {**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=environment)

    said = inside("hugepages", "1G", "-y")
    assert said.returncode == 0, said.stderr
    assert pool.read_text() == "613\n"
    assert "vm.nr_hugepages = 613\n" in conf.read_text()
    assert inside("hugepages", "-y", "2GiB").returncode == 0
    assert pool.read_text() == "1125\n", "what was there before is counted once"
    assert inside("hugepages", "0").returncode == 0
    assert (pool.read_text(), conf.exists()) == ("100\n", False)
    assert inside("hugepages", "10M", "-y").returncode == 0
    assert pool.read_text() == "106\n"
    assert inside("uninstall", "--purge").returncode == 0
    assert (pool.read_text(), conf.exists()) == ("100\n", False)
