"""KV memory in blocks: who holds which, and a cache of the prefixes that full blocks hold.

A block is free, held by one sequence or by several that share a prefix, or cached: held by nobody, its content kept until the
room is needed, the longest unused first. Only full blocks whose content was seen to be sound are shared, so nobody ever
writes to a block that another reads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from agent.engine.prefix import BLOCK_TOKENS
from agent.engine.sequence import Sequence

__all__ = ["BLOCK_TOKENS", "BlockManager"]


class BlockManager:
    """Hands out blocks and rows of ``tables``; never more than there are.

    ``tables`` [rows, blocks of the longest sequence] holds block numbers. Block 0 belongs to nobody and stays zero: tables
    are padded with it, so that a batch's padding never reads what another sequence wrote. ``erase`` zeroes blocks whose
    content may not be finite, before another sequence gets them. Without ``share`` no prefix is kept or found.
    """

    def __init__(
        self, blocks: int, rows: int, blocks_per_row: int, erase: Callable[[list[int]], None], share: bool = True
    ) -> None:
        self.total = blocks
        self._erase = erase
        self._share = share
        self._free = list(range(blocks, 0, -1))
        self._rows = list(range(rows - 1, -1, -1))
        self.tables: NDArray[np.int64] = np.zeros((rows, blocks_per_row), dtype=np.int64)
        self._holders = [0] * (blocks + 1)
        self._names: list[bytes | None] = [None] * (blocks + 1)
        self._by_name: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()
        """Named blocks that nobody holds, the longest unused first."""
        self._coming: dict[bytes, Sequence] = {}
        """Names of blocks that a running sequence is about to compute."""

    @property
    def free(self) -> int:
        """Blocks that nobody holds, those with a cached prefix included."""
        return len(self._free) + len(self._unheld)

    @property
    def free_rows(self) -> int:
        """How many more sequences may run."""
        return len(self._rows)

    @property
    def used_tokens(self) -> int:
        """Tokens' worth of blocks that are held."""
        return (self.total - self.free) * BLOCK_TOKENS

    @property
    def cached_tokens(self) -> int:
        """Tokens of prefixes that nobody holds now and that can be found again."""
        return len(self._unheld) * BLOCK_TOKENS

    @staticmethod
    def needed(tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // BLOCK_TOKENS)

    def awaits(self, sequence: Sequence) -> bool:
        """Whether the block behind the cached part of a waiting sequence is just being computed by another, which is then
        ``watched``."""
        if sequence.awaited not in self._coming:
            names = self._reusable(sequence)
            known = self._known(names)
            sequence.awaited = names[known] if known < len(names) else b""
        leader = self._coming.get(sequence.awaited)
        if leader is None:
            return False
        leader.watched = True
        return True

    def admit(self, sequence: Sequence, reserve: int) -> bool:
        """Give a waiting sequence a row and room for its tokens, what is cached of them included; False, and nothing changed,
        where that would leave fewer than ``reserve`` blocks free. There must be a row."""
        names = self._reusable(sequence)
        shared = [self._by_name[name] for name in names[: self._known(names)]]
        missing = self.needed(len(sequence.tokens)) - len(shared)
        if missing + sum(not self._holders[block] for block in shared) + reserve > self.free:
            return False
        for block in shared:
            self._unheld.pop(block, None)
            self._holders[block] += 1
        for name in names[len(shared) :]:
            self._coming.setdefault(name, sequence)
        sequence.row = self._rows.pop()
        sequence.blocks = shared
        sequence.cached = sequence.sound = len(shared) * BLOCK_TOKENS
        self.tables[sequence.row, : len(shared)] = shared
        self.extend(sequence, len(sequence.tokens))
        return True

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for so many tokens in all; False, and nothing changed, when blocks or its table's row do not suffice."""
        held = len(sequence.blocks)
        missing = self.needed(tokens) - held
        if missing <= 0:
            return True
        if missing > self.free or held + missing > self.tables.shape[1]:
            return False
        taken = [self._take() for _ in range(missing)]
        self.tables[sequence.row, held : held + missing] = taken
        sequence.blocks += taken
        return True

    def publish(self, sequence: Sequence) -> None:
        """Let others find the full blocks of a sequence's cached tokens, all of which were just seen to be sound."""
        first, last = sequence.sound // BLOCK_TOKENS, sequence.cached // BLOCK_TOKENS
        sequence.sound = sequence.cached
        if first == last or not self._share:
            return
        names = sequence.prefixes.upto(sequence.tokens, last)
        for name, block in zip(names[first:last], sequence.blocks[first:last], strict=True):
            if name not in self._by_name:
                self._by_name[name] = block
                self._names[block] = name
            if self._coming.get(name) is sequence:
                del self._coming[name]

    def release(self, sequence: Sequence, spoiled: bool = False) -> None:
        """Take back all that a sequence holds. What it published can still be found; what it wrote since is erased unless it
        was seen to be sound, and always where it is ``spoiled``."""
        if sequence.row < 0:
            return
        sound = sequence.sound // BLOCK_TOKENS
        if spoiled or sequence.cached > sequence.sound:
            self._erase(sequence.blocks[sound:])
        self.tables[sequence.row, : len(sequence.blocks)] = 0
        for block in reversed(sequence.blocks):  # so that the end of a prefix goes before its beginning
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._names[block] is None:
                self._free.append(block)
            else:
                self._unheld[block] = None
        for name in self._reusable(sequence)[sound:]:
            if self._coming.get(name) is sequence:
                del self._coming[name]
        self._rows.append(sequence.row)
        sequence.blocks = []
        sequence.row = -1
        sequence.cached = sequence.sound = 0

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        """Names of the blocks that need not be computed where they are known: never that of the last token, whose logits are
        wanted."""
        if not self._share:
            return []
        blocks = (len(sequence.tokens) - 1) // BLOCK_TOKENS
        return sequence.prefixes.upto(sequence.tokens, blocks)[:blocks]

    def _known(self, names: list[bytes]) -> int:
        """How many of these names, from the first on, are there."""
        return next((at for at, name in enumerate(names) if name not in self._by_name), len(names))

    def _take(self) -> int:
        """A block without content; there must be one free."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._unheld.popitem(last=False)
            name = self._names[block]
            assert name is not None
            del self._by_name[name]
            self._names[block] = None
        self._holders[block] = 1
        return block
