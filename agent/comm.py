"""What the system calls a process of a node, so that forks of the zygote can be told from it."""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["name_process"]


def name_process(role: str) -> None:
    """Be ``sllm-ROLE`` for top, pstree, the journal and the kernel's report of who was killed for want of memory, which keep 15
    bytes of it; the command line stays that of whoever forked this process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"sllm-{role}")
