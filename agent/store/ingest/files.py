"""A model directory as hostile input: files are opened by plain names, and never outside of it."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

from schema.errors import InvalidCheckpoint, NotFound, SllmError

__all__ = ["PLAIN_NAME", "SourceDirectory"]

PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,254}")
_SMALL_BYTES: Final = 128 << 20
_PASSING: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)
"""Of the machine's state, not of the model."""


class SourceDirectory:
    """Opens files of one directory. Symlinks count only when they end at a regular file in the directory itself or, for a
    snapshot of a hub's cache, in the cache's folder of that same model.

    Raises NotFound when there is no such directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))
        if not os.path.isdir(self.path):  # noqa: PTH112 - a name that is too long is an error for Path
            raise NotFound(f"{path} is no directory on this node; give the path of a Hugging Face model directory")
        self._allowed = [self.path]
        if self.path.parent.name == "snapshots" and self.path.parent.parent.name.startswith("models--"):
            self._allowed.append(self.path.parent.parent)

    def names(self) -> list[str]:
        """Names of the files in the directory that could be opened."""
        return sorted(path.name for path in self.path.iterdir() if PLAIN_NAME.fullmatch(path.name))

    def has(self, name: str) -> bool:
        """True when there is something of this name, whatever it is. Raises as `open` does when that cannot be seen."""
        try:
            os.lstat(self.path / name)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._refused(name, error) from error
        return True

    def open(self, name: str) -> tuple[int, int]:
        """A descriptor of the file, and its size in bytes.

        Raises InvalidCheckpoint when it is missing or not allowed, SllmError when the system fails to open it.
        """
        if PLAIN_NAME.fullmatch(name) is None:
            raise InvalidCheckpoint(f"{self.path}: {name!r} is no plain file name; names that leave the directory are refused")
        real = Path(os.path.realpath(self.path / name))
        if not any(real.is_relative_to(allowed) for allowed in self._allowed):
            raise InvalidCheckpoint(f"{self.path / name} is a link that leads out of the model's directory")
        try:
            # NONBLOCK: a FIFO in a file's place must not hold us up before it is recognised.
            descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise self._refused(name, error) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise InvalidCheckpoint(f"{self.path / name} is no regular file")
        return descriptor, status.st_size

    def _refused(self, name: str, error: OSError) -> SllmError:
        kind = SllmError if error.errno in _PASSING else InvalidCheckpoint
        return kind(f"cannot open {self.path / name}: {error.strerror}")

    def read(self, name: str, limit_bytes: int = _SMALL_BYTES) -> bytes:
        """All of a small file. Raises InvalidCheckpoint when it is larger than ``limit_bytes``, missing or not allowed."""
        descriptor, size = self.open(name)
        with os.fdopen(descriptor, "rb") as file:
            if size > limit_bytes:
                raise InvalidCheckpoint(f"{self.path / name} has {size} bytes; at most {limit_bytes} are read")
            return file.read(limit_bytes)
