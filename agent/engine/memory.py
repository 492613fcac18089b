"""How an instance's memory is divided: weights, KV blocks, a step's activations and its logits, all of it before anything runs.

What a step needs beside the KV cache is bounded by the model's shapes (`schema.memory`), so nothing is run to find it out. A
start whose memory cannot be had fails with all of these numbers, rather than an engine in the middle of its work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from agent.engine.blocks import BLOCK_TOKENS
from agent.engine.dtypes import torch_dtype
from schema.checkpoint import Manifest
from schema.errors import OutOfSpace
from schema.link import EngineOptions
from schema.memory import StepCosts

__all__ = ["MemoryPlan", "free_bytes", "plan_memory", "step_costs"]

_WITH_BIAS: Final = frozenset({"bloom", "mpt"})
"""Model types that always have ALiBi; Falcon's config says whether it has."""
_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUP: Final = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """``blocks`` of ``block_bytes`` each, the zero block that pads tables not counted; what else a step takes at most."""

    blocks: int
    block_bytes: int
    activation_bytes: int
    logits_bytes: int

    @property
    def kv_bytes(self) -> int:
        return (self.blocks + 1) * self.block_bytes

    @property
    def total_bytes(self) -> int:
        """All but the weights, which lie in the store's memory."""
        return self.kv_bytes + self.activation_bytes + self.logits_bytes


def plan_memory(
    model: nn.Module, manifest: Manifest, options: EngineOptions, prefill_tokens: int, free: int | None
) -> MemoryPlan:
    """Blocks within ``options.kv_bytes``, and what a step takes beside them. ``free``: bytes that are there, weights taken off.

    Raises OutOfSpace when ``kv_bytes`` hold no block, or when what is free does not suffice for all of it; None is not checked.
    """
    block_bytes = manifest.kv.token_bytes * BLOCK_TOKENS
    blocks = options.kv_bytes // block_bytes - 1
    if blocks < 1:
        raise OutOfSpace(f"kv_bytes {options.kv_bytes} hold no KV block; this model needs at least {2 * block_bytes}")
    costs = step_costs(model, manifest)
    context = min(options.max_context_tokens or manifest.max_context_tokens, manifest.max_context_tokens)
    sequences = options.max_concurrency
    plan = MemoryPlan(
        blocks=blocks,
        block_bytes=block_bytes,
        activation_bytes=costs.activation_bytes(
            sequences=sequences, context_tokens=context, kv_tokens=blocks * BLOCK_TOKENS, prefill_tokens=prefill_tokens
        ),
        logits_bytes=costs.logits_bytes(sequences=sequences),
    )
    if free is not None and plan.total_bytes > free:
        raise OutOfSpace(
            f"this instance needs {plan.total_bytes} bytes beside its weights ({plan.kv_bytes} for the KV cache, "
            f"{plan.activation_bytes} for activations, {plan.logits_bytes} for logits) and {free} are free; give it fewer "
            "kv_bytes, or fewer sequences (max_concurrency)"
        )
    return plan


def step_costs(model: nn.Module, manifest: Manifest) -> StepCosts:
    """What a step of this skeleton costs; ``manifest`` says its numeric type, its KV geometry and its vocabulary."""
    item = torch_dtype(manifest.kv.dtype).itemsize
    config: Any = model.config
    unfused = (
        config.model_type in _WITH_BIAS
        or bool(getattr(config, "alibi", False))
        or bool(getattr(config, "attn_logit_softcapping", None))
        or any(name.endswith(".sinks") for name, _ in model.named_parameters())
    )
    return StepCosts(
        token_bytes=_token_bytes(model, item),
        layer_kv_bytes=manifest.kv.token_bytes // manifest.kv.layers,
        item_bytes=item,
        vocab_size=manifest.vocab_size,
        unfused_heads=config.num_attention_heads if unfused else 0,
        head_bytes=manifest.kv.head_dim * item,
    )


def free_bytes(device: str) -> int | None:
    """Memory that this process may still take on a device; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    found = [value for value in (_available(), _cgroup_left()) if value is not None]
    return min(found) if found else None


def _token_bytes(model: nn.Module, item: int) -> int:
    """Activations of one token: what all products of the widest layer give, twice, and the residual stream in float32."""
    chosen = int(getattr(model.config, "num_experts_per_tok", None) or 1)
    widths: dict[str, int] = {}
    hidden = 0
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        layer = _layer_of(name)
        if parameter.dim() == 1 and layer:
            hidden = max(hidden, shape[0])
        if parameter.dim() == 2 and layer:
            widths[layer] = widths.get(layer, 0) + max(shape)
        elif parameter.dim() == 3:
            widths[layer] = widths.get(layer, 0) + chosen * max(shape[1:])
    return 2 * item * max(widths.values(), default=0) + 8 * hidden


def _layer_of(name: str) -> str:
    """The layer a parameter belongs to: its name up to the first number; empty outside of layers."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    except (OSError, StopIteration):
        return None


def _cgroup_left() -> int | None:
    """What the limits of this process's control group and of those above it leave; None where there is none.

    A group is charged with the files that it has read, too. Those it has not used lately make room as soon as it is needed.
    """
    line = next((line for line in _text(_OWN_CGROUP).splitlines() if line.startswith("0::")), "0::/")
    own = _CGROUPS / line[3:].strip("/")
    if not own.is_dir():  # in a container the path may be the host's
        own = _CGROUPS
    left: list[int] = []
    for level in (own, *(above for above in own.parents if above.is_relative_to(_CGROUPS))):
        limit, used = _text(level / "memory.max").strip(), _text(level / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            files = re.search(r"^inactive_file (\d+)$", _text(level / "memory.stat"), re.MULTILINE)
            left.append(max(0, int(limit) - int(used) + (int(files.group(1)) if files else 0)))
    return min(left, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
