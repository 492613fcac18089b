"""The runner for every decoder that transformers knows: its own modules compute, and attend through this engine."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface

from agent.engine.arrival import Arrival
from agent.engine.attention import Attention, AttentionBatch, KvPool, LayerAttention
from agent.engine.blocks import BlockManager
from agent.engine.products import Product, ways_of
from agent.engine.runner import Runner, StepBatch, all_there
from schema.errors import InvalidCheckpoint

__all__ = ["IMPLEMENTATION", "TransformersRunner", "attend_layer", "register"]

IMPLEMENTATION: Final = "sllm_paged"
"""The name under which transformers finds `_attend`. No mask function is registered for it, so transformers makes no masks."""

_COMPUTED_ON = frozenset({"position_bias", "head_mask", "cu_seq_lens_q", "indices"})
"""Arguments that change what attention computes. Whatever else travels along (flags of outputs, position ids) does not."""


@dataclass(slots=True)
class _Step:
    attention: Attention
    batch: AttentionBatch
    layers: list[int] = field(default_factory=list)


_current: ContextVar[_Step] = ContextVar("attention_step")


class TransformersRunner(Runner):
    """``model`` takes input ids of one row and ``logits_to_keep``, and position ids unless its attention alone knows places.

    Until a step was computed, each module waits for what it reads of weights on their ``arrival``.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: KvPool,
        blocks: BlockManager,
        device: str,
        deterministic: bool = False,
        arrival: Arrival | None = None,
    ) -> None:
        super().__init__(pool, blocks, device, deterministic, all_there if arrival is None else arrival.await_layer)
        self._model = model
        self._arrival = arrival
        self._waiting = [] if arrival is None else [self._wait(*need) for need in arrival.needs(model).items()]
        config: Any = model.config
        if not deterministic:
            _multiply_faster(model)
        elif hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # its experts multiply one after the other, by plain products
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._layers: list[int] = []

    @property
    def attended_layers(self) -> list[int]:
        return self._layers

    def _compute(self, batch: StepBatch) -> Tensor:
        step = _Step(self._attention, batch.attention)
        token = _current.set(step)
        try:
            output = self._model(
                input_ids=batch.ids.unsqueeze(0),
                use_cache=False,
                logits_to_keep=0 if batch.wanted is None else batch.wanted,
                **({"position_ids": batch.positions.unsqueeze(0)} if self._takes_positions else {}),
            )
        finally:
            _current.reset(token)
        self._layers = step.layers
        if self._arrival is not None:
            self._await_layer(self._arrival.layers)
            self._arrival = None
            while self._waiting:
                self._waiting.pop().remove()
        logits: Tensor = output.logits[0]
        return logits

    def _wait(self, module: nn.Module, layer: int) -> RemovableHandle:
        """Have a module wait for a layer, before it computes."""
        return module.register_forward_pre_hook(lambda *_: self._await_layer(layer))


class _Linear(nn.Linear):
    """Computes as the native runner's products do."""

    product: Product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.weight.shape[0])


def _multiply_faster(model: nn.Module) -> None:
    """Let the plain linear layers of a model on CPU multiply by the way that is fastest there."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            weight = module.weight
            module.__class__ = _Linear
            cast(_Linear, module).product = Product((weight,), module.bias, ways_of(weight.dtype, weight.device))


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call. ``query`` [1, heads, tokens, head_dim], ``key`` and ``value`` [1, kv_heads, ...].

    Returns [1, tokens, heads, head_dim]. Raises InvalidCheckpoint, naming it, for a feature that is not computed here.
    """
    for name, argument in more.items():
        if argument is not None and name in _COMPUTED_ON:
            raise InvalidCheckpoint(f"{type(module).__name__} asks attention for {name!r}, which this engine does not compute")
    if attention_mask is not None:
        raise InvalidCheckpoint(
            f"{type(module).__name__} brings an attention mask of its own, which this engine does not apply"
        )
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    how = LayerAttention(layer, scale, sliding_window or 0, softcap or 0.0, sinks=s_aux)
    return attend_layer(type(module).__name__, query[0], key[0], value[0], how).unsqueeze(0), None


def attend_layer(name: str, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
    """Attention within a runner's step. ``query`` [heads, tokens, head_dim], ``key`` and ``value`` [kv_heads, ...].

    Returns [tokens, heads, head_dim]. Raises InvalidCheckpoint where the KV geometry is not the layer's.
    """
    step = _current.get()
    pool = step.batch.pool
    if not isinstance(how.layer, int) or how.layer >= len(pool.layers):
        raise InvalidCheckpoint(f"{name} attends as layer {how.layer}, which the KV geometry does not have")
    if (key.shape[0], key.shape[2], value.shape[2]) != (pool.kv_heads, pool.head_dim, pool.head_dim):
        raise InvalidCheckpoint(
            f"layer {how.layer} has {key.shape[0]} KV heads of {key.shape[2]} and {value.shape[2]}, unlike the manifest"
        )
    step.layers.append(how.layer)
    fresh = torch.cat((key.transpose(0, 1), value.transpose(0, 1)), dim=1)
    return step.attention(step.batch, query.transpose(0, 1).contiguous(), fresh, how)
