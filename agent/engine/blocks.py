"""KV memory in blocks: a free list, and a table of blocks for each running sequence."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.engine.sequence import Sequence

__all__ = ["BLOCK_TOKENS", "BlockManager"]

BLOCK_TOKENS: Final = 16
"""Tokens whose keys and values one block holds."""


class BlockManager:
    """Hands out blocks and rows of ``tables``; never more than there are.

    ``tables`` [rows, blocks of the longest sequence] holds block numbers. Block 0 belongs to nobody and stays zero: tables
    are padded with it, so that a batch's padding never reads what another sequence wrote.
    """

    def __init__(self, blocks: int, rows: int, blocks_per_row: int) -> None:
        self.total = blocks
        self._free = list(range(blocks, 0, -1))
        self._rows = list(range(rows - 1, -1, -1))
        self.tables: NDArray[np.int64] = np.zeros((rows, blocks_per_row), dtype=np.int64)

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def free_rows(self) -> int:
        """How many more sequences may run."""
        return len(self._rows)

    @property
    def used_tokens(self) -> int:
        """Tokens' worth of blocks that are held."""
        return (self.total - len(self._free)) * BLOCK_TOKENS

    @staticmethod
    def needed(tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // BLOCK_TOKENS)

    def admit(self, sequence: Sequence) -> None:
        """Give a waiting sequence a row; there must be one free."""
        sequence.row = self._rows.pop()

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for so many tokens in all; False, and nothing changed, when blocks or its table's row do not suffice."""
        held = len(sequence.blocks)
        missing = -(-tokens // BLOCK_TOKENS) - held
        if missing <= 0:
            return True
        if missing > len(self._free) or held + missing > self.tables.shape[1]:
            return False
        taken = self._free[: -missing - 1 : -1]
        del self._free[-missing:]
        self.tables[sequence.row, held : held + missing] = taken
        sequence.blocks += taken
        return True

    def release(self, sequence: Sequence) -> None:
        """Take back all that a sequence holds; its cached tokens are forgotten."""
        if sequence.row < 0:
            return
        self.tables[sequence.row, : len(sequence.blocks)] = 0
        self._free += reversed(sequence.blocks)
        self._rows.append(sequence.row)
        sequence.blocks = []
        sequence.row = -1
        sequence.cached = 0
