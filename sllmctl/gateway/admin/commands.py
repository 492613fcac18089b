"""What the routes that change something share: how they ask the control loop, and what they may be refused with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from schema.errors import Conflict, InvalidCheckpoint, NotFound, OutOfSpace, Overloaded, TimedOut, Unreachable, Unschedulable
from sllmctl.control.events import Event
from sllmctl.gateway.errors import BodyTooLarge, UnsupportedMediaType

__all__ = ["BODY", "COMMAND", "RunnerPort"]

COMMAND = (NotFound, Conflict, InvalidCheckpoint, Overloaded, Unschedulable, Unreachable, TimedOut, OutOfSpace)
"""What the control loop may refuse a command with."""
BODY = (BodyTooLarge, UnsupportedMediaType)
"""What a request with a body may be refused with beside."""


class RunnerPort(Protocol):
    async def ask(self, make: Callable[[int], Event]) -> Any:
        """Have the control loop take in an event, and return what it tells; raises its refusal."""
