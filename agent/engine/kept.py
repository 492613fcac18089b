"""Skeletons kept on disk: a model's modules on the meta device, pickled once; to read them takes a fifth of building them.

A pickle can run anything, so only files that this user alone can have written are read; they are made here, never fetched.
A skeleton depends on the code that made it, so its name carries the versions of all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import platform
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
import transformers
from torch import nn

from agent.engine.skeleton import build_skeleton
from agent.engine.transformers_runner import register
from schema.checkpoint import Manifest, encode_manifest
from schema.version import VERSION

__all__ = ["SkeletonCache"]

_KEPT: Final = 256
"""How many files stay; a model of 80 layers takes 200 KB."""
_ABANDONED_S: Final = 60.0
"""A file that is still being written after so long was left by a process that died; it takes milliseconds."""
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_log = logging.getLogger(__name__)


class SkeletonCache:
    """Skeletons of the checkpoints that ran on this node, in a directory of their own. What cannot be read is built anew."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def skeleton(self, manifest: Manifest) -> nn.Module:
        """The model of this manifest, as `build_skeleton` makes it. Raises InvalidCheckpoint as that does."""
        path = self._directory / f"{manifest.digest[:32]}-{_made_by(manifest)}.pickle"
        model = self._read(path)
        if model is None:
            model = build_skeleton(manifest)
            self._write(path, model)
        return model

    def _read(self, path: Path) -> nn.Module | None:
        try:
            with path.open("rb") as file:
                for held in (os.fstat(file.fileno()), self._directory.stat()):
                    if held.st_uid != os.geteuid() or held.st_mode & _WRITABLE_BY_OTHERS:
                        _log.warning("%s may have been written by others, and is not read", path)
                        return None
                register()
                model = pickle.load(file)  # noqa: S301  of this user's own making, see above
            os.utime(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # a file cut short, or of code that has changed: it fails in any way
            _log.warning("the skeleton %s cannot be read, and is built anew: %s", path, error)
            return None
        return model if isinstance(model, nn.Module) else None

    def _write(self, path: Path, model: nn.Module) -> None:
        """Best effort: a skeleton that cannot be kept is built again the next time."""
        new = path.with_suffix(f".{os.getpid()}.new")
        try:
            data = pickle.dumps(model, pickle.HIGHEST_PROTOCOL)
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
            new.replace(path)
            self._prune()
        except (OSError, pickle.PicklingError, TypeError, AttributeError) as error:
            _log.info("the skeleton %s is not kept: %s", path, error)
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Those longest unused go, and what nobody will finish."""
        used = sorted(self._files("*.pickle"), reverse=True)
        now = time.time()
        left = [(at, path) for at, path in self._files("*.new") if at < now - _ABANDONED_S]
        for _, path in (*used[_KEPT:], *left):
            path.unlink(missing_ok=True)

    def _files(self, pattern: str) -> Iterator[tuple[float, Path]]:
        """When each was last used, or written to."""
        for path in self._directory.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                yield path.stat().st_mtime, path


def _made_by(manifest: Manifest) -> str:
    """What a skeleton depends on beside its checkpoint's digest: the manifest as it is read here, and the code around it."""
    code = [(path.name, path.stat().st_mtime_ns) for path in sorted(Path(__file__).parent.glob("*.py"))]
    versions = f"{VERSION} {platform.python_version()} {torch.__version__} {transformers.__version__} {code}"
    return hashlib.sha256(versions.encode() + encode_manifest(manifest)).hexdigest()[:16]
