"""A step's decoding sequences in groups of similar length."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from agent.engine.attention import DecodeGroup, KvPool
from agent.engine.blocks import BlockManager
from agent.engine.sequence import Sequence
from schema.memory import GATHERED_BYTES

__all__ = ["Decoding", "run_of"]

_GROUP_COST_BYTES: Final = 1 << 19
"""A group of decoding sequences more costs a layer about as much time as to gather so many bytes of padding."""


class Decoding:
    """Cuts them into groups, for attention that gathers."""

    def __init__(self, pool: KvPool, blocks: BlockManager, device: torch.device) -> None:
        self._blocks = blocks
        self._device = device
        self._most_waste = max(1, _GROUP_COST_BYTES // pool.block_bytes)
        self._most_blocks = min(GATHERED_BYTES // pool.block_bytes, blocks.total)

    def groups(self, sequences: list[Sequence], lengths: NDArray[np.int64]) -> list[DecodeGroup]:
        """The groups of these sequences, the longest first; ``lengths`` count their new tokens, too.

        They are cut where padding to the longest would cost more than a group of its own, and before a group gathers more than
        there is memory for.
        """
        groups: list[DecodeGroup] = []
        widths = [BlockManager.needed(length) for length in lengths.tolist()]
        start = 0
        while start < len(widths):
            width = widths[start]
            waste, end = 0, start + 1
            last = min(len(widths), start + max(1, self._most_blocks // width))
            while end < last:
                waste += width - widths[end]
                if waste > self._most_waste:
                    break
                end += 1
            tables = self._blocks.tables[[sequence.row for sequence in sequences[start:end]], :width].reshape(-1)
            run = run_of(tables) if end == start + 1 else -1
            blocks = torch.from_numpy(tables).to(self._device, non_blocking=True)
            groups.append(DecodeGroup(start, end, width, blocks, lengths[start:end], run))
            start = end
        return groups


def run_of(blocks: NDArray[np.int64]) -> int:
    """The first block where all lie in order, else -1."""
    return int(blocks[0]) if bool((np.diff(blocks) == 1).all()) else -1
