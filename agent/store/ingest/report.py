"""What an ingest or a publish says while it works: frames on a pipe, so few that they never slow it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from typing import Final

from schema.errors import Fault
from schema.link import Committing, Message, OperationDone, Progress, encode_frame
from schema.states import Tier

__all__ = ["Reporter"]

_INTERVAL_S: Final = 0.1
_log = logging.getLogger(__name__)


class Reporter:
    """Writes `Progress` at most ten times a second, of an ingest `Committing`, and one `OperationDone`. Safe to call from
    several threads. What nobody reads any more is not written."""

    def __init__(self, descriptor: int, op: str) -> None:
        self._descriptor = descriptor
        self._op = op
        self._lock = threading.Lock()
        self._said_at = 0.0

    def end_unheard(self) -> None:
        """From now on cancel this process, as SIGTERM does, once nobody reads its frames any more: who asked has gone."""
        threading.Thread(target=self._watch, name="watch the reader", daemon=True).start()

    def progress(self, stage: str, done_bytes: int, total_bytes: int, source: Tier) -> None:
        """Say how far it is, unless something was just said."""
        with self._lock:
            now = time.monotonic()
            if now - self._said_at < _INTERVAL_S:
                return
            self._said_at = now
            step = Progress(op=self._op, stage=stage, done_bytes=done_bytes, total_bytes=total_bytes, source=source)
            self._write(step)

    def committing(self, digest: str) -> None:
        """Say which checkpoint is about to be put where it is found."""
        with self._lock:
            self._write(Committing(op=self._op, digest=digest))

    def done(self, digest: str, fault: Fault | None, layout: str = "", note: str = "", read_bytes: int = 0) -> None:
        """Say how it ended."""
        with self._lock:
            done = OperationDone(op=self._op, digest=digest, layout=layout, fault=fault, note=note, read_bytes=read_bytes)
            self._write(done)

    def _write(self, message: Message) -> None:
        view = memoryview(encode_frame(message))
        with contextlib.suppress(BrokenPipeError):
            while view:
                view = view[os.write(self._descriptor, view) :]

    def _watch(self) -> None:
        gone = select.poll()
        gone.register(self._descriptor, 0)  # an error is told unasked: the pipe has no reader
        gone.poll()
        _log.warning("the agent that asked for this has gone; ending")
        os.kill(os.getpid(), signal.SIGTERM)
