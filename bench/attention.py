"""Attention of tokens that decode, by the compiled way and by torch's over gathered blocks: see agent.engine.attention_paged.

    python -m bench.attention [--rounds 7] [--out FILE]

Each figure is the time of `SdpaAttention` divided by that of `PagedAttention`, interleaved, new keys and values stored by both.
Sequences have between three quarters and all of the tokens that are named; their blocks lie scattered, and out of the cache
where the layers that are gone through in turn are larger than that.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from agent.engine.attention import Attention, AttentionBatch, KvPool, LayerAttention
from agent.engine.attention_paged import PagedAttention
from agent.engine.attention_sdpa import SdpaAttention
from agent.engine.blocks import BlockManager
from agent.engine.decoding import Decoding
from agent.engine.sequence import Sequence
from agent.native import paged_attention
from bench.report import Report
from schema.ids import Epoch
from schema.link import SamplingParams, Submit

_LAYERS = 4
_ROUND_S = 0.2
"""A round takes so long at least, of each way."""


@dataclass(frozen=True)
class Shape:
    """``tokens`` of each of so many ``sequences``, at most."""

    name: str
    sequences: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    window: int = 0


SHAPES = (
    Shape("tiny Llama, 1 sequence of 160", 1, 4, 2, 16, 160, torch.float32),
    Shape("tiny Llama, 64 of 160", 64, 4, 2, 16, 160, torch.float32),
    Shape("12 heads of 64, 8 of 512", 8, 12, 12, 64, 512, torch.float32),
    Shape("0.6B (16 heads, 8 KV heads of 128), 1 of 64", 1, 16, 8, 128, 64),
    Shape("0.6B, 8 of 64", 8, 16, 8, 128, 64),
    Shape("0.6B, 32 of 64", 32, 16, 8, 128, 64),
    Shape("8B (32 heads, 8 KV heads of 128), 1 of 4,096", 1, 32, 8, 128, 4096),
    Shape("8B, 8 of 1,024", 8, 32, 8, 128, 1024),
    Shape("8B, 8 of 1,024, a window of 256", 8, 32, 8, 128, 1024, window=256),
    Shape("8B in float16, 8 of 1,024", 8, 32, 8, 128, 1024, torch.float16),
    Shape("Falcon 7B (71 heads, one KV head of 64), 8 of 512", 8, 71, 1, 64, 512),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report("attention of tokens that decode, against torch's over gathered blocks")
    report.note(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    with torch.inference_mode():
        for threads in sorted({1, torch.get_num_threads()}):
            torch.set_num_threads(threads)
            for shape in SHAPES:
                for width in paged_attention.widths():
                    ratios = _ratios(shape, PagedAttention(width, deterministic=False), args.rounds)
                    kind = str(shape.dtype).removeprefix("torch.")
                    report.row(f"{shape.name}, {kind}, {threads} threads, {width.name} at once", ratios, "x")
    if args.out:
        report.save(args.out)


def _ratios(shape: Shape, paged: PagedAttention, rounds: int) -> list[float]:
    batch = _batch(shape)
    query = torch.randn(shape.sequences, shape.heads, shape.head_dim).to(shape.dtype)
    fresh = torch.randn(shape.sequences, 2 * shape.kv_heads, shape.head_dim).to(shape.dtype)
    hows = [LayerAttention(layer, shape.head_dim**-0.5, shape.window) for layer in range(_LAYERS)]

    def seconds(attention: Attention, times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            for group in batch.decodes:
                group.masks.clear()
            for how in hows:
                attention(batch, query, fresh, how)
        return time.perf_counter() - began

    gathered = SdpaAttention()
    seconds(gathered, 1), seconds(paged, 1)
    times = max(1, round(_ROUND_S / seconds(gathered, 1)))
    return [seconds(gathered, times) / seconds(paged, times) for _ in range(rounds)]


def _batch(shape: Shape) -> AttentionBatch:
    """Sequences that came one after another, and took their blocks by turns."""
    lengths = np.sort(np.random.default_rng(1).integers(shape.tokens * 3 // 4, shape.tokens + 1, shape.sequences))[::-1]
    widest = BlockManager.needed(shape.tokens)
    pool = KvPool(_LAYERS, shape.sequences * widest, shape.kv_heads, shape.head_dim, shape.dtype, "cpu")
    for layer in pool.layers:
        layer[1:].normal_()
    blocks = BlockManager(shape.sequences * widest, shape.sequences, widest, pool.erase)
    sequences = [_sequence(number) for number in range(shape.sequences)]
    for sequence in sequences:
        blocks.admit(sequence, reserve=0)
    for width in range(2, widest + 1):
        for sequence, length in zip(sequences, lengths.tolist(), strict=True):
            blocks.extend(sequence, min(length, width * 16))
    slots = [each.blocks[(length - 1) // 16] * 16 + (length - 1) % 16 for each, length in zip(sequences, lengths, strict=True)]
    return AttentionBatch(
        pool=pool,
        slots=torch.tensor(slots),
        tables=blocks.tables,
        rows=np.array([sequence.row for sequence in sequences]),
        positions=lengths - 1,
        decodes=Decoding(pool, blocks, torch.device("cpu")).groups(sequences, lengths.copy()),
        prefills=[],
    )


def _sequence(number: int) -> Sequence:
    submit = Submit(
        attempt=Epoch(number),
        instance="",
        instance_epoch=Epoch(0),
        request="",
        model="",
        prompt=(1,),
        params=SamplingParams(max_tokens=1),
    )
    return Sequence(submit)


if __name__ == "__main__":
    main()
