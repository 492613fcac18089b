"""Waiting for a model with its progress on stderr, by asks that the manager holds until there is something to say."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sllmctl.cli.diagnostics import ProgressLine, note

if TYPE_CHECKING:
    from schema.admin import ModelView
    from sllmctl.client import AdminClient, Until

__all__ = ["wait_for"]

_HOLD_TERMINAL_S, _HOLD_LOG_S = 0.5, 5.0
_DOING = {"ingested": "ingesting", "ready": "starting", "stopped": "stopping", "gone": "removing"}


@contextlib.contextmanager
def _goes_on(name: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        note(f"what was begun goes on; `sllmctl model show {name}` says how far it is")
        raise


def wait_for(admin: AdminClient, name: str, until: Until, timeout_s: float) -> ModelView | None:
    """The model once it is as waited for; None for one that is gone.

    Raises TimedOut after ``timeout_s`` (what was begun goes on), and the model's fault when it fails meanwhile.
    """
    from schema.errors import NotFound, TimedOut
    from sllmctl import client

    hold_s = _HOLD_TERMINAL_S if sys.stderr.isatty() else _HOLD_LOG_S
    deadline = time.monotonic() + timeout_s
    with _goes_on(name), ProgressLine() as line:
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                answer = admin.ask(client.wait_model(name, until, min(hold_s, left_s)))
            except NotFound:
                if until == "gone":
                    return None
                raise
            if answer.done:
                return answer.view
            line.show(f"{_DOING[until]} {name}", answer.view.progress)
    raise TimedOut(
        f"model {name} is not {until} after {timeout_s:g} s; it goes on, `sllmctl event ls --object {name}` says how"
    )
