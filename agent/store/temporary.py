"""Directories under the data directory's ``tmp`` that live no longer than the process that made them.

Each is held with flock by its maker, so that what a killed process left can be told from what is being written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["sweep", "temporary_directory"]


@contextlib.contextmanager
def temporary_directory(root: Path, kind: str) -> Iterator[Path]:
    """A fresh directory under ``root``, gone at the end unless it was moved away meanwhile."""
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):  # so that no sweep meets it before it is held
        path = Path(tempfile.mkdtemp(dir=root, prefix=f"{kind}-"))
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)


def sweep(root: Path) -> list[str]:
    """Delete what processes that are no more left under ``root``; returns the names."""
    if not root.is_dir():
        return []
    swept = []
    with _locked(root):
        for path in sorted(root.iterdir()):
            if path.is_dir() and not path.is_symlink() and not _is_held(path):
                shutil.rmtree(path, ignore_errors=True)
                swept.append(path.name)
    return swept


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
