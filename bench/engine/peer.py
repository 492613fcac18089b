"""transformers as a subject: `python -m bench.engine.peer MODEL_DIRECTORY THREADS`, in the environment that users have."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from bench.engine.work import Workload, serve

# One block holds a request of the workload; the pool is touched whole, so it is not larger than it must be.
_BLOCK_TOKENS = 128


class Peer:
    """Greedy generation without an end-of-sequence token, so that lengths are what was asked for."""

    def __init__(self, directory: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        self._model.generation_config = GenerationConfig(pad_token_id=0)
        self._managers: dict[int, Any] = {}

    def generate(self, workload: Workload) -> list[list[int]]:
        prompts = workload.prompts(self._model.config.vocab_size)
        if workload.peer == "continuous":
            return self._continuous(prompts, workload)
        tokens: list[list[int]] = []
        for start in range(0, len(prompts), workload.running):
            tokens += self._batch(prompts[start : start + workload.running], workload.lengths[start : start + workload.running])
        return tokens

    def _batch(self, prompts: list[list[int]], lengths: tuple[int, ...]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(lengths), do_sample=False, eos_token_id=None
        )
        return [row[:length] for row, length in zip(out[:, ids.shape[1] :].tolist(), lengths, strict=True)]

    def _continuous(self, prompts: list[list[int]], workload: Workload) -> list[list[int]]:
        """Its manager is kept between runs: only the requests are timed. ids beyond the vocabulary end nothing."""
        out = self._model.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                max_new_tokens=max(workload.lengths), do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_BLOCK_TOKENS,
                num_blocks=2 * len(prompts),
                max_batch_tokens=max(512, len(prompts) * workload.prompt_tokens),
            ),
            persistent_manager=True,
        )
        given = {tuple(each.prompt_ids): each.generated_tokens for each in out.values()}
        return [list(given[tuple(prompt)]) for prompt in prompts]


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    with torch.inference_mode():
        serve(Peer(sys.argv[1]).generate)


if __name__ == "__main__":
    main()
