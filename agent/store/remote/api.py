"""What a remote is: files under a URL, read by ranges, written whole. Three kinds stand behind it, chosen by the URL's scheme.

A layout lies on a remote as it does on disk, under ``<digest>/<layout>/``. Its manifest is written last: a layout without one
is not there yet. Methods block, may be called from several threads, and never name a credential in what they raise.
"""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol, TypeVar

from schema.errors import Cancelled, NotFound, TimedOut, Unauthorised, Unreachable
from schema.pauses import growing_pause_s
from schema.remote import RemoteSettings

__all__ = ["STALE_S", "STEADY_BYTES", "Body", "Forbidden", "Interrupted", "Patience", "Remote", "Source", "read_into"]

T = TypeVar("T")

Source = Callable[[int, int], memoryview]
"""The bytes of a file to be written: ``(offset, length)``; may be called from several threads."""


STALE_S: Final = 3600.0
"""A file that is being written, and of which nothing new has come for so long, was broken off with the process that wrote it:
each request of one that goes on has ended, or failed, within minutes."""


STEADY_BYTES: Final = 256 << 10
"""What a connection must have brought in `RemoteSettings.part_s` to count as slow; one that has brought less stands still. With
the 300 s and the 8 connections of a fetch that are the default it is a link of 56 kbit/s."""


class Interrupted(Unreachable):
    """A remote failed in a way that may pass: a 5xx, a timeout, a connection that broke, a body that was short."""


class Forbidden(Unauthorised):
    """A remote answers 403: it may not be read. S3 says so of what is not there, too, unless the bucket may be listed."""


class Body(ABC):
    """A range that is being read, front to back."""

    @abstractmethod
    def some(self, view: memoryview) -> int:
        """What comes next, at least a byte and at most as many as ``view`` has. Raises Interrupted where there are no more."""

    def fill(self, view: memoryview) -> None:
        """The next bytes, exactly as many as ``view`` has. Raises Interrupted where they end early."""
        while view:
            view = view[self.some(view) :]


class Remote(Protocol):
    """One remote, by its URL. Paths are relative to it, with slashes.

    All raise Interrupted for what may pass, NotFound for what is not there, Unauthorised where access is refused, Cancelled
    after `abort`.
    """

    @property
    def url(self) -> str: ...

    def where(self, path: str) -> str:
        """The path as people know it, for messages."""

    def open(
        self, path: str, offset: int, length: int, *, total_bytes: int | None = None, deadline: float | None = None
    ) -> AbstractContextManager[Body]:
        """Read ``length`` bytes from ``offset`` on. Raises InvalidCheckpoint when the file has not ``total_bytes``.

        ``deadline`` is of the monotonic clock; what is not read by then raises Interrupted.
        """

    def read(self, path: str, limit_bytes: int, part_s: float | None = None) -> bytes:
        """A whole small file. Raises InvalidCheckpoint when it is longer than ``limit_bytes``, Interrupted when in ``part_s``
        neither `STEADY_BYTES` of it have come nor the rest."""

    def size(self, path: str) -> int | None:
        """A file's size, None where there is none."""

    def children(self, path: str) -> list[str]:
        """Names of the directories in a directory, none if it is not there. Raises InvalidInput where that cannot be asked."""

    def write(self, path: str, size_bytes: int, source: Source, wrote: Callable[[int], None]) -> None:
        """Write a file, visible only as a whole; ``wrote`` hears of the bytes as they go. Raises OutOfSpace, InvalidInput
        where a remote of this kind is only read."""

    def abort(self) -> None:
        """End whatever is under way, from any thread, and all that comes after it, as Cancelled."""

    def close(self) -> None: ...


def read_into(remote: Remote, path: str, offset: int, view: memoryview) -> None:
    """Read a range into memory."""
    with remote.open(path, offset, len(view)) as body:
        body.fill(view)


class Patience:
    """How often something is tried again that may pass, with growing, jittered delays; ``stopped`` ends a delay at once."""

    _FIRST_S: Final = 0.1

    def __init__(self, settings: RemoteSettings, stopped: threading.Event) -> None:
        self._settings = settings
        self._stopped = stopped
        self._failures = 0

    def progress(self) -> None:
        """It went on meanwhile: count anew."""
        self._failures = 0

    def failed(self, error: Interrupted) -> None:
        """Wait before the next try. Raises Unreachable after the last one, Cancelled when stopped."""
        self._failures += 1
        if self._failures >= self._settings.attempts:
            raise Unreachable(f"{error} (tried {self._failures} times)") from error
        delay_s = growing_pause_s(self._FIRST_S, self._settings.longest_delay_s, self._failures)
        if self._stopped.wait(delay_s * random.uniform(0.5, 1.0)):  # noqa: S311 - a jitter, no secret
            raise Cancelled("the transfer was cancelled")

    def ask(self, question: Callable[[], T]) -> T:
        """The answer to a question that may be asked again; having one is progress."""
        while True:
            try:
                answer = question()
            except Interrupted as error:
                self.failed(error)
            else:
                self.progress()
                return answer


def left_s(deadline: float | None, limit_s: float, what: str) -> float:
    """How long to wait at most, until ``deadline`` and no longer than ``limit_s``. Raises TimedOut when it has passed."""
    if deadline is None:
        return limit_s
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimedOut(f"{what} did not come in time")
    return min(left, limit_s)


def nothing_there(where: str) -> NotFound:
    return NotFound(f"{where} does not exist; publish the checkpoint there first, or name another remote")
