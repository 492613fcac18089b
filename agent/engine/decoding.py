"""A step's decoding sequences in groups of similar length, which go on from step to step while the sequences stay the same."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from agent.engine.attention import DecodeGroup, KvPool
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.sequence import Sequence
from schema.memory import GATHERED_BYTES, KEPT_BYTES

__all__ = ["Decoding", "run_of"]

_GROUP_COST_BYTES: Final = 1 << 19
"""A group of decoding sequences more costs a layer about as much time as to gather so many bytes of padding."""


class Decoding:
    """The groups of the last step. ``keeps``: attention keeps what it gathers, and so needs no block tables to go on."""

    def __init__(self, pool: KvPool, blocks: BlockManager, device: torch.device, keeps: bool) -> None:
        self._blocks = blocks
        self._device = device
        self._heads = 2 * pool.kv_heads
        self._most_waste = max(1, _GROUP_COST_BYTES // pool.block_bytes)
        self._most_blocks = min(GATHERED_BYTES // pool.block_bytes, blocks.total)
        self._most_kept = KEPT_BYTES // pool.block_bytes // len(pool.layers) if keeps else 0
        self._sequences: list[Sequence] = []
        self._groups: list[DecodeGroup] = []

    def groups(self, sequences: list[Sequence], lengths: NDArray[np.int64]) -> list[DecodeGroup]:
        """The groups of these sequences, the longest first; ``lengths`` count their new tokens, too.

        They are the last step's own, where it had the same sequences with a token less each.
        """
        if sequences != self._sequences or not all(group.advance(lengths) for group in self._groups):
            self._sequences, self._groups = sequences, self._cut(sequences, lengths)
        return self._groups

    def _cut(self, sequences: list[Sequence], lengths: NDArray[np.int64]) -> list[DecodeGroup]:
        """Cut where padding to the longest would cost more than a group of its own, and before a group gathers more than there
        is memory for."""
        groups: list[DecodeGroup] = []
        widths = [BlockManager.needed(length) for length in lengths.tolist()]
        start = gathered = 0
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
            groups.append(DecodeGroup(start, end, width, blocks, lengths[start:end], run, gathered))
            if run < 0:
                gathered += len(tables)
            start = end
        if gathered <= self._most_kept:
            for group in groups:
                self._keep(group)
        return groups

    def _keep(self, group: DecodeGroup) -> None:
        """Let attention keep what it gathers for a group, unless that is read where it lies."""
        if group.run < 0:
            heads = np.arange(len(group.lengths) * self._heads) * (group.width * BLOCK_TOKENS)
            newest = heads + (group.lengths - 1).repeat(self._heads)
            group.newest = torch.from_numpy(newest).to(self._device, non_blocking=True)


def run_of(blocks: NDArray[np.int64]) -> int:
    """The first block where all lie in order, else -1."""
    return int(blocks[0]) if bool((np.diff(blocks) == 1).all()) else -1
