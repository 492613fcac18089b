"""The engine on a CUDA device, Qwen3-0.6B's shape in bf16: decode against transformers and the memory's bandwidth.

Weights are seeded random numbers, so ids mean nothing, but the work is that of the real model. The limit of one step is
the time in which the device reads all weights once, by its own measured copy bandwidth. Runs alternate; medians are printed as
`name<TAB>value`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from agent.engine.build import build_engine
from schema.checkpoint import FORMAT_VERSION, KvGeometry, Manifest, TextDefaults
from schema.ids import Epoch
from schema.link import EngineOptions, SamplingParams, Submit

PROMPT = 128
NEW = 128
SHAPE: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 3072, "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip


def make() -> tuple[Any, Manifest]:
    config = Qwen3Config(**SHAPE)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        digest="0" * 64,
        layout="l1",
        architecture="Qwen3ForCausalLM",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=SHAPE["vocab_size"],
        max_context_tokens=4096,
        chunk_bytes=1 << 22,
        partitions=(),
        tensors=(),
        ties={"lm_head.weight": "model.embed_tokens.weight"},
        kv=KvGeometry(28, 8, 128, "BF16"),
        config={**config.to_dict(), "architectures": ["Qwen3ForCausalLM"]},
        text=TextDefaults(),
        assets=(),
    )
    return model, manifest


def prompt_of(index: int) -> list[int]:
    return torch.randint(0, 150000, (PROMPT,), generator=torch.Generator().manual_seed(index)).tolist()


def engine_tokens_per_s(engine: Any, concurrency: int, first_id: int) -> tuple[float, float]:
    """(tokens per second while all sequences decode, seconds from submission until every one has its first token)."""
    for index in range(concurrency):
        params = SamplingParams(max_tokens=NEW, temperature=0.0)
        engine.submit(
            Submit(
                attempt=Epoch(first_id + index),
                instance="i",
                instance_epoch=Epoch(1),
                request="r",
                model="m",
                prompt=tuple(prompt_of(index)),
                params=params,
            )
        )
    began = time.monotonic()
    started: set[int] = set()
    ended = counted = 0
    decoding_from = 0.0
    while ended < concurrency:
        output = engine.step()
        started |= {run.attempt for run in output.runs}
        if decoding_from:
            counted += sum(len(run.ids) for run in output.runs)
        elif len(started) == concurrency:
            decoding_from = time.monotonic()
        ended += len(output.ends)
    return counted / (time.monotonic() - decoding_from), decoding_from - began


def peer_tokens_per_s(model: Any, concurrency: int) -> float:
    """transformers' batched generate; its prefill is timed apart and taken off."""
    ids = torch.tensor([prompt_of(index) for index in range(concurrency)], device="cuda")
    mask = torch.ones_like(ids)

    def run(count: int) -> float:
        torch.cuda.synchronize()
        began = time.monotonic()
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.monotonic() - began

    first = run(1)
    return concurrency * (NEW - 1) / (run(NEW) - first)


def copy_bandwidth() -> float:
    """Bytes read per second by a large device-to-device copy, counting reads alone as a decode step's weights are read."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.monotonic()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return 2 * source.numel() / statistics.median(times)


def report(name: str, value: float) -> None:
    print(f"{name}\t{value:.4g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    report("device_memory_gbps", bandwidth / 1e9)
    model, manifest = make()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    limit = bandwidth / weights
    report("decode_limit_steps_per_s", limit)
    options = EngineOptions(kv_bytes=8 << 30, max_concurrency=64)
    engine = build_engine(manifest, tensors, options, "cuda")
    ids = 1
    for concurrency in (1, 8, 32):
        ours, firsts, theirs = [], [], []
        for measured in range(args.rounds + 1):
            rate, first = engine_tokens_per_s(engine, concurrency, ids)
            ids += concurrency
            peer = peer_tokens_per_s(model, concurrency)
            if measured:
                ours.append(rate)
                firsts.append(first)
                theirs.append(peer)
        report(f"c{concurrency}.engine_tokens_per_s", statistics.median(ours))
        report(f"c{concurrency}.transformers_tokens_per_s", statistics.median(theirs))
        report(f"c{concurrency}.ratio", statistics.median(a / b for a, b in zip(ours, theirs, strict=True)))
        report(f"c{concurrency}.of_bandwidth_limit", statistics.median(ours) / concurrency / limit)
        report(f"c{concurrency}.all_first_tokens_s", statistics.median(firsts))


if __name__ == "__main__":
    main()
