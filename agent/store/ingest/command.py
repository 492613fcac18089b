"""The ingest child: one operation, its progress and its end as frames on a pipe, then gone."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import msgspec

from agent.config import NodeConfig, load_config
from agent.logs import begin_log
from agent.native.files import allow_open_files
from agent.store.budget import claim_room, free_bytes
from agent.store.ingest.convert import convert
from agent.store.ingest.hub import fetch
from agent.store.ingest.report import Reporter
from agent.store.ingest.web import fetch_directory
from agent.store.temporary import kept_directory, sweep_left
from schema.errors import Cancelled, Fault, InvalidInput, SllmError
from schema.spec import HubSource, PathSource, Source, UrlSource
from schema.states import Tier

__all__ = ["ingest", "main"]

_log = logging.getLogger(__name__)


class _Stopped(BaseException):
    """SIGTERM. No Exception, so that no library on the way takes it for a failure of its own."""


def main(run_dir: str | Path, op: str, source: str | bytes) -> int:
    """`ingest` as a program: ``source`` is the JSON of a `Source`, the frames go to standard output."""
    frames = _own_stdout()
    try:
        wanted = msgspec.json.decode(source, type=Source)
    except msgspec.DecodeError as error:
        invalid = InvalidInput(f"the source to ingest is not valid: {error}", "source")
        Reporter(frames, op).done("", Fault.of(invalid))
        return 1
    return ingest(run_dir, op, wanted, frames)


def ingest(run_dir: str | Path, op: str, source: Source, frames: int) -> int:
    """Ingest ``source`` on the node of this run directory, with frames to this descriptor. Returns 0, or 1 after a fault.

    SIGTERM cancels, until the checkpoint is about to be put where it is found. What was written so far stays for the next
    ingest of the same source, as after a kill.
    """
    reporter = Reporter(frames, op)
    allow_open_files()
    try:
        with _cancel_on_sigterm():
            config = load_config(Path(run_dir))
            begin_log("ingest", config.log_path / "ingest.log", config, operation=op)
            reporter.end_unheard()
            digest, note = _ingest(config, source, reporter)
            reporter.done(digest, None, note=note)
    except _Stopped:
        reporter.done("", Fault.of(Cancelled("the ingest was cancelled; another one of the same source goes on from there")))
        logging.shutdown()
        os._exit(1)  # a download's threads would hold up an ordinary exit until they are done
    except Exception as error:  # the agent must hear of every end
        if not isinstance(error, SllmError):
            _log.exception("ingest failed")
        reporter.done("", Fault.of(error))
        return 1
    return 0


class _Stage:
    """A part of the work as it is reported: its name says, and ``notes`` too, when it goes on with what had been broken off."""

    def __init__(self, name: str, what: str, source: Tier, reporter: Reporter, notes: list[str]) -> None:
        self._name = self._stage = name
        self._what = what
        self._source = source
        self._reporter = reporter
        self._notes = notes

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        self._reporter.progress(self._stage, done_bytes, total_bytes, self._source)

    def resumed(self, spared_bytes: int) -> None:
        if spared_bytes:
            self._stage = f"{self._name}, resumed"
            self._notes.append(f"{spared_bytes} bytes were there of {self._what} that had been broken off")


def _ingest(config: NodeConfig, source: Source, reporter: Reporter) -> tuple[str, str]:
    """The digest, and what is to be said of how it was made."""
    data = Path(config.data_dir)
    temporary = data / "tmp"
    sweep_left(data, config.remote.keep_partial_s)
    notes: list[str] = []
    stage = _Stage("ingest", "an ingest", Tier.DISK, reporter, notes)

    def claim(need_bytes: int, begun: Path) -> contextlib.AbstractContextManager[None]:
        return claim_room(config.disk_bytes, data, need_bytes, "the checkpoint", but=begun)

    def committing(digest: str) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        reporter.committing(digest)

    def converted(directory: Path, *, in_place: bool = False) -> str:
        return convert(
            directory,
            config.checkpoints_path,
            temporary,
            stage.progress,
            claim=claim,
            in_place=in_place,
            resumed=stage.resumed,
            committing=committing,
        )

    if isinstance(source, PathSource):
        digest = converted(Path(source.path), in_place=source.in_place)
    else:
        with kept_directory(temporary, "fetch", hashlib.sha256(msgspec.json.encode(source)).hexdigest()[:32]) as directory:
            _interruptible(lambda: _download(config, source, directory, reporter, notes))
            digest = converted(directory)
    for note in notes:
        _log.info("%s", note)
    return digest, "; ".join(notes)


def _download(config: NodeConfig, source: HubSource | UrlSource, directory: Path, reporter: Reporter, notes: list[str]) -> None:
    stage = _Stage("fetch", "a download", Tier.REMOTE, reporter, notes)

    def free(need_bytes: int) -> int:
        return free_bytes(Path(config.data_dir), need_bytes)

    if isinstance(source, HubSource):
        fetch(source, directory, stage.progress, free)
    else:
        fetch_directory(source, directory, config.remote, stage.progress, free, stage.resumed)


def _interruptible(work: Callable[[], None]) -> None:
    """Run what cannot be stopped on a thread that can be left behind, so that a cancel need not wait for it."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # handed on to the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="fetch", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _own_stdout() -> int:
    """Keep standard output for frames alone: whatever a library prints goes to standard error from here on."""
    own = os.dup(1)
    os.dup2(2, 1)
    return own


@contextlib.contextmanager
def _cancel_on_sigterm() -> Iterator[None]:
    def cancel(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stopped

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
