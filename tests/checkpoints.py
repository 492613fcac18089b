"""Tiny seeded Hugging Face directories for tests: real weights, a real byte-level tokenizer, a chat template."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = [
    "CHAT_TEMPLATE",
    "SPECIAL_TOKENS",
    "Tensor",
    "framed_tokenizer",
    "llama_tensors",
    "make_llama_dir",
    "make_tokenizer",
    "write_safetensors",
]

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|turn|>")
"""Their ids are 0, 1, 2; the first begins a text, the second ends a reply."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)

_CORPUS = (
    "A manager keeps the state of a cluster. An agent runs on every machine.",
    "The store reads a checkpoint into its arena and the worker maps it without a copy.",
    "Tokens carry positions, so that a journal can go on elsewhere when a worker was killed.",
)

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Tensor = tuple[str, tuple[int, ...], bytes]
"""dtype in safetensors' names, shape, raw little-endian bytes."""


def make_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab`` ids that encodes any text and decodes it again exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def framed_tokenizer(tokenizer: str, ids: list[int] | None) -> str:
    """A tokenizer.json that puts ``ids`` before every text; for None a token that it does not define, and so panics in use."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    frame = {"<frame>": {"id": "<frame>", "ids": ids, "tokens": ["<frame>"]}} if ids is not None else {}
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<frame>", "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": frame,
    }
    return json.dumps(json.loads(tokenizer) | {"post_processor": post})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with its data in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, _, data in tensors.values():
            file.write(data)


def llama_tensors(config: Mapping[str, Any], *, seed: int = 0, dtype: str = "float32", std: float = 0.1) -> dict[str, Tensor]:
    """Seeded random weights under the names of LlamaForCausalLM; norms are ones."""
    generator = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def encode(values: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
        if dtype == "bfloat16":
            return "BF16", values.shape, (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
        return _DTYPES[dtype], values.shape, values.astype("<f4" if dtype == "float32" else "<f2").tobytes()

    def random(*shape: int) -> Tensor:
        return encode(generator.standard_normal(shape, dtype=np.float32) * np.float32(std))

    ones = encode(np.ones(hidden, dtype=np.float32))
    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": ones,
            prefix + "mlp.down_proj.weight": random(hidden, inner),
            prefix + "mlp.gate_proj.weight": random(inner, hidden),
            prefix + "mlp.up_proj.weight": random(inner, hidden),
            prefix + "post_attention_layernorm.weight": ones,
            prefix + "self_attn.k_proj.weight": random(kv, hidden),
            prefix + "self_attn.o_proj.weight": random(hidden, q),
            prefix + "self_attn.q_proj.weight": random(q, hidden),
            prefix + "self_attn.v_proj.weight": random(kv, hidden),
        }
    tensors["model.norm.weight"] = ones
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = random(config["vocab_size"], hidden)
    return tensors


def make_llama_dir(
    path: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 384,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 512,
    seed: int = 0,
    dtype: str = "float32",
    tie: bool = False,
    shards: int = 1,
    eos: bool = True,
) -> Path:
    """A Llama checkpoint at ``path`` (made if missing), in one safetensors file or in ``shards`` with an index.

    The same arguments make the same bytes. ``vocab`` must be at least 259 (all bytes and three special tokens). Without
    ``eos`` no token ends a reply, so that a random model generates until max_tokens.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tie,
        "bos_token_id": 0,
        "dtype": dtype,
    } | ({"eos_token_id": 1} if eos else {})
    (path / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"bos_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 40}
    (path / "generation_config.json").write_text(json.dumps(generation | ({"eos_token_id": [1]} if eos else {}), indent=1))
    make_tokenizer(vocab).save(str(path / "tokenizer.json"))
    words = {"bos_token": SPECIAL_TOKENS[0]} | ({"eos_token": SPECIAL_TOKENS[1]} if eos else {})
    (path / "tokenizer_config.json").write_text(
        json.dumps(words | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}, indent=1)
    )
    _write_weights(path, llama_tensors(config, seed=seed, dtype=dtype), shards)
    return path


def _write_weights(path: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        write_safetensors(path / file, part)
        weight_map |= dict.fromkeys(part, file)
    total = sum(len(data) for _, _, data in tensors.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    )
