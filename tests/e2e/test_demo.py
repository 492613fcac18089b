from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240
SCRATCH = re.compile(r"/tmp/sllm-[a-z0-9_]+")


@contextmanager
def demo(*flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "sllmctl", "demo", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def living(directory: str) -> list[int]:
    """Processes that name the directory in their command line or in the environment that they inherited."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if directory.encode() in told:
                    found.append(int(entry.name))
    return found


def scratch_of(text: str) -> str:
    match = SCRATCH.search(text)
    assert match is not None, text
    return match.group()


@pytest.mark.slow
def test_demo_goes_the_whole_path_and_leaves_nothing() -> None:
    with demo() as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert "Cold start: first token after" in out
    for phase in ("queue", "load", "worker", "prefill", "first token"):
        assert re.search(rf"^  {phase} +[\d.]+ m?s", out, re.MULTILINE), out
    assert re.search(r"Warm request: first token after [\d.]+ m?s, then [1-9]\d* tokens/s", out)
    assert re.search(r"> What is a cold start\?\n.*(instance|request).*", out)
    assert "nothing is left running" in out
    directory = scratch_of(out)
    assert not Path(directory).exists()
    assert living(directory) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_interrupted_leaves_nothing(number: signal.Signals) -> None:
    with demo() as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        directory = scratch_of(line)
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, err
    assert not Path(directory).exists()
    assert living(directory) == []


@pytest.mark.slow
def test_demo_keep_goes_on_serving_until_it_is_told_to_stop() -> None:
    with demo("--keep") as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    directory = scratch_of(out)
    told = re.search(r"^  (kill (\d+); .*)$", out, re.MULTILINE)
    assert told is not None, out
    try:
        listed = subprocess.run(
            [sys.executable, "-m", "sllmctl", "--config", f"{directory}/config.toml", "model", "ls", "-o", "name"],
            cwd=ROOT, text=True, capture_output=True, timeout=LIMIT_S, check=True,
        )  # fmt: skip
        assert listed.stdout == "docs\n"
        subprocess.run(["bash", "-c", told.group(1)], timeout=LIMIT_S, check=True)
        assert not Path(directory).exists()
        assert living(directory) == []
    finally:
        for pid in living(directory):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_demo_refuses_a_source_that_is_none() -> None:
    with demo("--source", "no such thing") as process:
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert "no such thing" in err
