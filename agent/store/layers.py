"""Which layers of a model are usable when so much of its image has arrived: tensors lie in execution order."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Final

from schema.checkpoint import Manifest

__all__ = ["Layers"]

_LAYER: Final = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


class Layers:
    """The layers of a checkpoint in execution order, and how many of them are whole. What comes before the first (embeddings)
    belongs to it, what comes after the last (the head) to none: it has come when the image has."""

    def __init__(self, manifest: Manifest) -> None:
        ends: dict[int, int] = {}
        for entry in manifest.tensors:
            found = _LAYER.search(entry.name)
            if found is not None:
                end = manifest.partitions[entry.partition].start_bytes + entry.offset_bytes + entry.size_bytes
                ends[int(found[1])] = max(ends.get(int(found[1]), 0), end)
        self._ends: list[int] = []
        for layer in sorted(ends):
            self._ends.append(max(ends[layer], self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return len(self._ends)

    def usable(self, usable_bytes: int) -> int:
        """How many layers lie whole in the first ``usable_bytes`` of the image."""
        return bisect_right(self._ends, usable_bytes)
