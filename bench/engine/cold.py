"""A cold request against a fresh process: the model's weights lie in DRAM, nothing of it runs.

Ours: a request to a model scaled to zero, from sending it over HTTP to the first token in the stream. The peer: a
fresh Python that imports transformers, calls from_pretrained on the same directory, whose files are in the page cache, and
generates one token from the same number of prompt tokens. They take turns.

From the disk there is no peer: a request whose weights are neither in DRAM nor in the page cache, in a cluster of its own, and
how long after the last byte its first token comes, against a request as long that finds the instance warm.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from agent.native.cold import forget
from tests.cluster import Cluster

__all__ = ["from_disk", "measure"]

_PROMPT_TOKENS = 16
_LONG_TOKENS = 256
_MODEL = "big"

_PEER = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
ids = torch.arange(100, 100 + int(sys.argv[2]))[None]
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
"""


def measure(model: Path, rounds: int) -> dict[str, Any]:
    """Seconds of both in each round, and where ours went."""
    result: dict[str, Any] = {"ours_s": [], "peer_s": [], "phases": []}
    with Cluster(arena_bytes=3 << 30) as cluster, httpx.Client(base_url=cluster.url, timeout=120) as api:
        cluster.add_model(_MODEL, model, scale={"min": 0, "max": 1, "keep_alive_s": 0.0})
        _request(api)  # brings the weights from disk to DRAM; not counted
        _peer(model)
        for number in range(rounds):
            for who in ("ours", "peer") if number % 2 else ("peer", "ours"):
                cluster.until(lambda: not cluster.instances(_MODEL), "the instance has gone", 60)
                if who == "peer":
                    result["peer_s"].append(_peer(model))
                else:
                    taken_s, phases = _ours(cluster, api)
                    result["ours_s"].append(taken_s)
                    result["phases"].append(phases)
            print(f"  cold: {result['ours_s'][-1]:.3f} s, fresh process {result['peer_s'][-1]:.2f} s", flush=True)
    return result


def from_disk(model: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round: to the first token from the disk, until all weights were there, and to the first token warm."""
    result: dict[str, list[float]] = {"first_token_s": [], "load_s": [], "warm_s": []}
    with Cluster(arena_bytes=3 << 30) as cluster, httpx.Client(base_url=cluster.url, timeout=120) as api:
        cluster.add_model(_MODEL, model, scale={"min": 0, "max": 1, "keep_alive_s": 1.0})
        digest = cluster.get(f"/models/{_MODEL}")["digest"]
        _request(api)  # compares the checksums of the first load; not counted
        for number in range(rounds):
            cluster.until(lambda: not cluster.instances(_MODEL), "the instance has gone", 60)
            operation = cluster.post(f"/checkpoints/{digest}/drop", {"tier": "dram"})["items"][0]["id"]
            cluster.until(lambda operation=operation: _ended(cluster, operation), "its weights have left DRAM", 30)
            for file in (cluster.directory / "data" / "checkpoints" / digest).glob("*/partition_*.bin"):
                forget(file)
            first_token_s, request_id = _request(api, _LONG_TOKENS, 2 * number)
            timeline = cluster.until(lambda request_id=request_id: _timeline(cluster, request_id), "the request has ended", 30)
            assert timeline["start"]["loaded_bytes"] > 0, "the weights were on the disk alone"
            warm_s, _ = _request(api, _LONG_TOKENS, 2 * number + 1)
            for name, value in (("first_token_s", first_token_s), ("load_s", timeline["start"]["load_s"]), ("warm_s", warm_s)):
                result[name].append(value)
            print(f"  from disk: {first_token_s:.3f} s, load {result['load_s'][-1]:.3f} s, warm {warm_s:.3f} s", flush=True)
    return result


def _ended(cluster: Cluster, operation: str) -> bool:
    view = cluster.get(f"/operations/{operation}")
    assert view["fault"] is None, view
    return view["ended_at"] is not None


def _peer(model: Path) -> float:
    """Seconds from starting the process to its end, which follows its first token."""
    began = time.monotonic()
    args = [sys.executable, "-c", _PEER, str(model), str(_PROMPT_TOKENS)]
    subprocess.run(args, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def _request(api: httpx.Client, tokens: int = _PROMPT_TOKENS, which: int = 0) -> tuple[float, str]:
    """Ask for one token; seconds until it came in the stream, and the request's id. ``which``: of prompts that differ."""
    prompt = [100 + which, *range(200, 199 + tokens)]
    body = {"model": _MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True}
    began = time.monotonic()
    with api.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        next(line for line in answer.iter_lines() if line.startswith("data:"))
        return time.monotonic() - began, answer.headers["x-request-id"]


def _ours(cluster: Cluster, api: httpx.Client) -> tuple[float, dict[str, float]]:
    taken_s, request_id = _request(api)
    timeline = cluster.until(lambda: _timeline(cluster, request_id), "the request has ended", 30)
    assert timeline["cold"]
    assert timeline["start"]["loaded_bytes"] == 0, "the weights were in DRAM"
    phases = {name: value for name, value in timeline["start"].items() if name.endswith("_s")}
    phases |= {"engine_first_token_s": timeline["engine"]["first_token_s"], "routed_s": timeline["routed_s"]}
    return taken_s, phases


def _timeline(cluster: Cluster, request_id: str) -> dict[str, Any] | None:
    timeline: dict[str, Any] = cluster.get(f"/requests/{request_id}")["timeline"]
    return timeline if timeline["engine"] is not None else None
