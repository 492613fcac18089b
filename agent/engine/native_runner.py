"""The runner of the Llama family: plain functions over the checkpoint's tensors, with no module on the way.

Llama, Mistral, Qwen2, Qwen3 and kin differ in biases, in norms of query and key heads, in sliding windows, in tied
embeddings and in rotary frequencies; all of that is read off the skeleton once. q, k, v and gate, up are one product each
where ingest laid their weights behind one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import SiLUActivation

from agent.engine.attention import KvPool, LayerAttention
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.products import ROWS, Product, Ways, ways_of
from agent.engine.runner import AwaitLayer, Runner, StepBatch, all_there
from agent.engine.weights import fused_view
from schema.errors import InvalidCheckpoint
from schema.memory import ROTARY_BLOCK

__all__ = ["NATIVE", "NativeRunner", "is_native"]

NATIVE: Final = frozenset({"cwm", "llama", "ministral", "mistral", "qwen2", "qwen3", "seed_oss"})
"""Model types whose decoder layers are those of Llama but for what this module reads off."""

_WINDOW_IN_CONFIG: Final = frozenset({"mistral"})
"""Those whose layers all take the config's sliding window. Any other's layer says itself whether it has one: a config may carry
a window that its model knows nothing of."""


def is_native(model: nn.Module) -> bool:
    """Whether `NativeRunner` can run this skeleton: one of the family, its heads rotated whole."""
    config: Any = model.config
    if config.model_type not in NATIVE:
        return False
    inner: Any = model.model
    head_dim = inner.layers[0].self_attn.head_dim
    return bool(inner.rotary_emb.inv_freq.shape == (head_dim // 2,))


@dataclass(frozen=True, slots=True)
class _Layer:
    how: LayerAttention
    input_norm: Tensor
    qkv: Product
    head_norm: Tensor | None
    out: Product
    post_norm: Tensor
    gate_up: Product
    down: Product


class NativeRunner(Runner):
    """``model`` is an attached skeleton of the family; its tensors are used where they lie.

    Until a step was computed, ``await_layer`` is asked before each layer, and nothing reads a weight before that.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: KvPool,
        blocks: BlockManager,
        device: str,
        deterministic: bool = False,
        await_layer: AwaitLayer = all_there,
    ) -> None:
        super().__init__(pool, blocks, device, deterministic, await_layer)
        source: Any = model
        config, inner = source.config, source.model
        self._eps = torch.tensor(config.rms_norm_eps, device=self._device)
        self._embedding: Tensor = inner.embed_tokens.weight
        self._norm: Tensor = inner.norm.weight
        self._ways = ROWS if deterministic else ways_of(self._embedding.dtype, self._device)
        self._config, self._modules, self._head_module = config, list(inner.layers), source.lm_head
        self._layers: list[_Layer] = []
        self._head: Product | None = None
        self._rotary = _Rotary(inner.rotary_emb, self._embedding.dtype, blocks.tables.shape[1] * BLOCK_TOKENS)
        self._activation = _activation(inner.layers[0].mlp.act_fn)
        self._kv_heads, self._head_dim = pool.kv_heads, pool.head_dim
        self._heads: int = config.num_attention_heads
        first = inner.layers[0].self_attn
        kv_heads = first.k_proj.weight.shape[0] // first.head_dim
        if (len(self._modules), kv_heads, first.head_dim) != (len(pool.layers), pool.kv_heads, pool.head_dim):
            raise InvalidCheckpoint(
                f"the model has {len(self._modules)} layers with {kv_heads} KV heads of {first.head_dim}, unlike the manifest"
            )

    @property
    def attended_layers(self) -> list[int]:
        return list(range(len(self._layers)))

    def _compute(self, batch: StepBatch) -> Tensor:
        self._layer(0)
        x = self._embedding.index_select(0, batch.ids)
        cos, sin = self._rotary.at(batch.positions, batch.last_position)
        heads, kv_heads, head_dim = self._heads, self._kv_heads, self._head_dim
        rotated = heads + kv_heads
        tokens = x.shape[0]
        for index in range(len(self._modules)):
            layer = self._layer(index)
            states = layer.qkv(rms_norm(x, layer.input_norm, self._eps)).view(tokens, rotated + kv_heads, head_dim)
            self._rotate(states[:, :rotated], layer.head_norm, cos, sin)
            attended = self._attention(batch.attention, states[:, :heads], states[:, heads:], layer.how)
            layer.out.add_to(x, attended.view(tokens, heads * head_dim))
            states = rms_norm(x, layer.post_norm, self._eps)
            if layer.gate_up.as_columns(tokens):
                gate, up = layer.gate_up.columns(states.t()).chunk(2)
                layer.down.add_to(x, (self._activation(gate) * up).t())
            else:
                gate, up = layer.gate_up(states).chunk(2, dim=1)
                layer.down.add_to(x, self._activation(gate) * up)
        head = self._product_of_head()
        if batch.wanted is not None:
            x = x.index_select(0, batch.wanted)
        return head(rms_norm(x, self._norm, self._eps))

    def _layer(self, index: int) -> _Layer:
        """A layer, made when it is first computed: small tensors of it are copied, so its weights must be there."""
        if self._head is None:  # no step is over: what has come may have to come again, after a store that died
            self._await_layer(index)
        if index == len(self._layers):
            with _unwatched():
                self._layers.append(_layer(index, self._modules[index], self._config, self._ways))
        return self._layers[index]

    def _product_of_head(self) -> Product:
        if self._head is None:
            self._await_layer(len(self._modules))
            with _unwatched():
                self._head = _product(self._ways, self._head_module)
        return self._head

    def _rotate(self, states: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> None:
        """Turn query and key heads [tokens, heads, head_dim] by their positions, in place: x cos + (-x2, x1) sin."""
        source = states if norm is None else rms_norm(states, norm, self._eps)
        swapped = source.roll(states.shape[2] // 2, dims=2).mul_(sin)
        torch.mul(source, cos, out=states).add_(swapped)


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer's activation, in place where it is SiLU: what is activated was made for that alone."""
    return partial(silu, inplace=True) if isinstance(module, nn.SiLU | SiLUActivation) else module


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 up to the product with the weight."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    if x.dtype == torch.float32:
        return (x * scale).mul_(weight)
    return x.float().mul_(scale).to(x.dtype).mul_(weight)


class _Rotary:
    """Cosines and sines by position, from the skeleton's own frequencies, made in blocks when first needed, of no more than
    ``most`` positions, rounded up to a block.

    The sines of the first half are negated, so that x cos + swap(x) sin turns a head.
    """

    def __init__(self, module: Any, dtype: torch.dtype, most: int) -> None:
        self._most = most
        self._inverse: Tensor = module.inv_freq.float()
        self._scaling = float(module.attention_scaling)
        self._dtype = dtype
        self._cos = self._sin = torch.empty((0, 1, 2 * self._inverse.shape[0]), dtype=dtype, device=self._inverse.device)

    def at(self, positions: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """[tokens, 1, head_dim] each."""
        known = self._cos.shape[0]
        if last >= known:
            starts = range(known, max(last + 1, min(2 * known, self._most)), ROTARY_BLOCK)
            cos, sin = zip(*(self._block(start) for start in starts), strict=True)
            self._cos, self._sin = torch.cat((self._cos, *cos)), torch.cat((self._sin, *sin))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _block(self, start: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(start, start + ROTARY_BLOCK, device=self._inverse.device, dtype=torch.float32)
        angles = at.unsqueeze(1) * self._inverse
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        return tuple(torch.cat(halves, dim=1).to(self._dtype).unsqueeze(1) for halves in ((cos, cos), (-sin, sin)))  # type: ignore[return-value]


def _layer(index: int, module: Any, config: Any, ways: Ways) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    windowed = config if config.model_type in _WINDOW_IN_CONFIG else attention
    kv_heads = attention.k_proj.weight.shape[0] // attention.head_dim
    head_norm = None
    if hasattr(attention, "q_norm"):
        heads = config.num_attention_heads
        norms = [attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(kv_heads, -1)]
        head_norm = torch.cat(norms)
    return _Layer(
        how=LayerAttention(index, attention.scaling, getattr(windowed, "sliding_window", None) or 0),
        input_norm=module.input_layernorm.weight,
        qkv=_product(ways, attention.q_proj, attention.k_proj, attention.v_proj),
        head_norm=head_norm,
        out=_product(ways, attention.o_proj),
        post_norm=module.post_attention_layernorm.weight,
        gate_up=_product(ways, mlp.gate_proj, mlp.up_proj),
        down=_product(ways, mlp.down_proj),
    )


def _unwatched() -> Any:
    """A context past `RowInvariant`, to which what is made of weights is no matter."""
    return torch._C.DisableTorchFunction()


def _product(ways: Ways, *modules: Any) -> Product:
    """One product over the weights of several: a view over all where they lie together. Biases are small, and copied."""
    weights = tuple(module.weight for module in modules)
    fused = fused_view(weights)
    bias = None
    if any(module.bias is not None for module in modules):
        bias = torch.cat(
            [module.weight.new_zeros(module.weight.shape[0]) if module.bias is None else module.bias for module in modules]
        )
    return Product(weights if fused is None else (fused,), bias, ways)
