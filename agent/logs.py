"""Where a node's processes write: each into one file of its own, which it keeps within bounds itself.

Everything that a process says goes there, what native code prints included, since the file is its standard output and error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Final

from agent.config import NodeConfig
from schema.logs import LineFormatter, install

__all__ = ["LIMIT_BYTES", "OutputFile", "begin_log", "write_to"]

LIMIT_BYTES: Final = 4 << 20
"""A file that has grown to this is put aside as ``.1``, in place of the one before; so a process takes twice as much."""


class OutputFile(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes lines to standard error, and begins the file at ``path`` anew when it is full, if that is where they go."""

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        super().__init__(sys.stderr)
        self._path, self._limit_bytes = path, limit_bytes

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self.turn()

    def turn(self) -> None:
        """Put a full file aside. A file that cannot be is written on."""
        with contextlib.suppress(OSError):
            now = os.fstat(2)
            if now.st_size >= self._limit_bytes and os.path.samestat(now, self._path.stat()):
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                write_to(self._path)


def begin_log(role: str, path: Path, config: NodeConfig, **fields: object) -> OutputFile:
    """Log as this process of the node, to standard error; ``fields`` are on every line."""
    output = OutputFile(path)
    install(output, LineFormatter(role, config.log_format, fields), config.log_level)
    return output


def write_to(path: Path) -> None:
    """Make a file this process's standard output and error. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    finally:
        os.close(descriptor)
