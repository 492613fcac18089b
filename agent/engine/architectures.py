"""Which architectures this engine runs: those that were compared, token for token, with transformers' own `generate`.

Reading a class does not tell whether it may be run in a flat batch: a convolution, a recurrence or a position counted in the
row goes wrong without a word. So what was not compared is refused, by name. `python -m bench.engine.architectures TYPE`
compares; the architectures that most checkpoints have are compared in tests/agent/engine/test_architectures.py too.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

__all__ = ["COMPARED", "unfit"]

COMPARED: Final = frozenset({
    "afmoe", "apertus", "arcee", "aria_text", "bitnet", "bloom", "codegen", "cohere", "cohere2", "cohere2_moe", "cwm",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax",
    "jais2", "llama", "ministral", "ministral3", "mistral", "mixtral", "mpt", "nanochat", "nemotron", "olmo", "olmo2",
    "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2", "vaultgemma",
})  # fmt: skip
"""Model types, as configs name them."""

_PLAIN_LAYERS = frozenset({"full_attention", "sliding_attention"})
_VARYING_ROPE = frozenset({"dynamic", "longrope"})


def unfit(config: Any, model_class: Any) -> str | None:
    """Why a model of this class and config cannot be run exactly; None where it can."""
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised"
    if odd := set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS:
        return f"it has layers of kind {', '.join(sorted(odd))}"
    if getattr(config, "attention_chunk_size", None):
        return "it attends in chunks"
    if rope := _rope_types(getattr(config, "rope_parameters", None)) & _VARYING_ROPE:
        return f"its rotary frequencies ({', '.join(sorted(rope))}) depend on the longest sequence of a batch"
    if config.model_type not in COMPARED:
        return "it is none of the architectures that were compared with transformers' generate"
    if "logits_to_keep" not in inspect.signature(model_class.forward).parameters:
        return "its forward takes no logits_to_keep"
    return None


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    found = {str(parameters[key]) for key in ("rope_type", "type") if key in parameters}
    return found.union(*(_rope_types(value) for value in parameters.values()))
