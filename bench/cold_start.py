"""Cold start of a 1.2 GB model, weights in the DRAM tier, against a fresh process with transformers: ratios of medians.

Ours: a request to a model scaled to zero whose checkpoint lies in the arena, from sending the HTTP request to the first token
in the stream. The peer: a fresh Python that imports transformers, calls from_pretrained on the same directory (its files in
the page cache), and generates one token from the same number of prompt tokens. Runs alternate.

    python -m bench.cold_start [--model DIR] [--runs 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from bench.report import Report
from tests.cluster import ROOT, Cluster

PROMPT_TOKENS = 16

PEER = """
import sys, time
began = time.monotonic()
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
ids = torch.arange(100, 100 + int(sys.argv[2]))[None]
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
print(time.monotonic() - began)
"""


def peer(model: Path) -> float:
    """Seconds from starting the process to its first token."""
    began = time.monotonic()
    args = [sys.executable, "-c", PEER, str(model), str(PROMPT_TOKENS)]
    subprocess.run(args, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def request(api: httpx.Client, began: float) -> tuple[float, str]:
    """Ask for one token; seconds since ``began`` to the first token in the stream, and the request's id."""
    body = {
        "model": "big",
        "prompt": list(range(100, 100 + PROMPT_TOKENS)),
        "max_tokens": 1,
        "temperature": 0,
        "stream": True,
    }
    with api.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        next(line for line in answer.iter_lines() if line.startswith("data:"))
        return time.monotonic() - began, answer.headers["x-request-id"]


def ours(cluster: Cluster, api: httpx.Client) -> tuple[float, dict[str, float]]:
    """Seconds from sending the request to the first token, and where they went."""
    taken, request_id = request(api, time.monotonic())
    cluster.until(lambda: ended(cluster, request_id), "the request has ended", 30)
    timeline = cluster.get(f"/requests/{request_id}")["timeline"]
    assert timeline["cold"]
    assert timeline["start"]["loaded_bytes"] == 0, "the weights were in DRAM"
    phases = {name: value for name, value in timeline["start"].items() if name.endswith("_s")}
    phases["engine_first_token_s"] = timeline["engine"]["first_token_s"]
    phases["routed_s"] = timeline["routed_s"]
    return taken, phases


def ended(cluster: Cluster, request_id: str) -> bool:
    return cluster.get(f"/requests/{request_id}")["timeline"]["engine"] is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory; made (Qwen3-0.6B shape) when not given")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="sllm-bench") as scratch:
        model = args.model or Path(scratch) / "qwen3-0.6b"
        if not model.exists():
            subprocess.run([sys.executable, "-m", "bench.make_checkpoint", "qwen3-0.6b", str(model)], check=True, cwd=ROOT)
        report = Report("cold start, weights in DRAM, 16-token prompt, request to first token")
        with Cluster(arena_bytes=3 << 30) as cluster, httpx.Client(base_url=cluster.url, timeout=120) as api:
            cluster.add_model("big", model, scale={"min": 0, "max": 1, "keep_alive_s": 0.0})
            run(report, cluster, api, model, args.runs)
        if args.json:
            report.save(args.json)


def run(report: Report, cluster: Cluster, api: httpx.Client, model: Path, runs: int) -> None:
    def idle() -> bool:
        return not cluster.instances("big")

    request(api, time.monotonic())  # brings the weights from disk to DRAM; not counted
    peer(model)
    ours_s, peer_s, all_phases = [], [], []
    for _ in range(runs):
        cluster.until(idle, "the instance has gone", 60)
        taken, phases = ours(cluster, api)
        ours_s.append(taken)
        all_phases.append(phases)
        cluster.until(idle, "the instance has gone", 60)
        peer_s.append(peer(model))
    report.row("sllmctl, request to first token", ours_s, "s")
    report.row("fresh process, from_pretrained, one token", peer_s, "s")
    report.row("ratio, pair by pair", [b / a for a, b in zip(ours_s, peer_s, strict=True)], "x", ">= 5")
    for name in all_phases[0]:
        report.row(f"  phase {name}", [phases[name] for phases in all_phases], "s")


if __name__ == "__main__":
    main()
