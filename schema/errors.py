"""The one tree of errors, and the form in which an error crosses a link.

Each class is mapped once to an HTTP status (sllmctl.gateway.errors) and once to an exit code (sllmctl.cli.diagnostics)::

    SllmError                 internal               something of ours failed
    ├── InvalidInput          invalid_input          a config, spec, body or argument is wrong; says where
    │   ├── InvalidCheckpoint invalid_checkpoint     a model directory or manifest is corrupt, hostile or unsupported
    │   └── ContextOverflow   context_overflow       prompt and reply do not fit the model's context
    ├── Unauthorised          unauthorised           no key, or a wrong one
    ├── NotFound              not_found              no such model, node, instance, checkpoint
    ├── Conflict              conflict               taken, already there, or in the wrong state
    ├── Overloaded            overloaded             a bounded queue is full; carries retry_after_s
    ├── Unschedulable         unschedulable          no node can hold it; carries the reasons
    ├── Unreachable           unreachable            a manager, agent or worker does not answer
    ├── TimedOut              timed_out              a wait named in the configuration ran out
    ├── Cancelled             cancelled              the asker went away or an operator stopped it
    ├── OutOfSpace            out_of_space           a disk, the arena or a device is full
    └── LinkError             link_error             a peer broke the protocol: bad frame, gap, wrong version
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

__all__ = [
    "Cancelled",
    "Conflict",
    "ContextOverflow",
    "Fault",
    "InvalidCheckpoint",
    "InvalidInput",
    "LinkError",
    "NotFound",
    "OutOfSpace",
    "Overloaded",
    "SllmError",
    "TimedOut",
    "Unauthorised",
    "Unreachable",
    "Unschedulable",
]


class SllmError(Exception):
    """Root of every error this project raises; ``str()`` says what happened, to what, and what to do next."""

    code: ClassVar[str] = "internal"
    by_code: ClassVar[dict[str, type[SllmError]]] = {}

    def __init_subclass__(cls) -> None:
        # Only this tree crosses links; a part's own subclass of one of these classes arrives as what it is a kind of.
        if cls.__module__ == __name__:
            SllmError.by_code[cls.code] = cls

    @property
    def message(self) -> str:
        return str(self)


class InvalidInput(SllmError):
    """A config, spec, body or argument is wrong. ``param`` names the key at fault, dotted, where there is one."""

    code = "invalid_input"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidCheckpoint(InvalidInput):
    """A model directory or manifest is corrupt, hostile, or of an architecture that cannot be run exactly."""

    code = "invalid_checkpoint"


class ContextOverflow(InvalidInput):
    """The prompt, or prompt and requested reply, exceed the model's context."""

    code = "context_overflow"


class Unauthorised(SllmError):
    """No key was given, or one that is not valid here."""

    code = "unauthorised"


class NotFound(SllmError):
    """The named thing does not exist."""

    code = "not_found"


class Conflict(SllmError):
    """The thing is taken, exists already, or is in a state that does not allow this."""

    code = "conflict"


class Overloaded(SllmError):
    """A bounded queue is full; try again after ``retry_after_s`` seconds."""

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unschedulable(SllmError):
    """No node can hold the model now or after evictions; the message carries the reasons. ``retry_after_s``: until it is tried
    again by itself, None when only a change can help."""

    code = "unschedulable"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unreachable(SllmError):
    """A manager, agent, store or worker does not answer."""

    code = "unreachable"


class TimedOut(SllmError):
    """A wait whose length is named in the configuration ran out."""

    code = "timed_out"


class Cancelled(SllmError):
    """The asker went away, or an operator stopped the work."""

    code = "cancelled"


class OutOfSpace(SllmError):
    """A disk, the arena or a device has no room; nothing was lost. ``short_bytes`` are missing, where making room would do."""

    code = "out_of_space"

    def __init__(self, message: str, short_bytes: int = 0) -> None:
        super().__init__(message)
        self.short_bytes = short_bytes


class LinkError(SllmError):
    """A peer broke the protocol: garbage, an oversized frame, a gap in tokens, an incompatible version."""

    code = "link_error"


class Fault(msgspec.Struct, frozen=True):
    """An error as it crosses a link or lies in a table: the class's code and the message; ``short_bytes`` of an OutOfSpace."""

    code: str
    message: str
    short_bytes: int = 0

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """The fault for any exception; one that is not ours becomes ``internal`` and keeps its type's name."""
        if isinstance(error, SllmError):
            return cls(error.code, error.message, getattr(error, "short_bytes", 0))
        return cls("internal", f"{type(error).__name__}: {error}")

    def to_error(self) -> SllmError:
        """The exception for this fault; an unknown code becomes plain SllmError."""
        error = SllmError.by_code.get(self.code, SllmError)(self.message)
        if isinstance(error, OutOfSpace):
            error.short_bytes = self.short_bytes
        return error
