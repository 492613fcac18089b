"""Attention in which every query attends alone, so that its bits depend on neither the batch nor the chunk it is in.

A token's keys and values are always read from gathered blocks, never from the products that have just made them, and every
query is one call over exactly the keys that it sees: a decoding token and the same token in a prompt make the same call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agent.engine.attention import AttentionBatch, KvPool, LayerAttention
from agent.engine.attention_sdpa import attend_rows

__all__ = ["AloneAttention"]


class AloneAttention:
    """The back end of deterministic models, on any device."""

    gathers = True

    def __call__(self, batch: AttentionBatch, query: Tensor, fresh: Tensor, how: LayerAttention) -> Tensor:
        with torch._C.DisableTorchFunction():
            pool = batch.pool
            pool.slots[how.layer].index_copy_(0, batch.slots, fresh)
            out = torch.empty_like(query)
            for group in batch.decodes:
                for index, length in enumerate(group.lengths.tolist()):
                    blocks = group.blocks[index * group.width : (index + 1) * group.width]
                    self._chunk(pool, blocks, length - 1, query, out, group.start + index, 1, how)
            for chunk in batch.prefills:
                self._chunk(pool, chunk.blocks, chunk.cached, query, out, chunk.start, chunk.end - chunk.start, how)
            return out

    def _chunk(
        self,
        pool: KvPool,
        blocks: Tensor,
        cached: int,
        query: Tensor,
        out: Tensor,
        start: int,
        size: int,
        how: LayerAttention,
    ) -> None:
        """Tokens [start, start + size) of the batch, which stand at ``cached`` and on in their sequence."""
        heads, kv_heads, head_dim = query.shape[1], pool.kv_heads, pool.head_dim
        stored = pool.layers[how.layer].index_select(0, blocks).view(1, -1, 2 * kv_heads, head_dim).transpose(1, 2)
        keys, values = stored[:, :kv_heads], stored[:, kv_heads:]
        for row in range(size):
            last = cached + row + 1
            first = max(0, last - how.window) if how.window else 0
            each = query[start + row].view(1, kv_heads, heads // kv_heads, head_dim)
            attended = attend_rows(each, keys[:, :, first:last], values[:, :, first:last], None, how, grouped=True, first=first)
            out[start + row] = attended.view(heads, head_dim)
