"""A small real run and its simulation: a local node with several models and a DRAM budget too small for all of them.

What the simulator is told (speeds, bandwidths, times of a start) is measured on that node in a first phase; then the same
arrivals are played to both. Nothing is fitted to the second phase.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sllmctl.simulate.cluster import simulate
from sllmctl.simulate.policies import POLICIES
from sllmctl.simulate.record import Record
from sllmctl.simulate.scenario import Arrival, ModelGroup, NodeGroup, Scenario, Speed, Workload
from tests.checkpoints import make_llama_dir
from tests.cluster import Cluster

__all__ = ["KEEP_ALIVE_S", "MODELS", "Observed", "Reality", "arrivals"]

MODELS = 5
KEEP_ALIVE_S = 1.0
CONCURRENCY = 4
PROMPT_TOKENS = 48
OUTPUT_TOKENS = 48
DEVICE_BYTES = 2 << 30
ARENA_MODELS = 2.5
"""So many models fit the DRAM budget."""


@dataclass
class Observed:
    """What became of each arrival, in their order: seconds, whether it waited for a start, and from where that start loaded."""

    startup_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)
    cold: list[bool] = field(default_factory=list)
    loads: dict[str, int] = field(default_factory=dict)


def arrivals(count: int, rate: float, seed: int) -> list[Arrival]:
    """One call of each model, far apart, so that both begin with the same weights in DRAM; then bursty calls of models whose
    popularity falls with their rank, gaps being Gamma with a coefficient of variation of 1.5."""
    rng = random.Random(seed)
    shape = 1 / 1.5**2
    found = [Arrival(2.5 * rank, f"model-{rank:05d}", PROMPT_TOKENS, 4) for rank in range(MODELS)]
    at = 2.5 * MODELS
    for _ in range(count):
        at += rng.gammavariate(shape, 1 / (rate * shape))
        rank = rng.choices(range(MODELS), [1 / (place + 1) for place in range(MODELS)])[0]
        tokens = rng.randint(OUTPUT_TOKENS // 2, OUTPUT_TOKENS * 2)
        found.append(Arrival(at, f"model-{rank:05d}", PROMPT_TOKENS, tokens))
    return found


class Reality:
    """A cluster with its models ingested; `measure` first, then `play` and `simulate` the same arrivals."""

    def __init__(self, directory: Path) -> None:
        self._paths = [
            make_llama_dir(directory / f"model-{rank:05d}", hidden=640, layers=12, context=512, eos=False, seed=rank)
            for rank in range(MODELS)
        ]
        weights = (self._paths[0] / "model.safetensors").stat().st_size
        self.cluster = Cluster(arena_bytes=int(ARENA_MODELS * weights) >> 22 << 22, settings=f"device_bytes = {DEVICE_BYTES}\n")

    def __enter__(self) -> Reality:
        self.cluster.__enter__()
        for path in self._paths:
            scale = {"min": 0, "max": 1, "keep_alive_s": KEEP_ALIVE_S, "max_concurrency": CONCURRENCY}
            self.cluster.add_model(path.name, path, scale=scale, engine={"kv_bytes": 64 << 20})
        self._api = httpx.Client(base_url=self.cluster.url, timeout=120)
        return self

    def __exit__(self, *error: object) -> None:
        self._api.close()
        self.cluster.__exit__(*error)

    def _ask(self, model: str, prompt_tokens: int, output_tokens: int) -> str:
        body = {
            "model": model,
            "prompt": [10 + number % 200 for number in range(prompt_tokens)],
            "max_tokens": output_tokens,
            "temperature": 0,
        }
        answer = self._api.post("/v1/completions", json=body)
        answer.raise_for_status()
        return answer.headers["x-request-id"]

    def _timeline(self, request: str) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            timeline: dict[str, Any] = self.cluster.get(f"/requests/{request}")["timeline"]
            return timeline if timeline["engine"] is not None else None

        return self.cluster.until(ended, "the request has ended", 60)

    def _all_idle(self) -> None:
        self.cluster.until(lambda: not self.cluster.get("/instances")["items"], "all instances have gone", 60)

    def _stop_all(self) -> None:
        """Let no instance wait for the end of its keep-alive."""
        for instance in self.cluster.get("/instances")["items"]:
            self.cluster.admin.post(f"/instances/{instance['id']}/stop", json={})  # it may have gone by itself
        self._all_idle()

    # --- what the simulator is told

    def measure(self) -> Scenario:
        """Start every model twice around, one after the other (the arena holds less, so most come from disk), and decode alone,
        four sequences of one model at a time, and two models side by side."""
        starts: list[dict[str, Any]] = []
        for name in [f"model-{rank:05d}" for rank in range(MODELS)] * 2:
            starts.append(self._timeline(self._ask(name, PROMPT_TOKENS, 4)))
            self._stop_all()
        disk = [one["start"] for one in starts if one["start"]["loaded_bytes"]]
        bandwidth = statistics.median(one["loaded_bytes"] / one["load_s"] for one in disk)
        build = statistics.median(one["start"]["fork_s"] + one["start"]["build_s"] for one in starts)
        finish = statistics.median(one["start"]["attach_s"] + one["start"]["warm_s"] for one in starts)
        (alone, prefill), (together, _) = self._warm([MODELS - 1]), self._warm([MODELS - 1] * CONCURRENCY)
        each = max(0.0, (together - alone) / (CONCURRENCY - 1))
        beside, _ = self._warm([MODELS - 1, MODELS - 2])
        occupancy = min(1.0, max(0.5, beside / alone / 2))
        checkpoint = self.cluster.get("/checkpoints")["items"][0]
        node = self.cluster.get("/nodes")["items"][0]["inventory"]
        return Scenario(
            name="reality",
            nodes=(
                NodeGroup(
                    name="local", device_kind="cpu", device_bytes=node["devices"][0]["memory_bytes"],
                    device_bps=1e12, dram_bytes=node["arena"]["budget_bytes"], disk_bps=bandwidth, network_bps=1e9,
                ),
            ),
            models=(
                ModelGroup(
                    name="model", count=MODELS, weights_bytes=checkpoint["image_bytes"],
                    kv_token_bytes=checkpoint["kv_token_bytes"], max_context_tokens=512, build_s=build, finish_s=finish,
                    kv_bytes=64 << 20, max_concurrency=CONCURRENCY, max_instances=1, keep_alive_s=KEEP_ALIVE_S,
                    speed=Speed(
                        prefill_base_s=prefill, prefill_token_s=0.0, decode_step_s=max(alone - each, 1e-4),
                        decode_sequence_s=each, occupancy=occupancy,
                    ),
                ),
            ),
            workload=Workload(trace="played"),
            control={"prefetch_every_s": 0.0},
        )  # fmt: skip

    def _warm(self, ranks: Sequence[int]) -> tuple[float, float]:
        """Seconds of one decode step and of a prefill where so many sequences of these models run at once, on instances that
        have all their weights: a cold request's prefill may wait for them, which is the load's time."""
        for rank in set(ranks):
            self._ask(f"model-{rank:05d}", PROMPT_TOKENS, 1)
        steps: list[float] = []
        prefills: list[float] = []
        requests: list[str] = []

        def one(rank: int) -> None:
            requests.append(self._ask(f"model-{rank:05d}", PROMPT_TOKENS, 64))

        for _ in range(3):
            requests.clear()
            threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            engines = [self._timeline(request)["engine"] for request in requests]
            steps += [(engine["total_s"] - engine["first_token_s"]) / 63 for engine in engines]
            prefills += [engine["prefill_s"] for engine in engines]
        return statistics.median(steps), statistics.median(prefills)

    # --- the same arrivals, twice

    def play(self, calls: Sequence[Arrival]) -> Observed:
        """Send each request at its time, over a connection of its own."""
        requests: list[str] = [""] * len(calls)
        self._all_idle()
        began = time.monotonic()

        def send(place: int, call: Arrival) -> None:
            time.sleep(max(0.0, began + call.at - time.monotonic()))
            requests[place] = self._ask(call.model, call.prompt_tokens, call.output_tokens)

        threads = [threading.Thread(target=send, args=(place, call)) for place, call in enumerate(calls)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen = Observed()
        # Requests that waited for one start tell of the same phases.
        starts: dict[tuple[object, ...], str] = {}
        for request in requests:
            timeline = self._timeline(request)
            seen.startup_s.append(timeline["routed_s"])
            seen.first_token_s.append(timeline["first_token_s"])
            seen.ended_s.append(timeline["ended_s"])
            seen.cold.append(timeline["cold"])
            if timeline["start"] is not None:
                starts[tuple(timeline["start"].values())] = timeline["start"]["loaded_from"]
        seen.loads = dict(Counter(starts.values()))
        return seen

    @staticmethod
    def simulate(scenario: Scenario, calls: Sequence[Arrival]) -> Record:
        return simulate(scenario, POLICIES["sllmctl"], calls)
