"""Attention over paged KV memory: what a step's tokens attend to, and the interface that back ends compute it behind.

The batch is one row of tokens: first those that decode, one a sequence, then the chunks that prefill. Only attention knows
where one sequence ends and the next begins; to all else in a model the tokens are rows.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agent.engine.blocks import BLOCK_TOKENS

__all__ = ["Attention", "AttentionBatch", "DecodeGroup", "KvPool", "LayerAttention", "Prefill"]


class KvPool:
    """Keys and values of all layers, [blocks, tokens of a block, 2 * kv_heads, head_dim] each; heads of keys come first.

    Zeroed memory, since what padding reads must be finite even where nothing was written yet.
    """

    def __init__(self, layers: int, blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        shape = (blocks + 1, BLOCK_TOKENS, 2 * kv_heads, head_dim)
        self.block_bytes = prod(shape[1:]) * dtype.itemsize
        self.layers = [_zeros(shape, dtype, device) for _ in range(layers)]
        self.slots = [layer.flatten(0, 1) for layer in self.layers]

    def erase(self, blocks: list[int]) -> None:
        """Zero blocks whose content is not finite, so that it never reaches a later owner through masked padding."""
        index = torch.tensor(blocks, device=self.layers[0].device)
        for layer in self.layers:
            layer.index_fill_(0, index, 0)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Zeroed memory. On CPU it is the system's, not yet touched: to write zeros to a gigabyte takes up to seconds."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer computes: softmax(scale * q k + bias) v, causal, over the last ``window`` tokens (0: over all).

    ``softcap`` c > 0 bends scores to c * tanh(score / c). ``bias`` [heads, positions] is added to the scores of the key at a
    position (ALiBi). ``sinks`` [heads] are scores of a key without a value.
    """

    layer: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    bias: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether no score of it need be written down: torch's own attention computes all of it."""
        return not self.softcap and self.bias is None and self.sinks is None


@dataclass(slots=True)
class DecodeGroup:
    """Sequences of similar length that compute one token each: tokens [start, end) of the batch.

    ``blocks`` are their tables one after another, padded to the longest's ``width``; ``lengths`` counts each one's tokens, the
    new one included, the longest first. ``run`` is the first of ``blocks`` where they lie in order, so that they can be read
    where they are, else -1. Masks are made once per window, and serve all layers.
    """

    start: int
    end: int
    width: int
    blocks: Tensor
    lengths: NDArray[np.int64]
    run: int = -1
    masks: dict[int, Tensor] = field(default_factory=dict)

    @property
    def even(self) -> bool:
        """Whether all see equally many keys, so that columns are cut off and nothing need be masked."""
        return bool(self.lengths[0] == self.lengths[-1])

    def mask(self, window: int, dtype: torch.dtype) -> Tensor:
        """[sequences, 1, 1, tokens of the longest]."""
        mask = self.masks.get(window)
        if mask is None:
            lengths = torch.from_numpy(self.lengths).to(self.blocks.device).view(-1, 1, 1, 1)
            column = torch.arange(int(self.lengths[0]), device=self.blocks.device)
            hidden = column >= lengths
            if window:
                hidden |= column < lengths - window
            mask = self.masks[window] = _additive(hidden, dtype)
        return mask


@dataclass(slots=True)
class Prefill:
    """A chunk of one sequence: tokens [start, end) of the batch, which follow ``cached`` earlier ones in its ``blocks``.
    ``run`` as in `DecodeGroup`."""

    start: int
    end: int
    cached: int
    blocks: Tensor
    run: int = -1
    masks: dict[int, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int, dtype: torch.dtype) -> Tensor | None:
        """[tokens of the chunk, tokens so far]; None where plain causal attention over the chunk alone is right."""
        if window not in self.masks:
            self.masks[window] = self._mask(window, dtype)
        return self.masks[window]

    def _mask(self, window: int, dtype: torch.dtype) -> Tensor | None:
        size = self.end - self.start
        if not self.cached and not 0 < window < size:
            return None
        device = self.blocks.device
        query = torch.arange(self.cached, self.cached + size, device=device).unsqueeze(1)
        key = torch.arange(self.cached + size, device=device)
        hidden = key > query
        if window:
            hidden |= key <= query - window
        return _additive(hidden, dtype)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


@dataclass(slots=True)
class AttentionBatch:
    """What attention must know of a step: where each token's KV goes (``slots``), and who attends to what.

    ``tables`` [rows, blocks] are all sequences' blocks; a token's are in its row of ``rows`` [tokens], and it sees those up to
    its place among ``positions`` [tokens]. For a back end that gathers, decoding sequences also stand in groups.
    """

    pool: KvPool
    slots: Tensor
    tables: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    decodes: list[DecodeGroup]
    prefills: list[Prefill]


class Attention(Protocol):
    """A back end: it stores the new tokens' keys and values, and lets their queries attend.

    ``gathers``: it must be told groups of decoding sequences.
    """

    gathers: bool

    def __call__(self, batch: AttentionBatch, query: Tensor, fresh: Tensor, how: LayerAttention) -> Tensor:
        """``query`` [tokens, heads, head_dim], ``fresh`` [tokens, 2 * kv_heads, head_dim] with keys first; returns
        [tokens, heads, head_dim] in memory of its own."""
