"""An engine from a manifest and tensors; the worker takes the same steps one at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from agent.engine.api import EngineCapacity
from agent.engine.arrival import Arrival
from agent.engine.attention import KvPool
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.dtypes import torch_dtype
from agent.engine.engine import BatchEngine
from agent.engine.memory import free_bytes, plan_memory
from agent.engine.native_runner import NativeRunner, is_native
from agent.engine.runner import Runner, all_there
from agent.engine.skeleton import build_skeleton
from agent.engine.transformers_runner import TransformersRunner
from agent.engine.weights import attach
from agent.store.index import TensorIndex
from agent.store.layers import Layers
from schema.checkpoint import Manifest
from schema.link import EngineOptions
from schema.memory import PREFILL_TOKENS

__all__ = ["assemble", "build_engine", "can_follow"]


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


def can_follow(model: nn.Module, manifest: Manifest, index: TensorIndex) -> bool:
    """Whether a first step can go from layer to layer while weights are still coming: where no weight is read before that, to
    be converted or, by the native runner, to be used earlier than where it lies."""
    ends = Layers(manifest).ends
    if len(ends) != manifest.kv.layers or any(dtype != manifest.kv.dtype for dtype, _ in index.kinds):
        return False
    embeddings = [at for at, name in enumerate(index.names) if name.endswith("embed_tokens.weight")]
    return not is_native(model) or all(index.starts[at] + index.sizes[at] <= ends[0] for at in embeddings)


def assemble(
    model: nn.Module,
    manifest: Manifest,
    options: EngineOptions,
    device: str = "cpu",
    prefill_tokens: int = PREFILL_TOKENS,
    share_prefixes: bool = True,
    arrival: Arrival | None = None,
) -> BatchEngine:
    """KV memory and scheduling around a model that has its weights, or that `can_follow` their ``arrival``.

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
    runner: Runner
    if is_native(model):
        await_layer = all_there if arrival is None else arrival.await_layer
        runner = NativeRunner(model, pool, blocks, device, options.deterministic, await_layer)
    else:
        runner = TransformersRunner(model, pool, blocks, device, options.deterministic, arrival)
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return BatchEngine(
        runner=runner,
        pool=pool,
        blocks=blocks,
        capacity=EngineCapacity(
            count * BLOCK_TOKENS, reach, options.max_concurrency, memory.activation_bytes, memory.logits_bytes
        ),
        vocabulary=embeddings.num_embeddings,
        context_tokens=context,
        prefill_tokens=prefill_tokens,
        model=manifest.digest,
    )
