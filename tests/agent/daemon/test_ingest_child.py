"""The child of an ingest, seen from its agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import sys
import threading
from pathlib import Path

from agent.config import NodeConfig
from agent.daemon.ingest import Child, run_ingest
from agent.daemon.roster import Roster
from schema.link import Ingest, OperationDone, Progress
from schema.spec import PathSource

_TALKS_WHEN_TOLD_TO_END = """
import os, signal, sys, time
from pathlib import Path
from agent.store.ingest.report import Reporter
from schema.states import Tier
from schema.errors import Fault, Cancelled

def last_words(number, frame):
    try:
        Reporter(1, "op").done("", Fault.of(Cancelled("over")))
    except OSError as error:
        Path(sys.argv[1]).write_text(str(error))
    else:
        Path(sys.argv[1]).write_text("heard")
    os._exit(0)

signal.signal(signal.SIGTERM, last_words)
Reporter(1, "op").progress("ingest", 1, 2, Tier.DISK)
time.sleep(60)
"""

_STAYS_WHEN_TOLD_TO_END = """
import os, signal, sys, time
from pathlib import Path
from agent.store.ingest.report import Reporter
from schema.states import Tier

signal.signal(signal.SIGTERM, lambda number, frame: Path(sys.argv[1]).write_text(str(os.getpid())))
Reporter(1, "op").progress("ingest", 1, 2, Tier.DISK)
while True:
    time.sleep(60)
"""


async def begin(tmp_path: Path, code: str) -> asyncio.Task[OperationDone]:
    """An ingest whose child runs this code, with the path ``said`` as its argument, once it has told of its progress."""
    began = asyncio.Event()
    config = NodeConfig(run_dir=str(tmp_path), data_dir=str(tmp_path))
    config.log_path.mkdir(parents=True, exist_ok=True)
    message = Ingest(op="op", source=PathSource(path="/nowhere"))

    async def no_fork(message: Ingest, frames: int) -> Child | None:
        return None

    def heard(progress: Progress) -> None:
        began.set()

    running = asyncio.create_task(
        run_ingest(
            config,
            message,
            no_fork,
            lambda config, message: [sys.executable, "-c", code, str(tmp_path / "said")],
            Roster(tmp_path / "roster.json"),
            heard,
        )
    )
    await asyncio.wait_for(began.wait(), 60)
    return running


async def test_a_cancelled_child_is_heard_until_it_has_ended(tmp_path: Path) -> None:
    running = await begin(tmp_path, _TALKS_WHEN_TOLD_TO_END)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert (tmp_path / "said").read_text() == "heard"


async def test_a_child_that_ends_well_though_it_is_told_to_end_is_believed(tmp_path: Path) -> None:
    code = _TALKS_WHEN_TOLD_TO_END.replace('done("", Fault.of(Cancelled("over")))', 'done("ab" * 32, None)')
    running = await begin(tmp_path, code)
    running.cancel()
    assert await running == OperationDone(op="op", digest="ab" * 32)


async def test_a_child_that_is_cancelled_twice_leaves_nothing_behind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "said")
    running = await begin(tmp_path, _STAYS_WHEN_TOLD_TO_END)
    running.cancel()
    child = os.pidfd_open(int(await asyncio.to_thread((tmp_path / "said").read_text)))
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert Roster(tmp_path / "roster.json").load() == {}
    assert (await asyncio.to_thread(select.select, [child], [], [], 60))[0], "it is still there"
    os.close(child)
    await reaped()


async def reaped() -> None:
    """Let asyncio, whose threads wait for its children, close what it has of one that has ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("waitpid-"):
            await asyncio.to_thread(thread.join)
    for _ in range(3):  # its end is taken in, then its pipes are closed, then it is told
        await asyncio.sleep(0)
