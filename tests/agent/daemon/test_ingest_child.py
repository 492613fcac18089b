"""The child of an ingest, seen from its agent."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

from agent.config import NodeConfig
from agent.daemon.ingest import Child, run_ingest
from agent.daemon.roster import Roster
from schema.link import Ingest, Progress
from schema.spec import PathSource

_TALKS_WHEN_TOLD_TO_END = """
import os, signal, sys, time
from pathlib import Path
from agent.store.ingest.report import Reporter
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
Reporter(1, "op").progress("ingest", 1, 2)
time.sleep(60)
"""


async def test_a_cancelled_child_is_heard_until_it_has_ended(tmp_path: Path) -> None:
    began = asyncio.Event()
    said = tmp_path / "said"
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
            lambda config, message: [sys.executable, "-c", _TALKS_WHEN_TOLD_TO_END, str(said)],
            Roster(tmp_path / "roster.json"),
            heard,
        )
    )
    await asyncio.wait_for(began.wait(), 60)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert said.read_text() == "heard"
