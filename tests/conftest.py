"""What a test run leaves behind fails it: threads that keep its interpreter from ending, processes that outlive it."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.examples import examples

_MARK = f"MARK_OF_TEST_RUN={uuid.uuid4().hex}"
_GRACE_S = 60.0
_EXIT_S = 60.0
_KEY = pytest.StashKey[list[str]]()


def pytest_configure() -> None:
    """Every process that a test starts inherits a mark by which it is found at the end, and hears an interrupt, also where a
    shell runs the tests in its background and has told them to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    name, _, value = _MARK.partition("=")
    os.environ[name] = value
    # How long an example takes says how loaded the machine is.
    hypothesis.settings.register_profile(
        "here", max_examples=examples(100), deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("here")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What modules and tests are made of stays to the end: to look through it for garbage takes a third of the time to collect
    them, and then a part of every test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    left = _left_behind() if not _distributes(session.config) else []
    deadline = time.monotonic() + _GRACE_S
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = _left_behind()
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["left_behind"] = left
    session.config.stash[_KEY] = left = left + session.config.stash.get(_KEY, [])
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """One of several processes of tests has ended (pytest-xdist), and says what it left."""
    stash = node.config.stash
    stash[_KEY] = stash.get(_KEY, []) + getattr(node, "workeroutput", {}).get("left_behind", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_KEY, []):
        terminalreporter.write_line(f"LEFT BEHIND by the tests: {line}", red=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    """A run that cannot end shows where each of its threads stands, and ends."""
    for pid, _ in _processes():
        os.kill(pid, signal.SIGKILL)
    if not hasattr(config, "workerinput"):  # one of several processes of tests is ended by the run, and may wait for others
        faulthandler.dump_traceback_later(_EXIT_S, exit=True, file=sys.__stderr__)


def _distributes(config: pytest.Config) -> bool:
    """Whether other processes run the tests of this run."""
    return not hasattr(config, "workerinput") and bool(getattr(config.option, "numprocesses", None))


def _left_behind() -> list[str]:
    main = threading.main_thread()
    threads = [t for t in threading.enumerate() if t is not main and not t.daemon]
    frames = sys._current_frames()
    found = []
    for thread in threads:
        frame = frames.get(thread.ident or 0)
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "?"
        found.append(f"thread {thread.name!r}, at {place}")
    return found + [f"process {pid}: {command}" for pid, command in _processes()]


def _processes() -> list[tuple[int, str]]:
    """Other processes that carry the mark of this run, but its zombies, and the helper that Python itself keeps beside whoever
    uses multiprocessing, until that one ends."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            marked = _MARK.encode() in (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if marked and command and "from multiprocessing.resource_tracker import main" not in command:
            found.append((int(entry.name), command[:200]))
    return found
