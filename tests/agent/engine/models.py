"""Seeded tiny models of several architectures, and the manifest and tensors an engine takes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from agent.store.ingest.headers import SourceTensor
from agent.store.ingest.model import read_facts
from schema.checkpoint import FORMAT_VERSION, Manifest, TextDefaults
from schema.ids import Epoch
from schema.link import EngineOptions, SamplingParams, Submit

VOCAB = 193
CONTEXT = 256
UNHEARD = 60
"""A token that no test here has a model generate: what it is embedded as may be no number."""

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_LLAMA = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "model_type": "llama"},
    "qwen2": {**_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 16},
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": None},
    "mistral-window": {**_LLAMA, "model_type": "mistral", "sliding_window": 24},
    "opt": {**_COMMON, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 64},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "n_inner": None,
    },
    "gpt_neox": {**_COMMON, "model_type": "gpt_neox", "intermediate_size": 64},
    "phi3": {**_LLAMA, "model_type": "phi3", "pad_token_id": 0},
    "gemma": {**_LLAMA, "model_type": "gemma", "head_dim": 16},
    "gemma2": {**_LLAMA, "model_type": "gemma2", "tie_word_embeddings": False, "head_dim": 16, "sliding_window": 24},
    "gemma3": {
        **_LLAMA,
        "model_type": "gemma3_text",
        "tie_word_embeddings": False,
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "falcon": {**_COMMON, "model_type": "falcon"},
    "falcon-grouped": {**_COMMON, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": {
        **_COMMON,
        "model_type": "falcon",
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "bloom": {
        "model_type": "bloom",
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "seq_length": CONTEXT,
    },
    "mpt": {"model_type": "mpt", "vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": CONTEXT,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 24,
    },
    "gpt_bigcode": {
        "model_type": "gpt_bigcode",
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
    },
    "gptj": {
        "model_type": "gptj",
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "rotary_dim": 4,
    },
    "phi": {**_LLAMA, "model_type": "phi"},
    "stablelm": {**_LLAMA, "model_type": "stablelm", "qk_layernorm": True},
    "cohere": {**_LLAMA, "model_type": "cohere", "pad_token_id": 0},
    "olmo2": {**_LLAMA, "model_type": "olmo2", "pad_token_id": 0},
    "starcoder2": {**_LLAMA, "model_type": "starcoder2"},
    "mixtral": {**_LLAMA, "model_type": "mixtral", "num_local_experts": 4},
    "gpt_oss": {
        **_LLAMA,
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 4,
        "sliding_window": 24,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "qwen3_moe": {
        **_LLAMA,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def make_model(name: str, seed: int = 7, dtype: torch.dtype = torch.float32) -> Any:
    """A seeded model in eval mode, its weights spread widely enough that greedy choices are clear."""
    config = CONFIG_MAPPING[CONFIGS[name]["model_type"]].from_dict({**CONFIGS[name], "bos_token_id": 0, "eos_token_id": None})
    torch.manual_seed(seed)
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
    return model.eval().to(dtype)


def manifest_of(model: Any, kv_dtype: str = "F32") -> Manifest:
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    stored = {name: SourceTensor(name, kv_dtype, tuple(t.shape), "", 0, t.nbytes) for name, t in model.state_dict().items()}
    kv = read_facts(config, stored).kv
    tied = bool(model.config.tie_word_embeddings)
    return Manifest(
        format_version=FORMAT_VERSION,
        digest="0" * 64,
        layout="l1",
        architecture=type(model).__name__,
        parameters=0,
        vocab_size=model.config.vocab_size,
        max_context_tokens=CONTEXT,
        chunk_bytes=1 << 22,
        partitions=(),
        tensors=(),
        ties={"lm_head.weight": "model.embed_tokens.weight"}
        if tied and hasattr(model, "model") and type(model).__name__[:4] == "Qwen"
        else {},
        kv=kv,
        config=config,
        text=TextDefaults(),
        assets=(),
    )


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The state dict without its tied names, as a checkpoint stores it."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().clone()
    return tensors


def kv_options(manifest: Manifest, tokens: int, concurrency: int = 16) -> EngineOptions:
    """Options whose KV memory holds exactly so many tokens, a multiple of 16."""
    return EngineOptions(kv_bytes=manifest.kv.token_bytes * (tokens + 16), max_concurrency=concurrency)


def submit_of(
    attempt: int, prompt: Any, max_tokens: int = 16, generated: Any = (), choice: int = 0, tenant: str = "", **params: Any
) -> Submit:
    return Submit(
        attempt=Epoch(attempt),
        instance="i",
        instance_epoch=Epoch(1),
        request=f"r{attempt}",
        model="m",
        tenant=tenant,
        choice=choice,
        prompt=tuple(prompt),
        generated=tuple(generated),
        params=SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **params}),
    )
