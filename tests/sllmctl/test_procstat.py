"""What the kernel says of a process, whatever the process is called."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from sllmctl.cli.clock_checks import manager_began
from sllmctl.cli.process_checks import process_facts
from sllmctl.procstat import process_stat

_NAMED = """
import sys, time
with open("/proc/self/comm", "wb") as name:
    name.write(b") Z 1 \\xff(")
while time.process_time() < 0.05:
    pass
print("named", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def oddly_named() -> Iterator[subprocess.Popen[str]]:
    """Lives, has taken 0.05 s of a processor, and has a name that is made to mislead."""
    with subprocess.Popen([sys.executable, "-c", _NAMED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "named\n"
        yield child
        child.communicate()


def test_a_name_misleads_nobody(oddly_named: subprocess.Popen[str]) -> None:
    stat = process_stat(oddly_named.pid)
    assert stat.state in "SR"
    assert stat.parent == os.getpid()
    assert 0.04 <= stat.cpu_s < 60.0
    assert 0.0 < time.clock_gettime(time.CLOCK_BOOTTIME) - stat.began_s < 600.0
    assert stat.began_ticks >= process_stat(os.getpid()).began_ticks


def test_doctor_looks_past_it(oddly_named: subprocess.Popen[str]) -> None:
    own, odd = process_facts([("manager", os.getpid()), ("worker", oddly_named.pid)])
    assert oddly_named.pid not in own.zombies
    assert odd.open_files > 2
    assert manager_began(oddly_named.pid, time.time()) is not None


def test_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process_stat(child.pid).state == "Z"
    with pytest.raises(ProcessLookupError):
        process_stat(child.pid)
