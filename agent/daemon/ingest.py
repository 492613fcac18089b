"""One ingest or publish as a child process, whose standard output is frames: progress, then the one end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from typing import Final

import msgspec

from agent.config import NodeConfig
from agent.daemon.process import describe_status, start_ticks
from agent.daemon.roster import Roster, RosterEntry
from agent.daemon.supervisor import log_path
from schema.errors import Fault, LinkError, SllmError
from schema.link import FrameDecoder, Ingest, OperationDone, Progress, Publish

__all__ = ["IngestCommand", "ingest_command", "publish_command", "run_child", "run_ingest"]

IngestCommand = Callable[[NodeConfig, Ingest], list[str]]
"""The command line of the child of one ingest."""

TERM_S: Final = 3.0
_READ_BYTES: Final = 1 << 16


def ingest_command(config: NodeConfig, message: Ingest) -> list[str]:
    """The product's IngestCommand."""
    source = msgspec.json.encode(message.source).decode()
    return [sys.executable, "-m", "agent", "ingest", "--run-dir", config.run_dir, "--op", message.op, "--source", source]


def publish_command(config: NodeConfig, message: Publish, directory: str) -> list[str]:
    """The command line of the child of one publish; ``directory`` is relative to the node's checkpoints."""
    command = [sys.executable, "-m", "agent", "publish", "--run-dir", config.run_dir, "--op", message.op]
    return [*command, "--directory", directory, "--url", message.url]


async def run_ingest(
    config: NodeConfig, message: Ingest, command: IngestCommand, roster: Roster, progress: Callable[[Progress], None]
) -> OperationDone:
    """Run an ingest to its end, which is always an `OperationDone`. Cancelled, it ends the child and whatever that started."""
    return await run_child(config, "ingest", message.op, command(config, message), roster, progress)


async def run_child(
    config: NodeConfig, what: str, op: str, command: list[str], roster: Roster, progress: Callable[[Progress], None]
) -> OperationDone:
    """Run a child of this kind to its end; ``what`` it does names its log."""
    log = log_path(config, what)
    try:
        with log.open("ab") as errors:
            child = await asyncio.create_subprocess_exec(
                *command, stdin=DEVNULL, stdout=PIPE, stderr=errors, start_new_session=True
            )
    except OSError as error:
        return OperationDone(op=op, fault=Fault.of(SllmError(f"cannot start the {what}: {error}")))
    # Both are known as ingests: children of one operation, which a new agent ends.
    entry = RosterEntry(role="ingest", pid=child.pid, ticks=start_ticks(child.pid) or 0, instance=op)
    roster.put(entry)
    try:
        done = await _relay(child, op, progress)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), TERM_S)
        if done is None:
            why = f"the {what} {describe_status(child.returncode)} without an answer; see {log}"
            return OperationDone(op=op, fault=Fault.of(SllmError(why)))
        return done
    except LinkError as error:
        return OperationDone(op=op, fault=Fault.of(error))
    finally:
        await _end(child)
        roster.remove(entry)


async def _relay(child: Process, op: str, progress: Callable[[Progress], None]) -> OperationDone | None:
    assert child.stdout is not None
    decoder: FrameDecoder[Progress | OperationDone] = FrameDecoder(Progress | OperationDone)
    while data := await child.stdout.read(_READ_BYTES):
        for message in decoder.feed(data):
            if message.op != op:
                raise LinkError(f"the child of {op} spoke of {message.op}")
            if isinstance(message, OperationDone):
                return message
            progress(message)
    return None


async def _end(child: Process) -> None:
    """End the child's whole session; it has been told its end, or nobody wants it any more."""
    if child.returncode is not None:
        return
    for number, limit_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.shield(asyncio.wait_for(child.wait(), limit_s))
            return
