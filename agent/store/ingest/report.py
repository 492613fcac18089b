"""What an ingest or a publish says while it works: frames on a pipe, so few that they never slow it."""

from __future__ import annotations

import os
import threading
import time
from typing import Final

from schema.errors import Fault
from schema.link import Message, OperationDone, Progress, encode_frame

__all__ = ["Reporter"]

_INTERVAL_S: Final = 0.1


class Reporter:
    """Writes `Progress` at most ten times a second, and one `OperationDone`. Safe to call from several threads."""

    def __init__(self, descriptor: int, op: str) -> None:
        self._descriptor = descriptor
        self._op = op
        self._lock = threading.Lock()
        self._said_at = 0.0

    def progress(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        """Say how far it is, unless something was just said."""
        with self._lock:
            now = time.monotonic()
            if now - self._said_at < _INTERVAL_S:
                return
            self._said_at = now
            self._write(Progress(op=self._op, stage=stage, done_bytes=done_bytes, total_bytes=total_bytes))

    def done(self, digest: str, fault: Fault | None, layout: str = "", note: str = "") -> None:
        """Say how it ended."""
        with self._lock:
            self._write(OperationDone(op=self._op, digest=digest, layout=layout, fault=fault, note=note))

    def _write(self, message: Message) -> None:
        view = memoryview(encode_frame(message))
        while view:
            view = view[os.write(self._descriptor, view) :]
