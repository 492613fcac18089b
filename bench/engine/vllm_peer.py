"""vLLM for CPUs as a subject: run as a file, in an environment of its own, with MODEL_DIRECTORY; offline, greedy."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vllm import LLM, SamplingParams

from bench.engine.work import Workload, serve


def main() -> None:
    model = LLM(
        model=sys.argv[1],
        dtype="auto",
        max_model_len=512,
        max_num_seqs=64,
        enable_prefix_caching=False,
        seed=0,
        disable_log_stats=True,
    )
    vocabulary = model.llm_engine.model_config.get_vocab_size()

    def generate(workload: Workload) -> list[list[int]]:
        params = [
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False) for length in workload.lengths
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts(vocabulary)]
        return [list(each.outputs[0].token_ids) for each in model.generate(prompts, params, use_tqdm=False)]

    serve(generate)


if __name__ == "__main__":
    main()
