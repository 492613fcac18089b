"""One ingest or publish as a child process, which writes frames to a pipe: progress, then the one end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from agent.config import NodeConfig
from agent.daemon.process import describe_status, start_ticks
from agent.daemon.roster import Roster, RosterEntry
from agent.daemon.supervisor import KILL_S, TERM_S, log_path
from schema.errors import LinkError, SllmError
from schema.link import Committing, FrameDecoder, Ingest, OperationDone, Progress, Publish

__all__ = ["Child", "ForkIngestDoor", "IngestCommand", "ingest_command", "publish_command", "run_ingest", "run_publish"]

IngestCommand = Callable[[NodeConfig, Ingest], list[str]]
"""The command line of the child of one ingest."""
_Launched = tuple["Child", asyncio.StreamReader, asyncio.ReadTransport]
"""A child, its frames, and the pipe that they come from."""
_Said = Callable[[Progress | Committing], None]
"""Hears what a child says before its end."""
_Launch = Callable[[Path], Awaitable[_Launched]]
"""Starts a child that logs to this file. Raises OSError."""
_READ_BYTES: Final = 1 << 16
_LAST_WORDS_S: Final = 1.0
"""They lie in the pipe; what the child has left behind may keep that open."""


class Child(Protocol):
    """A process that does one operation."""

    @property
    def pid(self) -> int: ...

    def send_signal(self, number: signal.Signals, /) -> None:
        """Raises ProcessLookupError when it is known to have ended."""

    async def wait(self) -> int | None:
        """Wait for its end; returns its exit code, negative for a signal, None when nobody could tell."""


ForkIngestDoor = Callable[[Ingest, int], Awaitable[Child | None]]
"""Forks a child for an ingest whose frames go to this descriptor; None where that cannot be had."""


def ingest_command(config: NodeConfig, message: Ingest) -> list[str]:
    """The product's IngestCommand."""
    source = msgspec.json.encode(message.source).decode()
    return [sys.executable, "-m", "agent", "ingest", "--run-dir", config.run_dir, "--op", message.op, "--source", source]


def publish_command(config: NodeConfig, message: Publish, directory: str) -> list[str]:
    """The command line of the child of one publish; ``directory`` is relative to the node's checkpoints."""
    command = [sys.executable, "-m", "agent", "publish", "--run-dir", config.run_dir, "--op", message.op]
    return [*command, "--directory", directory, "--url", message.url]


async def run_ingest(
    config: NodeConfig,
    message: Ingest,
    fork: ForkIngestDoor,
    command: IngestCommand,
    roster: Roster,
    said: _Said,
) -> OperationDone:
    """Run an ingest to the end that it tells. Raises SllmError when it tells none. Cancelled, it ends the child, unless that
    has come to its end by then.

    To judge a model takes torch and transformers, seconds to import. A fork of the zygote has them; without one the child is
    a process of its own.
    """

    async def launch(log: Path) -> _Launched:
        # Each has a pipe of its own: nobody hears a fork that came to be after all when the zygote was given up.
        return await _piped(lambda frames: fork(message, frames)) or await _execute(command(config, message), log)

    return await _run_child(config, "ingest", message.op, launch, roster, said)


async def run_publish(config: NodeConfig, message: Publish, directory: str, roster: Roster, said: _Said) -> OperationDone:
    """Run a publish of the checkpoint in ``directory`` to its end, as `run_ingest` does."""

    async def launch(log: Path) -> _Launched:
        return await _execute(publish_command(config, message, directory), log)

    return await _run_child(config, "publish", message.op, launch, roster, said)


async def _execute(command: list[str], log: Path) -> _Launched:
    async def start(frames: int) -> Child:
        with log.open("ab") as errors:
            return await asyncio.create_subprocess_exec(
                *command, stdin=DEVNULL, stdout=frames, stderr=errors, start_new_session=True
            )

    started = await _piped(start)
    assert started is not None
    return started


async def _piped(start: Callable[[int], Awaitable[Child | None]]) -> _Launched | None:
    """A child that ``start`` began with the writing end of a pipe as its frames' descriptor; None if it returned none."""
    reading, writing = os.pipe()
    frames = asyncio.StreamReader()
    transport: asyncio.ReadTransport | None = None
    child: Child | None = None
    try:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(frames), os.fdopen(reading, "rb", buffering=0)
        )
        child = await start(writing)
    finally:
        os.close(writing)
        if child is None and transport is not None:
            transport.close()
    return None if child is None else (child, frames, transport)


async def _run_child(config: NodeConfig, what: str, op: str, launch: _Launch, roster: Roster, said: _Said) -> OperationDone:
    """Run a child to its end; ``what`` it does names its log."""
    log = log_path(config, what)
    try:
        child, frames, transport = await launch(log)
    except OSError as error:
        raise SllmError(f"cannot start the {what}: {error}") from error
    # All are known as ingests: children of one operation, which a new agent ends.
    entry = RosterEntry(role="ingest", pid=child.pid, ticks=start_ticks(child.pid) or 0, instance=op)
    roster.put(entry)
    status: int | None = None
    done: OperationDone | None = None
    failed: LinkError | asyncio.CancelledError | None = None
    try:
        try:
            done = await _relay(frames, op, said)
            with contextlib.suppress(TimeoutError):
                status = await asyncio.wait_for(child.wait(), TERM_S)
        except (LinkError, asyncio.CancelledError) as error:
            failed = error
        finally:
            await _end(child)
        if done is None and isinstance(failed, asyncio.CancelledError):
            done = await _last_words(frames, op, said)
    finally:  # whoever cancels twice waits for no last words
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGKILL)
        transport.close()  # after its end: one that is told to end may still write of its progress
        roster.remove(entry)
    if done is not None:  # then a cancel came too late
        return done
    if failed is not None:
        raise failed
    raise SllmError(f"the {what} {describe_status(status)} without an answer; ask for it again, and see {log}")


async def _relay(frames: asyncio.StreamReader, op: str, said: _Said) -> OperationDone | None:
    decoder: FrameDecoder[Progress | Committing | OperationDone] = FrameDecoder(Progress | Committing | OperationDone)
    while data := await frames.read(_READ_BYTES):
        for message in decoder.feed(data):
            if message.op != op:
                raise LinkError(f"the child of {op} spoke of {message.op}")
            if isinstance(message, OperationDone):
                return message
            said(message)
    return None


async def _last_words(frames: asyncio.StreamReader, op: str, said: _Said) -> OperationDone | None:
    """What a child that was ended had said by then: it may have come to its end by itself."""
    with contextlib.suppress(LinkError, TimeoutError):
        async with asyncio.timeout(_LAST_WORDS_S):
            return await _relay(frames, op, said)
    return None


async def _end(child: Child) -> None:
    """End the child; it has been told its end, or nobody wants it any more."""
    for number, limit_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
        try:
            child.send_signal(number)
        except ProcessLookupError:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.shield(asyncio.wait_for(child.wait(), limit_s))
            return
