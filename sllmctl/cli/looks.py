"""How `sllmctl doctor` looks without being held up: what gives no answer is a finding, and the other checks go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

from sllmctl.cli.findings import Finding

__all__ = ["Check", "Look", "hung", "look_in_time"]

T = TypeVar("T")
Check = tuple[str, Callable[[], Finding]]
"""A check's id, and what looks and judges."""
HANG_S = 10.0
"""Longer than any look takes of itself: the database's is broken off after half of it."""


class Look(Generic[T]):
    """Something that is looked up from now on, in a thread of its own.

    Nothing ends a call into a file system whose server is away, so such a thread is left to the end of the process.
    """

    def __init__(self, look: Callable[[], T]) -> None:
        self._until = time.monotonic() + HANG_S
        self._answer: Future[T] = Future()
        threading.Thread(target=self._take, args=(look,), name="look", daemon=True).start()

    def get(self) -> T:
        """What it found. Raises what it raised, and TimeoutError when `HANG_S` have passed since it began."""
        return self._answer.result(max(0.0, self._until - time.monotonic()))

    def _take(self, look: Callable[[], T]) -> None:
        try:
            self._answer.set_result(look())
        except BaseException as error:
            self._answer.set_exception(error)


def look_in_time(checks: Iterable[Check]) -> Iterator[Finding]:
    """Their findings, in their order. All look at once, so several that hang take no longer than one."""
    begun = [(check, Look(judge)) for check, judge in checks]
    for check, look in begun:
        try:
            yield look.get()
        except TimeoutError:
            yield hung(check)
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            yield Finding(check, "fault", f"cannot be looked at: {what}", "mend this disk or mount, or name another place")


def hung(check: str) -> Finding:
    """What a check says that has no answer."""
    advice = "`timeout 5 df` tells which mount hangs: mend or unmount it, or set state_dir or node.data_dir to another"
    return Finding(check, "fault", f"no answer within {HANG_S:g} s: a file system or a driver hangs", advice)
