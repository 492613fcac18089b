"""Write a random checkpoint of a real architecture as a Hugging Face directory, for benchmarks and tests.

    python bench/make_checkpoint.py qwen3-0.6b /tmp/qwen3-0.6b           1.2 GB of bf16
    python bench/make_checkpoint.py tiny-opt /tmp/tiny-opt --seed 3
    python bench/make_checkpoint.py llama-1.1b DIR --shard-bytes 500MB   in several files with an index
    python bench/make_checkpoint.py --list

Names, shapes and ties are those of transformers' own class, built on the meta device. Weights are drawn tensor by tensor, each
from a generator seeded with the seed and the tensor's name, and written as they are drawn: the bytes depend on nothing
else, and memory stays bounded by a block of one tensor. The answers of such a model are noise, but its speed is real.

The tokenizer is the bundled model's (1,024 tokens). A larger vocabulary is padded with tokens ``w1024``, ``w1025``, ..., so
that every id that a random model picks is text; no text is tokenised to them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "sllmctl" / "bundled" / "docs-2m"
BLOCK_ELEMENTS = 8 << 20
STD = 0.02
DTYPES = {"bfloat16": (torch.bfloat16, "BF16", 2), "float16": (torch.float16, "F16", 2), "float32": (torch.float32, "F32", 4)}

_TINY: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_GATED: dict[str, Any] = {**_TINY, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 2048}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "dtype": "bfloat16",
    },
    # https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0/blob/main/config.json
    "llama-1.1b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    # https://huggingface.co/facebook/opt-125m/blob/main/config.json
    "opt-125m": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 2048, "word_embed_proj_dim": 768, "dtype": "float16",
    },
    # https://huggingface.co/openai-community/gpt2/blob/main/config.json
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "dtype": "float32",
    },
    "tiny-llama": {"model_type": "llama", **_TINY_GATED, "tie_word_embeddings": False, "dtype": "float32"},
    "tiny-qwen2": {"model_type": "qwen2", **_TINY_GATED, "tie_word_embeddings": True, "dtype": "bfloat16"},
    "tiny-qwen3": {"model_type": "qwen3", **_TINY_GATED, "head_dim": 32, "tie_word_embeddings": True, "dtype": "bfloat16"},
    "tiny-mistral": {"model_type": "mistral", **_TINY_GATED, "tie_word_embeddings": False, "dtype": "bfloat16"},
    "tiny-opt": {
        "model_type": "opt", **_TINY, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 2048,
        "dtype": "float16",
    },
    "tiny-gpt2": {
        "model_type": "gpt2", "vocab_size": 1024, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024,
        "dtype": "float32",
    },
    "tiny-neox": {
        "model_type": "gpt_neox", **_TINY, "intermediate_size": 128, "max_position_embeddings": 2048, "dtype": "float16",
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def make_checkpoint(architecture: str, out: Path, *, seed: int = 0, shard_bytes: int = 1 << 62) -> int:
    """Write the directory and return the bytes of its tensors. Raises KeyError for an unknown name, FileExistsError for a full
    directory."""
    spec = ARCHITECTURES[architecture]
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    # No architecture's own special ids (GPT-2's and OPT's lie beyond or inside the small vocabulary): the bundled tokenizer's.
    config = AutoConfig.for_model(**spec, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    total = _write_weights(out, _stored(model), spec["dtype"], seed, shard_bytes)
    _write_tokenizer(out, spec["vocab_size"])
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0, "do_sample": True}))
    (out / "README.md").write_text(
        f"# {architecture}\n\nRandom weights (seed {seed}) in the shape of a real model, written by bench/make_checkpoint.py. "
        "It has learnt nothing.\nThe tokenizer is that of sllmctl's bundled model, padded to the vocabulary with tokens w1024, "
        "w1025, ...\n"
    )
    return total


def _stored(model: torch.nn.Module) -> list[Tensor]:
    """The tensors that a checkpoint of this model holds: its parameters, a tied one once, in the order of their use."""
    # named_parameters passes over the second name of a shared parameter; tying is by reference on the meta device too.
    model.tie_weights()
    return [Tensor(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def _write_weights(out: Path, tensors: list[Tensor], dtype_name: str, seed: int, shard_bytes: int) -> int:
    _, _, width = DTYPES[dtype_name]
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = tensor.elements * width
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    total = sum(tensor.elements for tensor in tensors) * width
    if len(shards) == 1:
        _write_shard(out / "model.safetensors", shards[0], dtype_name, seed)
        return total
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(out / name, shard, dtype_name, seed)
        weight_map |= {tensor.name: name for tensor in shard}
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
    return total


def _write_shard(path: Path, tensors: list[Tensor], dtype_name: str, seed: int) -> None:
    """One safetensors file: an 8-byte length, a JSON header padded to 8 bytes, the tensors' bytes one after another."""
    _, code, width = DTYPES[dtype_name]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.elements * width
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            _write_tensor(file, tensor, dtype_name, seed)


def _write_tensor(file: BinaryIO, tensor: Tensor, dtype_name: str, seed: int) -> None:
    for block in _blocks(tensor, seed):
        cast = block.to(DTYPES[dtype_name][0])
        # numpy has no bfloat16: the bytes are taken as they lie.
        file.write(cast.view(torch.uint8).numpy().data)


def _blocks(tensor: Tensor, seed: int) -> Iterator[torch.Tensor]:
    """The values in float32, at most BLOCK_ELEMENTS at once: ones for the weights of norms, zeros for biases, else normal."""
    # The generator takes 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{tensor.name}".encode()))
    is_matrix = len(tensor.shape) > 1
    for start in range(0, tensor.elements, BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, tensor.elements - start)
        if is_matrix:
            yield torch.randn(count, generator=generator) * STD
        elif tensor.name.endswith("bias"):
            yield torch.zeros(count)
        else:
            yield torch.ones(count)


def _write_tokenizer(out: Path, vocab_size: int) -> None:
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(BUNDLED / name, out / name)
    tokenizer = json.loads((BUNDLED / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    # "Ġ" is how byte-level BPE writes a space.
    vocabulary |= {f"Ġw{index}": index for index in range(len(vocabulary), vocab_size)}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    for unit, factor in units.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="?", choices=ARCHITECTURES)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shard-bytes", type=_bytes, default=1 << 62, help="begin another file when one would grow beyond this"
    )
    parser.add_argument("--list", action="store_true", help="print the names and end")
    args = parser.parse_args()
    if args.list:
        print("\n".join(ARCHITECTURES))
        return 0
    if args.architecture is None or args.out is None:
        parser.error("an architecture and a directory are needed; --list prints the names")
    try:
        total = make_checkpoint(args.architecture, args.out, seed=args.seed, shard_bytes=args.shard_bytes)
    except FileExistsError as error:
        parser.error(str(error))
    print(f"{args.out}: {total / 1e6:,.1f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
