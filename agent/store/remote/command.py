"""The publish child: one operation, progress and its end as frames on standard output, then gone."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path, PurePosixPath
from types import FrameType

from agent.config import NodeConfig, load_config
from agent.logs import begin_log
from agent.store import catalog
from agent.store.ingest.report import Reporter
from agent.store.remote.open import open_remote
from agent.store.remote.publish import publish
from schema.errors import Cancelled, Fault, InvalidInput, SllmError
from schema.states import Tier

__all__ = ["main"]

_log = logging.getLogger(__name__)


def main(run_dir: str | Path, op: str, directory: str, url: str) -> int:
    """Publish the checkpoint in ``directory`` of this node to the remote at ``url``. Returns 0, or 1 after a fault.

    SIGTERM cancels: what was written of the file under way is taken back where the remote can do that.
    """
    own = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error from here on
    reporter = Reporter(own, op)
    try:
        config = load_config(Path(run_dir))
        begin_log("publish", config.log_path / "publish.log", config, operation=op)
        entry, mended = _publish(config, directory, url, reporter)
    except Exception as error:  # the agent must hear of every end
        if not isinstance(error, SllmError):
            _log.exception("publish failed")
        reporter.done("", Fault.of(error))
        return 1
    note = ""
    if mended:
        note = f"{', '.join(mended)} lay there with other bytes than its manifest says, and was written anew"
        _log.warning("%s: %s", url, note)
    reporter.done(entry.digest, None, entry.manifest.layout, note, entry.manifest.image_bytes)
    return 0


def _publish(config: NodeConfig, directory: str, url: str, reporter: Reporter) -> tuple[catalog.CatalogEntry, tuple[str, ...]]:
    relative = PurePosixPath(directory)
    if relative.is_absolute() or ".." in relative.parts:
        raise InvalidInput(f"the directory {directory!r} is not one within the node's checkpoints")
    entry = catalog.read_entry(config.checkpoints_path / relative)
    remote = open_remote(url, config.remote)
    stopped = threading.Event()

    def cancel(number: int, frame: FrameType | None) -> None:
        stopped.set()
        remote.abort()

    def progress(done_bytes: int, total_bytes: int) -> None:
        reporter.progress("publish", done_bytes, total_bytes, Tier.DISK)

    before = signal.signal(signal.SIGTERM, cancel)
    reporter.end_unheard()
    try:
        mended = publish(entry, remote, config.remote, progress, stopped)
    except SllmError as error:
        if stopped.is_set():
            raise Cancelled("the publish was cancelled; its manifest was not written, so nobody fetches it") from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        remote.close()
    return entry, mended
