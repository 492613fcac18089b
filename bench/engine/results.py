"""From the runs of the engine's benchmark to its table: medians of paired ratios, each beside its aim."""

from __future__ import annotations

import statistics
from typing import Any

from bench.load.results import interval

__all__ = ["figures", "markdown"]

Run = dict[str, Any]

_AGAINST = (
    ("transformers", "transformers, batched generate", "tiny Llama, fp32, one sequence", "tiny-1", 1.5),
    ("transformers", "transformers, batched generate", "tiny Llama, fp32, 16 sequences", "tiny-16", 1.2),
    ("transformers", "transformers, batched generate", "tiny Llama, fp32, 64 sequences", "tiny-64", 1.3),
    ("transformers", "transformers, static batches of 16", "tiny Llama, 64 queued, 8 to 128 tokens each", "uneven", 2.0),
    ("transformers", "transformers, continuous batching", "tiny Llama, 64 sequences", "continuous-64", 4.0),
    ("transformers", "transformers, batched generate", "0.6B, bf16, one sequence", "big-1", 1.1),
    ("transformers", "transformers, batched generate", "0.6B, bf16, 8 sequences", "big-8", 1.2),
    ("transformers", "transformers, batched generate", "0.6B, bf16, 32 sequences", "big-32", 1.25),
    ("vllm", "vLLM for CPUs", "0.6B, bf16, one sequence", "big-1", None),
    ("vllm", "vLLM for CPUs", "0.6B, bf16, 8 sequences", "big-8", None),
    ("vllm", "vLLM for CPUs", "0.6B, bf16, 32 sequences", "big-32", None),
)
_NOT_MEASURED = (
    ("the memory bandwidth's limit", "decode on a GPU, with and without graphs"),
    ("transformers, batched generate", "decode on a GPU"),
)


def figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each figure: against whom, on what, the aim, what was measured, and whether the aim is reached."""
    runs: list[Run] = result["runs"]
    missing: dict[str, str] = result["missing"]
    lines: list[dict[str, Any]] = []

    def line(against: str, what: str, aim: str, measured: str, reached: bool | None, detail: str = "") -> None:
        lines.append({"against": against, "what": what, "aim": aim, "measured": measured, "reached": reached, "detail": detail})

    def ratios(against: str, what: str, aim: float | None, values: list[float], detail: str) -> None:
        low, high, _ = interval(values)
        middle = statistics.median(values)
        aim_text = "-" if aim is None else f"at least {aim:g}x"
        line(
            against, what, aim_text, f"{middle:.2f}x ({low:.2f} to {high:.2f})", None if aim is None else middle >= aim, detail
        )

    for peer, against, what, workload, aim in _AGAINST:
        ours, theirs = _by_round(runs, "ours", workload), _by_round(runs, peer, workload)
        if common := sorted(ours.keys() & theirs.keys()):
            detail = f"{_rate(ours)} against {_rate(theirs)} tokens/s; {_sameness(ours, theirs)}"
            ratios(against, what, aim, [theirs[each]["seconds"] / ours[each]["seconds"] for each in common], detail)
        elif aim is None or workload in missing or peer in missing:
            line(against, what, "-" if aim is None else f"at least {aim:g}x", "not run", None, missing.get(peer, ""))
    if cold := result.get("cold"):
        values = [theirs / ours for ours, theirs in zip(cold["ours_s"], cold["peer_s"], strict=True)]
        detail = f"{statistics.median(cold['ours_s']):.3f} s against {statistics.median(cold['peer_s']):.2f} s"
        ratios("fresh process, from_pretrained", "0.6B, 1.2 GB resident, request to first token", 10.0, values, detail)
    if disk := result.get("from_disk"):
        after = statistics.median(first - load for first, load in zip(disk["first_token_s"], disk["load_s"], strict=True))
        detail = f"{statistics.median(disk['first_token_s']):.2f} s in all; {statistics.median(disk['warm_s']):.2f} s warm"
        what = "0.6B, 1.2 GB on disk, prompt of 256 tokens: its first token after the last byte"
        line("itself, warm", what, "-", f"{after:.2f} s", None, detail)
    if prefix := result.get("prefix"):
        values = [without / with_ for with_, without in zip(prefix["with_s"], prefix["without_s"], strict=True)]
        detail = f"{statistics.median(prefix['with_s']) * 1e3:.0f} ms against {statistics.median(prefix['without_s']):.2f} s"
        ratios("itself without prefix cache", "0.6B, prefix of 1,024 tokens, to the first token", 20.0, values, detail)
    if schedule := result.get("schedule"):
        middle = statistics.median(schedule["seconds"]) * 1e3
        what = f"scheduling {schedule['sequences']} sequences, a step"
        line("-", what, "at most 0.15 ms", f"{middle:.3f} ms", middle <= 0.15, "all of a step but the model and the sampler")
    for each in result.get("diverged", ()):
        if each["diverged"] is None:
            continue
        wanted = 0 if each["deterministic"] else None
        line(
            "itself, not stopped",
            f"stopped and resumed in another batch: {each['dtype']}, {each['how']}"
            + (", deterministic" if wanted == 0 else ""),
            "none diverges" if wanted == 0 else "-",
            f"{each['diverged']} of {each['requests']} diverge",
            each["diverged"] == 0 if wanted == 0 else None,
        )
    for against, what in _NOT_MEASURED:
        line(against, what, "-", "not run", None, "no GPU")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table of docs/engine.md."""
    built = f"torch {result['torch']}, transformers {result['transformers']}, commit {result['commit']}"
    parts = [
        f"{result['machine']}; {result['threads']} threads; {built}.",
        f"{result['rounds']} rounds, alternating; medians of paired ratios and their intervals; {result['seconds']:.0f} s.",
        f"transformers ran under OMP_WAIT_POLICY={result['peer_policy']}, which is faster for it here.",
        "",
        "| against | workload | aim | measured | reached | |",
        "|---|---|---|---|---|---|",
    ]
    for each in figures(result):
        reached = {True: "yes", False: "**no**", None: "-"}[each["reached"]]
        parts.append(
            f"| {each['against']} | {each['what']} | {each['aim']} | {each['measured']} | {reached} | {each['detail']} |"
        )
    if cold := result.get("cold"):
        phases = {name: statistics.median(each[name] for each in cold["phases"]) * 1e3 for name in cold["phases"][0]}
        told = ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {value:.0f}" for name, value in phases.items())
        parts += ["", f"Where the milliseconds of a cold request go: {told}."]
    return "\n".join(parts)


def _by_round(runs: list[Run], subject: str, workload: str) -> dict[int, Run]:
    return {run["round"]: run for run in runs if (run["subject"], run["workload"]) == (subject, workload)}


def _rate(runs: dict[int, Run]) -> str:
    return f"{statistics.median(run['tokens'] / run['seconds'] for run in runs.values()):,.0f}"


def _sameness(ours: dict[int, Run], theirs: dict[int, Run]) -> str:
    return (
        "same tokens"
        if {run["digest"] for run in (*ours.values(), *theirs.values())} == {ours[min(ours)]["digest"]}
        else "other tokens"
    )
