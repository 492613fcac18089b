"""Commands run in this process against a fake manager, on a clock that stands still."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sllmctl.cli import output
from sllmctl.cli.main import run
from tests.sllmctl.fake_manager import NOW, FakeManager, fake_manager

__all__ = ["Said", "Sllmctl"]


class Said:
    """What a command wrote, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Sllmctl = Callable[..., Said]


@pytest.fixture(scope="package")
def running() -> Iterator[FakeManager]:
    with fake_manager() as manager:
        yield manager


@pytest.fixture
def manager(running: FakeManager) -> FakeManager:
    running.forget()
    return running


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No configuration but what a test gives; caches are everybody's, as matplotlib's of the fonts, which takes seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "/tmp/nowhere")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(output, "time", SimpleNamespace(time=lambda: NOW))


@pytest.fixture
def sllmctl(alone: None, manager: FakeManager, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sllmctl:
    """Runs one command line against the fake manager."""
    monkeypatch.setenv("SLLM_ADMIN_SOCKET", str(manager.socket))

    def sllmctl(*arguments: str) -> Said:
        capsys.readouterr()
        code = run(arguments)
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return sllmctl


@pytest.fixture
def ended() -> Iterator[Callable[[subprocess.Popen[str]], None]]:
    """Takes processes over that must not outlive the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes.append
    for process in processes:
        process.kill()
        process.communicate()
