"""Attention by torch's scaled_dot_product_attention over gathered blocks: on CPU, and the first correct one on CUDA.

Decoding sequences attend in groups of similar length, prefilling ones chunk by chunk. Query heads that share a KV head stand as
rows of one product, so that keys and values are never repeated.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from agent.engine.attention import AttentionBatch, DecodeGroup, KvPool, LayerAttention, Prefill
from schema.memory import GATHERED_BYTES, SCORES_AT_ONCE

__all__ = ["SdpaAttention", "attend_rows"]


_ROWS_TOGETHER: Final = 64
"""Of a short chunk, so many queries that share a KV head attend as rows of one product, which reads keys and values once; of a
long one it would only make masks larger."""


class SdpaAttention:
    """The back end. It keeps the memory that it gathers into, since fresh pages cost more than what is copied there."""

    gathers = True

    def __init__(self) -> None:
        self._gathered: Tensor | None = None

    def __call__(self, batch: AttentionBatch, query: Tensor, fresh: Tensor, how: LayerAttention) -> Tensor:
        pool = batch.pool
        pool.slots[how.layer].index_copy_(0, batch.slots, fresh)
        parts = [self._decode(pool, group, query, how) for group in batch.decodes]
        parts += [self.prefill(pool, chunk, query, fresh, how) for chunk in batch.prefills]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, pool: KvPool, group: DecodeGroup, query: Tensor, how: LayerAttention) -> Tensor:
        size, heads, kv_heads = group.end - group.start, query.shape[1], pool.kv_heads
        rows = query[group.start : group.end].view(size, kv_heads, heads // kv_heads, pool.head_dim)
        stored = self._read(pool.layers[how.layer], group.blocks, group.run)
        stored = stored.view(size, -1, 2 * kv_heads, pool.head_dim).transpose(1, 2)
        mask, first, last = None, 0, int(group.lengths[0])
        if not group.even:
            mask = group.mask(how.window, query.dtype)
        elif how.window:
            first = max(0, last - how.window)
        stored = stored[:, :, first:last]
        out = attend_rows(rows, stored[:, :kv_heads], stored[:, kv_heads:], mask, how, grouped=True, first=first)
        return out.reshape(size, heads, pool.head_dim)

    def prefill(self, pool: KvPool, chunk: Prefill, query: Tensor, fresh: Tensor, how: LayerAttention) -> Tensor:
        """A chunk's tokens [tokens of the chunk, heads, head_dim], whose keys and values are stored."""
        size, heads, kv_heads = chunk.end - chunk.start, query.shape[1], pool.kv_heads
        if chunk.cached:
            stored = self._read(pool.layers[how.layer], chunk.blocks, chunk.run).view(-1, 2 * kv_heads, pool.head_dim)
            stored = stored[: chunk.cached + size].transpose(0, 1)
        else:
            stored = fresh[chunk.start : chunk.end].transpose(0, 1)
        rows = query[chunk.start : chunk.end].view(size, kv_heads, heads // kv_heads, pool.head_dim).permute(1, 2, 0, 3)
        mask = chunk.mask(how.window, query.dtype)
        group = rows.shape[1]
        if how.fused and mask is not None and group * size <= _ROWS_TOGETHER:
            rows, mask = rows.reshape(kv_heads, 1, group * size, pool.head_dim), mask.repeat(group, 1)
        shape = (*rows.shape[:2], stored.shape[1], pool.head_dim)
        keys, values = (part.unsqueeze(1).expand(shape) for part in (stored[:kv_heads], stored[kv_heads:]))
        most = size if how.fused else max(1, SCORES_AT_ONCE // (heads * stored.shape[1]))
        if most >= size:
            out = attend_rows(rows, keys, values, mask, how, causal=True)
        else:
            whole = _causal(size, query) if mask is None else mask
            pieces = [
                attend_rows(rows[:, :, at : at + most], keys, values, whole[at : at + most], how) for at in range(0, size, most)
            ]
            out = torch.cat(pieces, dim=2)
        return out.reshape(heads, size, pool.head_dim).transpose(0, 1).contiguous()

    def _read(self, layer: Tensor, blocks: Tensor, run: int) -> Tensor:
        """Blocks in their order: where they lie if ``run`` says so, else gathered."""
        if run >= 0:
            return layer[run : run + blocks.shape[0]]
        shape = (blocks.shape[0], *layer.shape[1:])
        needed = shape[0] * layer[0].numel()
        if needed * layer.itemsize > GATHERED_BYTES:
            return layer.index_select(0, blocks)
        if self._gathered is None or self._gathered.dtype != layer.dtype:
            self._gathered = torch.empty(GATHERED_BYTES // layer.itemsize, dtype=layer.dtype, device=layer.device)
        return torch.index_select(layer, 0, blocks, out=self._gathered[:needed].view(shape))


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    how: LayerAttention,
    causal: bool = False,
    grouped: bool = False,
    first: int = 0,
) -> Tensor:
    """softmax(q k) v with all that ``how`` asks. ``query`` [a, b, rows, head_dim], keys and values [a, b, columns, head_dim].

    Heads are the second dimension and the rows where ``grouped`` (rows are heads that share a KV head), else the first two.
    ``causal`` is right for squares without a mask alone; column c is the key at position ``first`` + c of its sequence.
    """
    causal = causal and mask is None
    if how.bias is not None:
        if causal:
            mask, causal = _causal(query.shape[2], query), False
        bias = how.bias[:, first : first + keys.shape[2]].to(query.dtype)
        bias = bias.view(1, *query.shape[1:3], -1) if grouped else bias.view(*query.shape[:2], 1, -1)
        mask = bias if mask is None else bias + mask
    if not how.softcap and how.sinks is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal, scale=how.scale)
    scores = (query @ keys.transpose(-1, -2)) * how.scale
    if how.softcap:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if causal:
        mask = _causal(query.shape[2], query)
    if mask is not None:
        scores = scores + mask
    if how.sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ values
    sinks = how.sinks.to(query.dtype)
    sinks = sinks.view(1, *query.shape[1:3], 1) if grouped else sinks.view(*query.shape[:2], 1, 1)
    scores = torch.cat((scores, sinks.expand(*scores.shape[:3], 1)), dim=-1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :-1].to(query.dtype) @ values


def _causal(size: int, like: Tensor) -> Tensor:
    hidden = torch.ones((size, size), dtype=torch.bool, device=like.device).triu_(1)
    return torch.zeros((size, size), dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
