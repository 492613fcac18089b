"""Memory spread over the machine's NUMA nodes, page by page, where it has several."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from pathlib import Path
from typing import Final

from agent.native.address import address_of

__all__ = ["interleave", "online_nodes"]

_ONLINE: Final = Path("/sys/devices/system/node/online")
_MBIND: Final = {"x86_64": 237, "aarch64": 235}
_INTERLEAVE: Final = 3
_MAX_NODES: Final = 1024
_log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_mbind = ctypes.CFUNCTYPE(
    ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong,
    ctypes.c_ulong, use_errno=True,
)(("syscall", _libc))  # fmt: skip


def online_nodes(text: str) -> list[int]:
    """The numbers in a kernel's list: ``0-1,4`` is 0, 1 and 4."""
    nodes: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        nodes.extend(range(int(first), int(last or first) + 1))
    return nodes


def interleave(memory: mmap.mmap, nodes: list[int] | None = None) -> bool:
    """Spread the pages of a shared mapping over all nodes, for whoever touches them; True where there are several.

    The policy is the memory's, not the mapping's: it holds for every process that maps it. Without it, pages come from the
    node of whatever thread touches them first, and half of the machine's memory bandwidth stays unused.
    """
    if nodes is None:
        try:
            nodes = online_nodes(_ONLINE.read_text())
        except (OSError, ValueError):
            return False
        if len(nodes) < 2:
            return False
    number = _MBIND.get(os.uname().machine)
    if number is None or max(nodes) >= _MAX_NODES:
        return False
    mask = ctypes.create_string_buffer(sum(1 << node for node in nodes).to_bytes(_MAX_NODES // 8, "little"))
    with memoryview(memory) as view:
        address = address_of(view)
    if _mbind(number, address, len(memory), _INTERLEAVE, ctypes.addressof(mask), _MAX_NODES, 0):
        _log.warning("the arena is not spread over NUMA nodes: %s", os.strerror(ctypes.get_errno()))
        return False
    return True
