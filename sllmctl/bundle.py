"""The single file that `./install.sh bundle` builds, seen from inside: where it lies unpacked, and what older ones have left.

pex makes it, and unpacks it at its first start to an environment of its own below ``~/.cache/sllmctl/bundle-<build>/`` (or
PEX_ROOT), under a temporary name and a lock. What runs from there, children included, runs as from any installation.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

__all__ = ["old_builds", "remove_old_builds", "unpacked_root"]

_PREFIX = "bundle-"
_FRESH_S = 3600.0
"""One that was unpacked so lately may be about to run."""


def unpacked_root(prefix: str = sys.prefix) -> Path | None:
    """The directory below which this process's bundle lies unpacked; None when it runs from no bundle."""
    if not Path(prefix, "PEX-INFO").is_file():
        return None
    environment = Path(prefix).resolve()
    return next((above.parent for above in environment.parents if above.name == "venvs"), environment)


def old_builds(root: Path) -> list[Path]:
    """What other builds have left beside ``root``, and no process runs from."""
    if not root.name.startswith(_PREFIX):
        return []  # named by PEX_ROOT: what lies beside it is not ours
    others = [path for path in root.parent.glob(f"{_PREFIX}*") if path.name != root.name and _age_s(path) > _FRESH_S]
    if not others:
        return []
    used = _directories_run_from()
    return sorted(path for path in others if not any(path in directory.parents for directory in used))


def remove_old_builds(root: Path) -> list[Path]:
    """Remove them, and return what could be removed."""
    gone = []
    for path in old_builds(root):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            gone.append(path)
    return gone


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _directories_run_from() -> set[Path]:
    """Real directories of what processes were started from or with, as far as a build may be meant.

    The way there may lead over links, as where a home directory is one; the last step does too, to the system's Python.
    """
    found: set[bytes] = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended meanwhile
        found.update(os.path.dirname(each) for each in arguments if f"/{_PREFIX}".encode() in each)  # noqa: PTH120
    return {Path(os.fsdecode(each)).resolve() for each in found if each.startswith(b"/")}
