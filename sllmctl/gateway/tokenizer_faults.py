"""What a tokenizer's library raises over a checkpoint's files and texts, as the fault of that checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from schema.errors import InvalidCheckpoint

__all__ = ["checkpoint_at_fault"]

_PANICS: Final = "pyo3_runtime"
"""The module of Rust's panics in Python, which are no `Exception`: no handler of the server's would take them for an error."""


@contextlib.contextmanager
def checkpoint_at_fault(what: str) -> Iterator[None]:
    """Raises InvalidCheckpoint, which says ``what`` cannot be done and why, for whatever the library raises in here."""
    try:
        yield
    except BaseException as error:
        # The library raises bare Exception for whatever can be wrong in a file, and panics for the rest.
        if not isinstance(error, Exception) and type(error).__module__ != _PANICS:
            raise
        raise InvalidCheckpoint(f"{what}: {error}") from error
