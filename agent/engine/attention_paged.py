"""Attention by compiled code that reads KV memory where it lies (`agent.native.paged_attention`), on CPU.

A token that decodes reads each of its keys and values once, so nothing is gathered, padded or masked for it. Those of a prompt
read the same ones again and again, which torch does faster; but in a deterministic model they, too, attend one by one: a
token's sums are taken in the same order whether it decodes or is of a prompt, and whatever tokens stand beside it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from agent.engine.attention import Attention, AttentionBatch, KvPool, LayerAttention
from agent.engine.attention_alone import AloneAttention
from agent.engine.attention_sdpa import SdpaAttention
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.native import paged_attention
from agent.native.paged_attention import Job, Kind, Width
from schema.errors import InvalidCheckpoint

__all__ = ["PagedAttention", "attention_for"]

_KINDS: Final = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16, torch.float16: Kind.FLOAT16}
_WORK_A_THREAD: Final = 1 << 20
"""To wake one more takes as long as to read about so many bytes, or to multiply so many numbers."""


def attention_for(pool: KvPool, deterministic: bool) -> Attention:
    """The back end for this KV memory."""
    width = _width_for(pool)
    if width is not None:
        return PagedAttention(width, deterministic)
    return AloneAttention() if deterministic else SdpaAttention()


def _width_for(pool: KvPool) -> Width | None:
    layer = pool.layers[0]
    is_read = layer.device.type == "cpu" and layer.dtype in _KINDS
    if not is_read or pool.head_dim % paged_attention.HEAD_STEP or pool.head_dim > paged_attention.MOST_HEAD_DIM:
        return None
    return max(paged_attention.widths(), default=None)


class PagedAttention:
    """The back end. Where not ``deterministic``, prompts attend as `SdpaAttention` lets them."""

    gathers = False

    def __init__(self, width: Width, deterministic: bool) -> None:
        self._width = width
        self._prefills = None if deterministic else SdpaAttention()

    def __call__(self, batch: AttentionBatch, query: Tensor, fresh: Tensor, how: LayerAttention) -> Tensor:
        with torch._C.DisableTorchFunction():
            batch.pool.slots[how.layer].index_copy_(0, batch.slots, fresh)
            if self._prefills is None:
                return self._attend(batch, query, how)
            decoding = batch.prefills[0].start if batch.prefills else len(query)
            parts = [self._attend(batch, query[:decoding], how)] if decoding else []
            parts += [self._prefills.prefill(batch.pool, chunk, query, fresh, how) for chunk in batch.prefills]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, batch: AttentionBatch, query: Tensor, how: LayerAttention) -> Tensor:
        """The first tokens of the batch, each alone. Raises InvalidCheckpoint where queries are not made for this memory:
        addresses are all that is handed on."""
        pool = batch.pool
        layer = pool.layers[how.layer]
        tokens, heads, head_dim = query.shape
        if query.stride()[1:] != (head_dim, 1):
            query = query.contiguous()
        if (query.dtype, head_dim) != (layer.dtype, pool.head_dim) or heads % pool.kv_heads:
            raise InvalidCheckpoint(
                f"layer {how.layer} attends with {heads} heads of {head_dim} {query.dtype}, over {pool.kv_heads} KV heads of "
                f"{pool.head_dim} {layer.dtype}"
            )
        positions = batch.positions[:tokens]
        bias = None if how.bias is None else how.bias.to(layer.dtype).contiguous()
        if bias is not None:
            assert bias.shape[0] == heads
            assert bias.shape[1] >= BlockManager.needed(int(positions.max()) + 1) * BLOCK_TOKENS
        sinks = None if how.sinks is None else how.sinks.float().contiguous()
        out = query.new_empty((tokens, heads, head_dim))
        job = Job(
            query=query.data_ptr(),
            layer=layer.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            sinks=None if sinks is None else sinks.data_ptr(),
            out=out.data_ptr(),
            tables=batch.tables.ctypes.data,
            rows=batch.rows.ctypes.data,
            positions=positions.ctypes.data,
            tokens=tokens,
            heads=heads,
            kv_heads=pool.kv_heads,
            head_dim=head_dim,
            query_stride=query.stride(0),
            table_stride=batch.tables.shape[1],
            bias_stride=0 if bias is None else bias.shape[1],
            window=how.window,
            scale=how.scale,
            softcap=how.softcap,
            kind=_KINDS[layer.dtype],
        )
        seen = int(positions.sum()) + tokens
        if how.window:
            seen = min(seen, tokens * how.window)
        work = seen * max(pool.block_bytes // BLOCK_TOKENS, 2 * heads * head_dim)
        paged_attention.attend(job, self._width, min(torch.get_num_threads(), 1 + work // _WORK_A_THREAD))
        return out
