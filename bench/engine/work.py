"""What the engine and its peers are asked to do: the same prompts, lengths and numbers of tokens for all of them.

Imports nothing beyond Python's own, since peers run in environments of their own.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["WORKLOADS", "Workload", "answer_for", "serve"]

_FIRST_ID = 10  # ids below may be special ones


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that all arrive at once: ``lengths`` tokens to generate each, greedily, ``running`` at a time.

    ``peer`` says how transformers does it: "batch" (one generate over all), "static" (a generate per ``running`` requests, in
    order, each as long as its longest), "continuous" (its own continuous batching).
    """

    name: str
    model: str
    prompt_tokens: int
    lengths: tuple[int, ...]
    running: int
    peer: str
    seed: int = 1

    def prompts(self, vocabulary: int) -> list[list[int]]:
        ids = random.Random(self.seed)
        return [[ids.randrange(_FIRST_ID, vocabulary) for _ in range(self.prompt_tokens)] for _ in self.lengths]

    def short(self) -> Workload:
        """The same with few tokens: what warms a subject up."""
        return Workload(
            self.name, self.model, self.prompt_tokens, tuple(min(4, length) for length in self.lengths), self.running, self.peer
        )

    def text(self) -> str:
        return json.dumps({"do": "generate", **asdict(self)})


def _uneven(count: int) -> tuple[int, ...]:
    lengths = random.Random(8)
    return tuple(lengths.randint(8, 128) for _ in range(count))


WORKLOADS = {
    each.name: each
    for each in (
        Workload("tiny-1", "tiny-llama", 32, (128,), 1, "batch"),
        Workload("tiny-16", "tiny-llama", 32, (128,) * 16, 16, "batch"),
        Workload("tiny-64", "tiny-llama", 32, (128,) * 64, 64, "batch"),
        Workload("uneven", "tiny-llama", 32, _uneven(64), 16, "static"),
        Workload("continuous-64", "tiny-llama", 32, (64,) * 64, 64, "continuous"),
        Workload("big-1", "qwen3-0.6b", 32, (32,), 1, "batch"),
        Workload("big-8", "qwen3-0.6b", 32, (32,) * 8, 8, "batch"),
        Workload("big-32", "qwen3-0.6b", 32, (32,) * 32, 32, "batch"),
    )
}


def answer_for(workload: Workload, tokens: list[list[int]], seconds: float) -> dict[str, Any]:
    """What a subject says of one run. Raises ValueError when it has not generated what was asked."""
    if tuple(map(len, tokens)) != workload.lengths:
        raise ValueError(f"{workload.name}: the lengths {[len(each) for each in tokens]} are not those that were asked for")
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]
    return {"seconds": seconds, "tokens": sum(workload.lengths), "digest": digest}


def serve(
    generate: Callable[[Workload], list[list[int]]], more: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> None:
    """Be a subject: say "ready", then answer each line of JSON with one, until there are no more.

    ``generate`` is timed and returns the new tokens of each request; ``more`` answers whatever else is asked.
    """
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.pop("do") == "generate":
            workload = Workload(**{**asked, "lengths": tuple(asked["lengths"])})
            began = time.perf_counter()
            tokens = generate(workload)
            answer = answer_for(workload, tokens, time.perf_counter() - began)
        else:
            assert more is not None
            answer = more(asked)
        out.write(json.dumps(answer) + "\n")
        out.flush()
