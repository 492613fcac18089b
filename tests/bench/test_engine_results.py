"""The table of the engine's benchmark: ratios of one round, what is missing by name, and the same work for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.engine.results import figures, markdown
from bench.engine.work import WORKLOADS, answer_for
from bench.load.results import replace_tables


def _result() -> dict[str, object]:
    runs = []
    for number, machine in enumerate((1.0, 3.0, 2.0)):  # a machine that changes between rounds
        for subject, seconds in (("ours", 1.0), ("transformers", 1.5)):
            runs.append(
                {"round": number, "subject": subject, "workload": "tiny-16", "seconds": seconds * machine, "tokens": 100,
                 "digest": "d"}
            )  # fmt: skip
    return {
        "runs": runs, "missing": {"vllm": "no wheel"}, "rounds": 3, "seconds": 9.0, "machine": "m", "commit": "c", "threads": 2,
        "torch": "t", "transformers": "v", "peer_policy": "active",
        "cold": {"ours_s": [0.4, 0.5], "peer_s": [2.0, 4.0], "phases": [{"build_s": 0.02}, {"build_s": 0.04}]},
        "from_disk": {"first_token_s": [2.0, 3.0, 2.5], "load_s": [1.8, 2.9, 2.2], "warm_s": [0.7, 0.8, 0.9]},
    }  # fmt: skip


def test_each_ratio_is_of_one_round_and_stands_beside_its_aim() -> None:
    lines = {(line["against"], line["what"]): line for line in figures(_result())}
    batched = lines["transformers, batched generate", "tiny Llama, fp32, 16 sequences"]
    assert batched["measured"] == "1.50x (1.50 to 1.50)"
    assert batched["reached"] is True
    assert batched["detail"].endswith("same tokens")
    cold = lines["fresh process, from_pretrained", "0.6B, 1.2 GB resident, request to first token"]
    assert cold["measured"] == "6.50x (5.00 to 8.00)"
    assert cold["reached"] is False
    early = lines["itself, warm", "0.6B, 1.2 GB on disk, prompt of 256 tokens: its first token after the last byte"]
    assert (early["measured"], early["reached"], early["detail"]) == ("0.20 s", None, "2.50 s in all; 0.80 s warm")
    assert ("transformers, batched generate", "tiny Llama, fp32, one sequence") not in lines


def test_what_did_not_run_is_named_with_its_reason() -> None:
    text = markdown(_result())
    assert "| vLLM for CPUs | 0.6B, bf16, 8 sequences | - | not run | - | no wheel |" in text
    assert "build 30." in text
    document = (Path(__file__).resolve().parents[2] / "docs" / "engine.md").read_text()
    assert text in replace_tables(document, text, "bench.engine")


def test_a_subject_must_generate_what_was_asked() -> None:
    workload = WORKLOADS["uneven"]
    assert workload.prompts(1024) == workload.prompts(1024)
    tokens = [[1] * length for length in workload.lengths]
    assert answer_for(workload, tokens, 2.0)["tokens"] == sum(workload.lengths)
    with pytest.raises(ValueError, match="lengths"):
        answer_for(workload, tokens[:-1], 2.0)
