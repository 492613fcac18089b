"""Waiting for a model with its progress on stderr, by asks that the manager holds until there is something to say."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from sllmctl.cli.diagnostics import ProgressLine, note

if TYPE_CHECKING:
    from schema.admin import ModelView
    from sllmctl.client import Call, Until

__all__ = ["Asked", "Patience", "PatientClient", "told_of", "wait_for"]

T = TypeVar("T")
_AGAIN_S: Final = 0.2
_HOLD_TERMINAL_S, _HOLD_LOG_S = 0.5, 5.0
_DOING = {"ingested": "ingesting", "ready": "starting", "stopped": "stopping", "gone": "removing"}


@dataclass(slots=True)
class Patience:
    """``timeout_s`` seconds from now for all that a command waits for: every answer of the manager's, and what is to come."""

    timeout_s: float
    _ends_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now: until now a person was waited for."""
        self._ends_at = time.monotonic() + self.timeout_s

    @property
    def left_s(self) -> float:
        """What is left of it, 0 when it has run out."""
        return max(0.0, self._ends_at - time.monotonic())

    def hold_s(self, longest_s: float) -> float:
        """How long the manager may hold its next answer: half of what is left at most, so that it comes before the end does."""
        return min(longest_s, self.left_s / 2)

    def __str__(self) -> str:
        return f"{self.timeout_s:g} s"


class Asked(Protocol):
    """A manager that is asked, in whatever way."""

    def ask(self, call: Call[T]) -> T: ...


@dataclass(frozen=True, slots=True)
class PatientClient:
    """Asks a manager that may not be there yet, or that is away for a restart: again and again as long as the patience lasts,
    which is ``admin``'s own limit.

    Only for what may be asked twice. What no wait can mend is raised at once: a socket of another user's, or no socket at all.
    """

    admin: Asked
    patience: Patience

    def ask(self, call: Call[T]) -> T:
        """The answer. Raises what the client raises; NoManager only through NoAnswer, since it has the same patience."""
        from sllmctl.client import NoManager

        with ProgressLine() as line:
            while True:
                try:
                    return self.admin.ask(call)
                except NoManager as error:
                    line.show(f"waiting for a manager: {error}", None)
                    time.sleep(min(_AGAIN_S, self.patience.left_s))


@contextlib.contextmanager
def told_of(noun: str, name: str) -> Iterator[None]:
    """What goes wrong with a thing is raised under its name, since others may be waited for beside it."""
    from schema.errors import Fault, SllmError, Unreachable
    from sllmctl.client import NoAnswer

    try:
        yield
    except (Unreachable, NoAnswer):
        raise
    except SllmError as error:
        if any(f"{noun} {said}" in error.message for said in (name, repr(name))):
            raise
        raise Fault(error.code, f"{noun} {name}: {error.message}").to_error() from error


def _held_up(until: Until, model: ModelView) -> str:
    """Why a model that is waited for does not start, where that is known."""
    if until != "ready":
        return ""
    if model.failing is not None:
        return f": {model.failing.fault.message}"
    return f": {model.no_place}" if model.no_place and not model.instances else ""


@contextlib.contextmanager
def _goes_on(name: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        note(f"what was begun goes on; `sllmctl model show {name}` says how far it is")
        raise


def wait_for(admin: Asked, name: str, until: Until, patience: Patience) -> ModelView | None:
    """The model once it is as waited for; None for one that is gone.

    Raises TimedOut when the patience has run out (what was begun goes on), and the model's fault when it fails meanwhile.
    """
    from schema.errors import NotFound, TimedOut
    from sllmctl import client

    hold_s = _HOLD_TERMINAL_S if sys.stderr.isatty() else _HOLD_LOG_S
    with told_of("model", name), _goes_on(name), ProgressLine() as line:
        while True:
            left_s = patience.left_s
            try:
                answer = admin.ask(client.wait_model(name, until, patience.hold_s(hold_s)))
            except NotFound:
                if until == "gone":
                    return None
                raise
            if answer.done:
                return answer.view
            if not left_s:
                raise TimedOut(
                    f"model {name} is not {until} after {patience}{_held_up(until, answer.view)}; "
                    f"it goes on, `sllmctl model show {name}` says how far it is"
                )
            line.show(f"{_DOING[until]} {name}{_held_up(until, answer.view)}", answer.view.progress)
