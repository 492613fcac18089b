"""The ways to multiply activations by weights on this processor, beside torch's own: see agent.engine.products.

    python -m bench.products [--rounds 7] [--out FILE]

Each figure is the time of torch.nn.functional.linear divided by that of the way, weights out of the cache, interleaved.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor
from torch.nn.functional import linear

from agent.engine.products import Product, Ways, ways_of
from agent.native import few_tokens
from agent.native.few_tokens import Way
from bench.report import Report

SHAPES = ((2560, 1024), (6144, 1024), (1024, 3072))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
WEIGHTS_BYTES = 128 << 20
"""So many of one shape are multiplied by in turn that none stays in the cache."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report("products of activations with weights, against torch's linear")
    report.note(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in SHAPES:
                _compare(report, dtype, shape, args.rounds)
    if args.out:
        report.save(args.out)


def _compare(report: Report, dtype: torch.dtype, shape: tuple[int, int], rounds: int) -> None:
    count = max(2, WEIGHTS_BYTES // (shape[0] * shape[1] * dtype.itemsize))
    weights = [torch.randn(shape).to(dtype) for _ in range(count)]
    most = 1 << 30
    ways = {"columns": Ways(columns=range(1, most)), "chosen": ways_of(dtype, torch.device("cpu"))}
    if dtype != torch.float32:
        ways["widened"] = Ways(widened=1)
        kinds = (Way.DOT, Way.BFLOAT16) if dtype == torch.bfloat16 else (Way.FLOAT16,)
        ways |= {f"few, {way.name}": Ways(few=range(1, most), way=way) for way in kinds if way in few_tokens.ways()}
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1]).to(dtype)
        spans: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            rows = _seconds(weights, lambda weight, x=x: linear(x, weight))  # type: ignore[misc]
            for name, way in ways.items():
                spans[name].append(rows / _seconds(weights, lambda weight, x=x, way=way: Product((weight,), None, way)(x)))  # type: ignore[misc]
        for name, ratios in spans.items():
            kind = str(dtype).removeprefix("torch.")
            report.row(f"{kind} {shape[0]}x{shape[1]}, {tokens} tokens: linear / {name}", ratios, "x")


def _seconds(weights: list[Tensor], multiply: Callable[[Tensor], Tensor]) -> float:
    began = time.perf_counter()
    for weight in weights:
        multiply(weight)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
