"""Attention of the models whose modules do not call transformers' attention interface: Falcon, BLOOM, MPT, GPT-Neo.

Each function stands in for one class's `forward`: it projects as that class does, and attends through this engine. ALiBi, which
those classes count from the place in the row, becomes a bias by key position, made by the model's own formula. Adding
a constant to a row of scores changes no softmax, so a bias need not know where its query stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.mpt import modeling_mpt

from agent.engine.attention import LayerAttention
from agent.engine.blocks import BLOCK_TOKENS
from agent.engine.transformers_runner import attend_layer

__all__ = ["MASKED", "REPLACED", "replace_attention"]

_rotate: Any = modeling_falcon.apply_rotary_pos_emb
_falcon_alibi: Any = modeling_falcon.build_alibi_tensor
_bloom_slopes: Any = modeling_bloom._get_alibi_slopes
_mpt_alibi: Any = modeling_mpt.build_mpt_alibi_tensor


class _Bias:
    """ALiBi's [heads, positions], made once where the weights are, and shared by the layers."""

    def __init__(self, make: Callable[[Any, int, torch.dtype, torch.device], Tensor], positions: int) -> None:
        self._make = make
        self._positions = -(-positions // BLOCK_TOKENS) * BLOCK_TOKENS
        self._made: Tensor | None = None

    def of(self, module: Any, like: Tensor) -> Tensor:
        if self._made is None:
            self._made = self._make(module, self._positions, like.dtype, like.device)
        return self._made


def replace_attention(model: nn.Module, positions: int) -> None:
    """Let the model's attention modules attend through this engine, if they need a stand-in; ``positions`` bounds contexts."""
    config: Any = model.config
    entry = REPLACED.get(config.model_type)
    if entry is None:
        return
    class_name, forward, make = entry
    bias = _Bias(make, positions)
    for module in model.modules():
        if type(module).__name__ == class_name:
            module.forward = partial(forward, module, bias)


def _attend(module: Any, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **how: Any) -> Tensor:
    """``query`` [heads, tokens, head_dim]; returns [1, tokens, heads * head_dim]."""
    attended = attend_layer(type(module).__name__, query, key, value, LayerAttention(layer, scale, **how))
    return attended.flatten(1).unsqueeze(0)


def _falcon(
    module: Any, bias: _Bias, hidden_states: Tensor, alibi: Tensor | None = None, position_embeddings: Any = None, **_: Any
) -> tuple[Tensor, None]:
    heads, kv_heads, head_dim = module.num_heads, module.num_kv_heads, module.head_dim
    fused = module.query_key_value(hidden_states)[0]
    if module.new_decoder_architecture or not module.multi_query:  # [groups of (queries, key, value)]
        grouped = fused.view(-1, kv_heads, heads // kv_heads + 2, head_dim)
        query, key, value = grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]
    else:
        query, key, value = fused.view(-1, heads + 2, head_dim).split((heads, 1, 1), dim=1)
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    if module.config.alibi:
        table = bias.of(module, query)
    else:
        table = None
        turned = _rotate(query.unsqueeze(0), key.unsqueeze(0), *position_embeddings)
        query, key = (part[0] for part in turned)
    return module.dense(_attend(module, module.layer_idx, query, key, value, head_dim**-0.5, bias=table)), None


def _falcon_bias(module: Any, positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    mask = torch.ones((1, positions), dtype=torch.long, device=device)
    alibi: Tensor = _falcon_alibi(mask, module.num_heads, dtype)
    return alibi.view(module.num_heads, positions) / math.sqrt(module.head_dim)


def _bloom(module: Any, bias: _Bias, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    fused = module.query_key_value(hidden_states)[0].view(-1, module.num_heads, 3, module.head_dim)
    query, key, value = (part.transpose(0, 1) for part in fused.unbind(2))
    table = bias.of(module, query)
    attended = _attend(module, module.layer_idx, query, key, value, module.inv_norm_factor, bias=table)
    return module.dense(attended) + residual, None


def _bloom_bias(module: Any, positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    slopes: Tensor = _bloom_slopes(module.num_heads, device)
    return (slopes[:, None] * torch.arange(positions, device=device)).to(dtype)


def _mpt(module: Any, bias: _Bias, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    fused = module.Wqkv(hidden_states)[0]
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    heads = fused.view(-1, 3, module.n_heads, module.head_dim)
    query, key, value = (part.transpose(0, 1) for part in heads.unbind(1))
    table = bias.of(module, query)
    return module.out_proj(_attend(module, module.layer_idx, query, key, value, module.softmax_scale, bias=table)), None


def _mpt_bias(module: Any, positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    alibi: Tensor = _mpt_alibi(module.n_heads, positions, device=device)
    return alibi.view(module.n_heads, positions).to(dtype)


def _gpt_neo(module: Any, bias: _Bias, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    heads, head_dim = module.num_heads, module.head_dim
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (each(hidden_states)[0].view(-1, heads, head_dim).transpose(0, 1) for each in projections)
    window = module.config.window_size if module.attention_type == "local" else 0
    return module.out_proj(_attend(module, module.layer_id, query, key, value, 1.0, window=window)), None


def _no_bias(*_: Any) -> Tensor:
    raise AssertionError("this architecture has no ALiBi")


_Entry = tuple[str, Callable[..., Any], Callable[[Any, int, torch.dtype, torch.device], Tensor]]

REPLACED: Final[dict[str, _Entry]] = {
    "bloom": ("BloomAttention", _bloom, _bloom_bias),
    "falcon": ("FalconAttention", _falcon, _falcon_bias),
    "gpt_neo": ("GPTNeoSelfAttention", _gpt_neo, _no_bias),
    "mpt": ("MptAttention", _mpt, _mpt_bias),
}
"""By model type: the attention class, what stands in for its `forward`, and its ALiBi."""

MASKED: Final = frozenset({"mpt"})
"""Those that stumble where transformers makes no mask; nothing reads it."""
