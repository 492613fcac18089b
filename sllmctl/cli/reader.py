"""Whoever reads what a command says: it ends when they are gone, also while it has nothing to say."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

from sllmctl.cli.diagnostics import ReaderGone

__all__ = ["while_read"]

_AGAIN_MS = 100
"""A signal that comes just before a call that blocks does not end that call."""


@contextlib.contextmanager
def while_read() -> Iterator[None]:
    """A block that waits for what to write. Raises ReaderGone in it once nobody has the other end of stdout's pipe any more.

    The kernel tells that to whoever polls, a thread here; SIGUSR1 then brings this thread, the main one, out of what it waits
    in. SIGPIPE would not do: writing to any other closed pipe or socket raises it too.
    """
    try:
        output = sys.stdout.fileno()
    except OSError:
        yield  # no file: a test's, which is read to its end
        return
    over = False

    def end(*_: object) -> None:
        nonlocal over
        if not over:
            over = True
            raise ReaderGone

    before = signal.signal(signal.SIGUSR1, end)
    left, leave = os.pipe()
    watcher = threading.Thread(target=_watch, args=(output, left, threading.get_ident()), name="reader of stdout", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over = True
        os.close(leave)
        watcher.join()
        signal.signal(signal.SIGUSR1, before)
        os.close(left)


def _watch(output: int, left: int, writer: int) -> None:
    """Until ``left`` is closed at its other end."""
    poll = select.poll()
    poll.register(left, 0)
    poll.register(output, 0)  # errors and hang-ups are always told
    if left in dict(poll.poll()):
        return
    poll.unregister(output)
    signal.pthread_kill(writer, signal.SIGUSR1)
    while not poll.poll(_AGAIN_MS):
        signal.pthread_kill(writer, signal.SIGUSR1)
