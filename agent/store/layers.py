"""Which layers of a model are usable when so much of its image has arrived: tensors lie in execution order."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from schema.checkpoint import Manifest, Partition, TensorEntry

__all__ = ["LAYER", "Layers", "layer_ends"]

LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.(\d{1,6})\.")
"""Up to where the name of a tensor is that of its layer; a checkpoint of the bare model has nothing before it."""


def layer_ends(tensors: Sequence[TensorEntry], partitions: Sequence[Partition]) -> tuple[int, ...]:
    """Up to which byte of the image each layer reaches, in execution order; empty for a model that names no layers."""
    ends: dict[int, int] = {}
    for entry in tensors:
        found = LAYER.search(entry.name)
        if found is not None:
            end = partitions[entry.partition].start_bytes + entry.offset_bytes + entry.size_bytes
            ends[int(found[1])] = max(ends.get(int(found[1]), 0), end)
    return tuple(accumulate((ends[layer] for layer in sorted(ends)), max))


class Layers:
    """The layers of a checkpoint in execution order, and how many of them are whole. What comes before the first (embeddings)
    belongs to it, what comes after the last (the head) to none: it has come when the image has."""

    def __init__(self, manifest: Manifest) -> None:
        self._ends = manifest.layer_ends or layer_ends(manifest.tensors, manifest.partitions)

    @property
    def ends(self) -> tuple[int, ...]:
        """Up to which byte of the image each layer reaches."""
        return self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def usable(self, usable_bytes: int) -> int:
        """How many layers lie whole in the first ``usable_bytes`` of the image."""
        return bisect_right(self._ends, usable_bytes)
