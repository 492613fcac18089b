"""Attention over paged KV memory, registered with transformers under a name of its own.

The batch is one row of tokens [1, tokens]: first those that decode, one a sequence, then the chunks that prefill. So the
models' own modules run as they are, and only attention knows where one sequence ends and the next begins.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from agent.engine.blocks import BLOCK_TOKENS
from schema.errors import InvalidCheckpoint

__all__ = ["IMPLEMENTATION", "AttentionBatch", "DecodeGroup", "KvPool", "Prefill", "attending", "register"]

IMPLEMENTATION: Final = "sllm_paged"
"""The name under which transformers finds `_attend`. No mask function is registered for it, so transformers makes no masks."""

_COMPUTED_ON = frozenset({"softcap", "s_aux", "sinks", "position_bias", "head_mask", "cu_seq_lens_q", "indices"})
"""Arguments that change what attention computes. Whatever else travels along (flags of outputs, position ids) does not."""


class KvPool:
    """Keys and values of all layers, [blocks, tokens of a block, 2 * kv_heads, head_dim] each; heads of keys come first.

    Zeroed memory, since what padding reads must be finite even where nothing was written yet.
    """

    def __init__(self, layers: int, blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        shape = (blocks + 1, BLOCK_TOKENS, 2 * kv_heads, head_dim)
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


@dataclass(slots=True)
class DecodeGroup:
    """Sequences of similar length that compute one token each: tokens [start, end) of the batch.

    ``blocks`` are their tables one after another, padded to the longest; ``lengths`` [end - start] counts each one's tokens,
    the new one included. Masks are made once per step and window, and serve all layers.
    """

    start: int
    end: int
    blocks: Tensor
    lengths: Tensor
    masks: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, window: int, dtype: torch.dtype) -> Tensor:
        mask = self.masks.get(window)
        if mask is None:
            width = self.blocks.shape[0] // (self.end - self.start) * BLOCK_TOKENS
            column = torch.arange(width, device=self.blocks.device)
            hidden = column >= self.lengths.unsqueeze(1)
            if window:
                hidden |= column < self.lengths.unsqueeze(1) - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            mask = self.masks[window] = mask[:, None, None, :]
        return mask


@dataclass(slots=True)
class Prefill:
    """A chunk of one sequence: tokens [start, end) of the batch, which follow ``cached`` earlier ones in its ``blocks``."""

    start: int
    end: int
    cached: int
    blocks: Tensor | None
    masks: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, window: int, dtype: torch.dtype) -> Tensor | None:
        """None where plain causal attention over the chunk alone is right."""
        size = self.end - self.start
        if not self.cached and (not window or size <= window):
            return None
        mask = self.masks.get(window)
        if mask is None:
            device = None if self.blocks is None else self.blocks.device
            query = torch.arange(self.cached, self.cached + size, device=device).unsqueeze(1)
            key = torch.arange(self.cached + size, device=device)
            hidden = key > query
            if window:
                hidden |= key <= query - window
            mask = self.masks[window] = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        return mask


@dataclass(slots=True)
class AttentionBatch:
    """What attention must know of a step: where each token's KV goes (``slots``), and who attends to what.

    ``layers`` counts the layers that attended, for a model's check.
    """

    pool: KvPool
    slots: Tensor
    decodes: list[DecodeGroup]
    prefills: list[Prefill]
    layers: list[int] = field(default_factory=list)


_current: ContextVar[AttentionBatch] = ContextVar("attention_batch")


@contextmanager
def attending(batch: AttentionBatch) -> Iterator[None]:
    """Within this, the models' attention works on ``batch``."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def register() -> None:
    """Make the implementation known to transformers; may be called again."""
    AttentionInterface.register(IMPLEMENTATION, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call. ``query`` [1, heads, tokens, head_dim], ``key`` and ``value`` [1, kv_heads, ...].

    Returns [1, tokens, heads, head_dim]. Raises InvalidCheckpoint, naming it, for a feature that is not computed here.
    """
    batch = _current.get()
    layer = module.layer_idx
    if not isinstance(layer, int) or layer >= len(batch.pool.layers):
        raise InvalidCheckpoint(f"{type(module).__name__} attends as layer {layer}, which the KV geometry does not have")
    for name, argument in more.items():
        if argument is not None and name in _COMPUTED_ON:
            raise InvalidCheckpoint(f"{type(module).__name__} asks attention for {name!r}, which this engine does not compute")
    if attention_mask is not None:
        raise InvalidCheckpoint(
            f"{type(module).__name__} brings an attention mask of its own, which this engine does not apply"
        )
    batch.layers.append(layer)
    heads, tokens, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    pool = batch.pool
    if (kv_heads, key.shape[3], value.shape[3]) != (pool.kv_heads, pool.head_dim, pool.head_dim):
        raise InvalidCheckpoint(
            f"layer {layer} has {kv_heads} KV heads of {key.shape[3]} and {value.shape[3]}, unlike the manifest"
        )
    fresh = torch.cat((key[0].transpose(0, 1), value[0].transpose(0, 1)), dim=1)
    pool.slots[layer].index_copy_(0, batch.slots, fresh)
    window = sliding_window or 0
    rows = query[0].transpose(0, 1)
    parts = [_decode(rows, pool, layer, group, scaling, window) for group in batch.decodes]
    parts += [_prefill(query, key, value, pool, layer, chunk, scaling, window) for chunk in batch.prefills]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(1, tokens, heads, head_dim), None


def _decode(rows: Tensor, pool: KvPool, layer: int, group: DecodeGroup, scaling: float | None, window: int) -> Tensor:
    """One query per sequence over its gathered blocks; query heads of one KV head stand as rows, so nothing is repeated."""
    size = group.end - group.start
    kv_heads, head_dim = pool.kv_heads, pool.head_dim
    query = rows[group.start : group.end].reshape(size, kv_heads, -1, head_dim)
    stored = pool.layers[layer].index_select(0, group.blocks).view(size, -1, 2 * kv_heads, head_dim).transpose(1, 2)
    mask = group.mask(window, query.dtype)
    out = scaled_dot_product_attention(query, stored[:, :kv_heads], stored[:, kv_heads:], attn_mask=mask, scale=scaling)
    return out.reshape(size, -1, head_dim)


def _prefill(
    query: Tensor, key: Tensor, value: Tensor, pool: KvPool, layer: int, chunk: Prefill, scaling: float | None, window: int
) -> Tensor:
    """A chunk over itself, and over what its sequence has cached. Returns [tokens of the chunk, heads, head_dim]."""
    kv_heads, head_dim = pool.kv_heads, pool.head_dim
    size = chunk.end - chunk.start
    grouped = query[0, :, chunk.start : chunk.end].view(kv_heads, -1, size, head_dim)
    if chunk.blocks is None:
        keys, values = key[0, :, chunk.start : chunk.end], value[0, :, chunk.start : chunk.end]
    else:
        stored = pool.layers[layer].index_select(0, chunk.blocks).view(-1, 2 * kv_heads, head_dim)
        stored = stored[: chunk.cached + size].transpose(0, 1)
        keys, values = stored[:kv_heads], stored[kv_heads:]
    shape = (kv_heads, grouped.shape[1], keys.shape[1], head_dim)
    mask = chunk.mask(window, query.dtype)
    out = scaled_dot_product_attention(
        grouped,
        keys.unsqueeze(1).expand(shape),
        values.unsqueeze(1).expand(shape),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
    )
    return out.flatten(0, 1).transpose(0, 1)
