"""What a config says of its model: whether it can be run, its limits, what its KV cache costs, which tensors are tied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from agent.store.ingest.headers import SourceTensor
from agent.store.ingest.naming import named_as_in
from schema.checkpoint import FORMAT_VERSION, KvGeometry, Manifest, TextDefaults
from schema.errors import InvalidCheckpoint
from schema.memory import StepCosts

__all__ = ["ModelFacts", "check_runnable", "read_facts"]

_RUNNABLE: Final = ("F32", "F16", "BF16")
_DECODERS: Final = ("ForCausalLM", "LMHeadModel")
_CONTEXT_KEYS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len", "n_ctx")
_DEFAULT_CONTEXT: Final = {"bloom": 2048, "falcon": 2048}
"""Of architectures whose positions have no limit, and whose configs often name none: what transformers and the papers take."""
_LAYER_KEYS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEAD_KEYS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HIDDEN_KEYS: Final = ("hidden_size", "n_embd", "n_embed", "d_model")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The numbers of a config that the rest of the system plans with."""

    architecture: str
    vocab_size: int
    max_context_tokens: int
    kv: KvGeometry
    config: dict[str, Any]


def read_facts(config: dict[str, Any], tensors: Mapping[str, SourceTensor]) -> ModelFacts:
    """Judge a config without running anything of it. Raises InvalidCheckpoint naming what is missing or not supported."""
    if config.get("quantization_config"):
        raise InvalidCheckpoint("config.json has a quantization_config; quantised checkpoints cannot be run")
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture is None:
        raise InvalidCheckpoint("config.json names no architecture")
    if not isinstance(architecture, str) or not architecture.endswith(_DECODERS):
        raise InvalidCheckpoint(f"architecture {architecture!r} is no decoder (…ForCausalLM) that could be run")
    if not isinstance(config.get("model_type"), str):
        raise InvalidCheckpoint("config.json names no model_type")
    layers = _number(config, _LAYER_KEYS)
    if layers > len(tensors):
        raise InvalidCheckpoint(f"config.json says {layers} layers; there are {len(tensors)} tensors")
    heads = _number(config, _HEAD_KEYS)
    kv_heads = 1 if _shares_one_head(config) else _number(config, ("num_key_value_heads", "num_kv_heads"), heads)
    head_dim = _number(config, ("head_dim",), max(1, _number(config, _HIDDEN_KEYS) // heads))
    values = {
        "architecture": architecture,
        "vocab_size": _number(config, ("vocab_size",)),
        "max_context_tokens": _number(config, _CONTEXT_KEYS, _DEFAULT_CONTEXT.get(config["model_type"])),
        "kv": {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": _main_dtype(tensors.values())},
        "config": config,
    }
    try:
        return msgspec.convert(values, ModelFacts)
    except msgspec.ValidationError as error:
        raise InvalidCheckpoint(f"config.json: {error}") from error


def _shares_one_head(config: dict[str, Any]) -> bool:
    """Multi-query attention, by the flag that Falcon and GPT-BigCode have for it, true where their configs do not say."""
    if config["model_type"] not in ("falcon", "gpt_bigcode"):
        return False
    return bool(config.get("multi_query", True)) and not config.get("new_decoder_architecture", False)


def check_runnable(
    facts: ModelFacts, tensors: Mapping[str, SourceTensor]
) -> tuple[dict[str, SourceTensor], dict[str, str], StepCosts]:
    """Build the model without weights, as the engine will, and hold the tensors against it; returns them as the model has
    them (`named_as_in`) without what it computes by itself, its tied names, and what a step of it costs.

    Tied names map the one that the model ties to the one it is tied to, as the tensors are named then. Imports torch and
    transformers. Raises InvalidCheckpoint when the engine would refuse the model, or a tensor is missing, unknown or of
    another shape.
    """
    from agent.engine.memory import step_costs
    from agent.engine.skeleton import build_skeleton
    from agent.engine.weights import computed_anyway

    draft = _draft(facts)
    model: Any = build_skeleton(draft)
    tensors = named_as_in(model, tensors)
    ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    is_computed = computed_anyway(model)
    given: dict[str, SourceTensor] = {}
    for tensor in list(tensors.values()):
        # A checkpoint of the bare base model lacks its prefix, one of a larger model has it too much.
        names = (tensor.name, prefix + tensor.name, tensor.name.removeprefix(prefix))
        name = next((each for each in names if each in wanted), None)
        if name is not None:
            given[name] = tensor
        elif is_computed(tensor.name):
            del tensors[tensor.name]
        else:
            raise InvalidCheckpoint(f"tensor {tensor.name!r} in {tensor.file} is none of {facts.architecture}'s")
    for name, shape in wanted.items():
        if name in given and given[name].shape != shape:
            raise InvalidCheckpoint(f"tensor {name!r} has shape {given[name].shape}; by config.json it has {shape}")
        if not given.keys() & {name, ties.get(name), *(alias for alias, target in ties.items() if target == name)}:
            raise InvalidCheckpoint(f"tensor {name!r}, which {facts.architecture} needs, is missing")
    stored_as = {name: tensor.name for name, tensor in given.items()}
    named = {stored_as.get(alias, alias): stored_as.get(name, name) for alias, name in ties.items()}
    return tensors, named, step_costs(model, draft)


def _draft(facts: ModelFacts) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        digest="0" * 64,
        layout="draft",
        architecture=facts.architecture,
        parameters=0,
        vocab_size=facts.vocab_size,
        max_context_tokens=facts.max_context_tokens,
        chunk_bytes=1 << 22,
        partitions=(),
        tensors=(),
        ties={},
        kv=facts.kv,
        config=facts.config,
        text=TextDefaults(),
        assets=(),
    )


def _number(config: dict[str, Any], keys: tuple[str, ...], default: int | None = None) -> int:
    for key in keys:
        if (value := config.get(key)) is not None:
            if type(value) is not int or not 0 < value < 1 << 40:
                raise InvalidCheckpoint(f"config.json: {key} is {value!r}, not a sensible number")
            return value
    if default is None:
        raise InvalidCheckpoint(f"config.json has no {keys[0]}")
    return default


def _main_dtype(tensors: Iterable[SourceTensor]) -> str:
    """The dtype of most bytes: what the model computes in, and keeps its KV cache in."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    dtype = max(sizes, key=lambda each: sizes[each])
    if dtype not in _RUNNABLE:
        raise InvalidCheckpoint(f"the weights are {dtype}; only {', '.join(_RUNNABLE)} can be run")
    return dtype
