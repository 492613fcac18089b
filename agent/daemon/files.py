"""Small files that must be whole or absent: atomic writes, private directories, and the lock of a process's life."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from pathlib import Path

from schema.errors import Conflict, InvalidInput

__all__ = ["FileLock", "is_locked", "private_directory", "write_atomic"]

_POLL_S = 0.02


def private_directory(path: Path) -> None:
    """Make the directory, mode 0700, with its parents. Raises InvalidInput when it cannot be made or is another user's."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.geteuid():
            raise InvalidInput(f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}; choose another directory")
        if stat.S_IMODE(status.st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise InvalidInput(f"cannot make the directory {path}: {error.strerror}") from error


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace ``path`` (mode 0600) by ``data``, whole or not at all; ``durable`` also survives a power loss.

    Raises OSError.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    if durable:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class FileLock:
    """An flock on a file, held as long as the process lives or until `release`, which also removes the file."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, what: str, timeout_s: float = 1.0) -> FileLock:
        """Hold the lock. Raises Conflict when another process still has it after ``timeout_s``.

        The wait lets pass those who only look whether the lock is held.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                if time.monotonic() >= deadline:
                    raise Conflict(f"another {what} holds {path}; stop it first, or use another run directory") from None
                time.sleep(_POLL_S)
                continue
            if _is_same_file(descriptor, path):
                return cls(path, descriptor)
            os.close(descriptor)  # the last holder removed the file between our open and our lock

    def release(self) -> None:
        """Remove the file, then let go: nobody can lock a file that is no longer there by this name."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._descriptor)


def is_locked(path: Path) -> bool:
    """True while some process holds the lock on ``path``."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)
