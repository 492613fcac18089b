"""An engine from a manifest and tensors; the worker takes the same steps one at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from agent.engine.api import EngineCapacity
from agent.engine.attention import KvPool
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.dtypes import torch_dtype
from agent.engine.engine import BatchEngine
from agent.engine.memory import free_bytes, plan_memory
from agent.engine.native_runner import NativeRunner, is_native
from agent.engine.skeleton import build_skeleton
from agent.engine.transformers_runner import TransformersRunner
from agent.engine.weights import attach
from schema.checkpoint import Manifest
from schema.link import EngineOptions

__all__ = ["PREFILL_TOKENS", "assemble", "build_engine"]

PREFILL_TOKENS = 512
"""Prompt tokens that one step computes at most, beside the sequences that decode."""


def build_engine(
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    options: EngineOptions,
    device: str = "cpu",
    prefill_tokens: int = PREFILL_TOKENS,
    share_prefixes: bool = True,
) -> BatchEngine:
    """A warm engine over ``tensors``, which are the checkpoint's stored ones by name; on ``device`` they are not copied.

    Raises InvalidCheckpoint for a model that cannot be run exactly, OutOfSpace when ``kv_bytes`` hold not even one block.
    """
    model = build_skeleton(manifest)
    attach(model, manifest, tensors, device)
    engine = assemble(model, manifest, options, device, prefill_tokens, share_prefixes)
    engine.warm()
    return engine


def assemble(
    model: nn.Module,
    manifest: Manifest,
    options: EngineOptions,
    device: str = "cpu",
    prefill_tokens: int = PREFILL_TOKENS,
    share_prefixes: bool = True,
) -> BatchEngine:
    """KV memory and scheduling around a model that has its weights.

    Raises OutOfSpace when ``kv_bytes`` hold no block, or when they, activations and logits are more than the device has free.
    """
    geometry = manifest.kv
    memory = plan_memory(model, manifest, options, prefill_tokens, free_bytes(device))
    count = memory.blocks
    context = manifest.max_context_tokens
    if options.max_context_tokens:
        context = min(context, options.max_context_tokens)
    reach = min(context, count * BLOCK_TOKENS)
    pool = KvPool(geometry.layers, count, geometry.kv_heads, geometry.head_dim, torch_dtype(geometry.dtype), device)
    blocks = BlockManager(count, options.max_concurrency, BlockManager.needed(reach), pool.erase, share_prefixes)
    runner = NativeRunner if is_native(model) else TransformersRunner
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return BatchEngine(
        runner=runner(model, pool, blocks, device, options.deterministic),
        pool=pool,
        blocks=blocks,
        capacity=EngineCapacity(count * BLOCK_TOKENS, reach, options.max_concurrency),
        vocabulary=embeddings.num_embeddings,
        context_tokens=context,
        prefill_tokens=prefill_tokens,
        model=manifest.digest,
    )
