"""Directories under the data directory's ``tmp`` and ``partial``: some live no longer than the process that made them, some
wait for the next.

Each is held with flock by its maker, so that what a killed process left can be told from what is being written. What a next
process can go on with has its key in its name, behind a plus.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from schema.errors import InvalidInput, OutOfSpace

__all__ = ["hold_kept", "kept_directory", "sweep", "sweep_left", "temporary_directory"]

_TRASH_S: Final = 600.0
_log = logging.getLogger(__name__)


def _hold(path: Path) -> int | None:
    """A descriptor that holds a directory until it is closed; None while another process holds it. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def hold_kept(path: Path) -> int | None:
    """Make a directory whose name has a key, if need be, and hold it until the descriptor is closed; None: another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):  # so that no sweep meets it before it is held
        path.mkdir(exist_ok=True)
        return _hold(path)


@contextlib.contextmanager
def temporary_directory(root: Path, kind: str) -> Iterator[Path]:
    """A fresh directory under ``root``, gone at the end unless it was moved away meanwhile."""
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):  # so that no sweep meets it before it is held
        path = Path(tempfile.mkdtemp(dir=root, prefix=f"{kind}-"))
        held = _hold(path)
        assert held is not None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)


@contextlib.contextmanager
def kept_directory(root: Path, kind: str, key: str) -> Iterator[Path]:
    """The directory of this key, with whatever an earlier process left in it; a fresh one while another process has it.

    Gone at the end, and after an error that another try would meet again; after any other it waits for that try, as it does
    when the budget was short of what making room would give.
    """
    path = root / f"{kind}+{key}"
    held = hold_kept(path)
    if held is None:
        with temporary_directory(root, kind) as path:
            yield path
        return
    keep = False
    try:
        yield path
    except BaseException as error:
        final = isinstance(error, InvalidInput) or (isinstance(error, OutOfSpace) and not error.short_bytes)
        keep = not final and any(files for _, _, files in os.walk(path))
        raise
    finally:
        with _locked(root):  # so that nobody opens what is just going
            if not keep:
                shutil.rmtree(path, ignore_errors=True)
            os.close(held)


def sweep(root: Path, older_than_s: float = 0.0, *, kept_alone: bool = False) -> list[str]:
    """Delete what processes that are no more left under ``root``; returns the names.

    What can be gone on with only when nobody has touched it for ``older_than_s``; ``kept_alone``: nothing else. What is being
    removed is its remover's, unless that has not been heard of for ten minutes.
    """
    if not root.is_dir():
        return []
    swept = []
    with _locked(root):
        for path in sorted(root.iterdir()):
            # What is being removed by others may be gone at any moment; what cannot be read is left to people.
            with contextlib.suppress(OSError):
                kept = "+" in path.name
                trash = path.name.startswith("trash-")  # was moved here, which its ctime tells alone
                latest = max(_newest(path), path.stat().st_ctime) if trash else _newest(path)
                age_s = older_than_s if kept else _TRASH_S if trash else 0.0
                if path.is_symlink() or (kept_alone and not kept) or (age_s and time.time() - latest < age_s):
                    continue
                held = _hold(path)
                if held is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(held)
                    swept.append(path.name)
    return swept


def sweep_left(data: Path, keep_s: float) -> None:
    """`sweep` a data directory of all that killed ingests, fetches and removals have left: a disk's worth of bytes, and no
    checkpoint's. What can be gone on with is kept for ``keep_s``."""
    for place in ("tmp", "partial"):
        for name in sweep(data / place, keep_s):
            _log.info("deleted %s/%s, which a process has left", place, name)


def _newest(path: Path) -> float:
    """When a file in a directory was last written, or the directory if there is none, in seconds since the epoch.

    Raises FileNotFoundError.
    """
    latest = 0.0
    for directory, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                latest = max(latest, (Path(directory) / name).lstat().st_mtime)
    return latest or path.stat().st_mtime


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
