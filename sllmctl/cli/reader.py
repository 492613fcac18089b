"""Whoever reads what a command says: it ends when they are gone, also while it has nothing to say."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator

__all__ = ["while_read"]


@contextlib.contextmanager
def while_read(break_off: Callable[[], None]) -> Iterator[None]:
    """A block that waits for what to write. Raises BrokenPipeError once nobody has the other end of stdout's pipe any more.

    The kernel tells that to whoever polls: a thread here, which then calls ``break_off``. With that, what the block waits for
    ends as Unreachable. Nothing is raised anywhere else: a signal may come in the middle of a library's own cleaning up.
    """
    from schema.errors import Unreachable

    try:
        output = sys.stdout.fileno()
    except OSError:
        yield  # no file: a test's, which is read to its end
        return
    left, leave = os.pipe()
    gone = threading.Event()

    def watch() -> None:
        poll = select.poll()
        for descriptor in (left, output):
            poll.register(descriptor, 0)  # errors and hang-ups are always told
        if left not in dict(poll.poll()):
            gone.set()
            break_off()

    watcher = threading.Thread(target=watch, name="reader of stdout", daemon=True)
    watcher.start()
    try:
        yield
    except Unreachable:
        if gone.is_set():
            raise BrokenPipeError from None
        raise
    finally:
        os.close(leave)
        watcher.join()
        os.close(left)
