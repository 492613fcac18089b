"""kill -9 of a worker mid-stream: from the kill to the next token at the client, less the journal's prefill.

python -m bench.crash [--runs 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path

import httpx

from bench.report import Report
from tests.cluster import Cluster

KILL_AFTER = 20
"""Pieces of the stream before the kill."""


def crash_once(cluster: Cluster, api: httpx.Client) -> tuple[float, float]:
    """Seconds from the kill to the next token, and what the new attempt's prefill took of them."""
    (instance,) = cluster.instances()
    body = {"model": "docs", "prompt": "sllmctl is", "max_tokens": 400, "temperature": 0, "stream": True}
    gaps: list[float] = []
    last = 0.0
    with api.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        request_id = answer.headers["x-request-id"]
        pieces = 0
        for line in answer.iter_lines():
            if not line.startswith("data:") or line == "data: [DONE]":
                continue
            assert "error" not in json.loads(line[5:]), line
            now = time.monotonic()
            # Tokens already in the pipe when the worker died are not recovery: the pause is the longest gap after the kill.
            if pieces >= KILL_AFTER:
                gaps.append(now - last)
            last = now
            pieces += 1
            if pieces == KILL_AFTER:
                os.kill(instance["pid"], signal.SIGKILL)
    view = cluster.get(f"/requests/{request_id}")
    assert view["attempts"] == 2, view
    return max(gaps), view["timeline"]["engine"]["prefill_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = Report("kill -9 of a worker mid-stream, warm zygote, weights in DRAM")
    # Crashes in a row are restarted ever later; each run here is to be a first one.
    with Cluster(settings="[control]\nhealthy_s = 0\n") as cluster, httpx.Client(base_url=cluster.url, timeout=60) as api:
        cluster.add_model(scale={"min": 1, "max": 1})
        pauses, prefills = [], []
        for _ in range(args.runs):
            cluster.ready_instance()
            pause, prefill = crash_once(cluster, api)
            pauses.append(pause * 1e3)
            prefills.append(prefill * 1e3)
        report.row("crash to next token at the client", pauses, "ms")
        report.row("prefill of the journal in the new worker", prefills, "ms")
        report.row("pause less prefill", [a - b for a, b in zip(pauses, prefills, strict=True)], "ms", "< 300")
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()
