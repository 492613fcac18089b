"""What a tokenizer's library raises over a checkpoint's files and texts, as the fault of that checkpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Final

from schema.errors import InvalidCheckpoint

__all__ = ["checkpoint_at_fault"]

_log = logging.getLogger(__name__)
_PANICS: Final = "pyo3_runtime"
"""The module of Rust's panics in Python, which are no `Exception`: no handler of the server's would take them for an error."""


@contextlib.contextmanager
def checkpoint_at_fault(what: str) -> Iterator[None]:
    """Raises InvalidCheckpoint, which says ``what`` cannot be done, for whatever the library raises in here: of an error also
    why; a panic's words mean something to the library's authors alone, and go to the log."""
    try:
        yield
    except Exception as error:  # the library raises no narrower one for whatever can be wrong in a file
        raise InvalidCheckpoint(f"{what}: {error}") from error
    except BaseException as error:
        if type(error).__module__ != _PANICS:
            raise
        _log.error("%s: the tokenizers library panicked: %s", what, error)
        raise InvalidCheckpoint(
            f"{what}: the tokenizers library broke down over it; the manager's log has its words"
        ) from error
