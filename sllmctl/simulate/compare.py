"""Simulated figures beside published ones: the paper's tables, its ratios, and what is aimed at, as Markdown.

The published figures are quoted from Fu et al., ServerlessLLM, OSDI 2024, sections 7.3 and 7.4.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sllmctl.simulate.summary import Summary
from sllmctl.simulate.tables import seconds_text, share_text, to_markdown

__all__ = ["COUNT", "MANY", "PUBLISHED", "RATE", "RATES", "SCENARIOS", "Comparison", "Published"]

RATE = "workload.rate"
COUNT = "models[0].count"
RATES = (0.2, 0.8, 1.4)
SCENARIOS = tuple(f"opt-{size}-{lengths}" for size in ("6.7b", "13b", "30b") for lengths in ("gsm8k", "sharegpt"))
MANY = "many-models"
_OURS, _PAPER = "sllmctl", "paper"


class Published(msgspec.Struct, frozen=True):
    """Mean startup latencies in seconds."""

    ray_serve_s: float
    with_cache_s: float
    serverlessllm_s: float


PUBLISHED = {
    "opt-6.7b-gsm8k": Published(12.1, 8.2, 0.8),
    "opt-6.7b-sharegpt": Published(27.6, 17.9, 0.8),
    "opt-13b-gsm8k": Published(142.8, 140.1, 0.9),
    "opt-13b-sharegpt": Published(182.2, 162.4, 1.6),
    "opt-30b-gsm8k": Published(213.0, 199.2, 7.5),
    "opt-30b-sharegpt": Published(260.2, 261.8, 89.8),
}
_PUBLISHED_P99 = {"random": 1.95, "shepherd": 1.27}
"""How many times the paper's own P99 theirs is, at 1.4 requests per second on GSM8K."""
_AIMS = (("shepherd", 3.0), ("random", 5.0), ("shepherd-batched", 1.0), ("random-batched", 1.0))
"""How many times ours their P99 is to be, at 1.4 requests per second."""
_MANY_AIM = 2.0


class Comparison:
    """Summaries by scenario, policy and what was varied; a figure that was not simulated is told as ``-``."""

    def __init__(self, summaries: Iterable[Summary]) -> None:
        self._by_run = {(one.scenario, one.policy, one.settings.get(RATE), one.settings.get(COUNT)): one for one in summaries}
        known = dict.fromkeys(scenario for scenario, *_ in self._by_run)
        self.scenarios = [name for name in SCENARIOS if name in known]
        self.policies = list(dict.fromkeys(policy for _, policy, *_ in self._by_run))

    def of(self, scenario: str, policy: str, rate: float) -> Summary | None:
        return self._by_run.get((scenario, policy, rate, None))

    def markdown(self) -> str:
        """All tables, each with its heading."""
        parts = [
            ("Mean startup latency (s): published, the simulated paper policy, ours", self._means()),
            ("P99 of startup latency (s), and how many times the paper policy's", self._p99()),
            *((f"All policies, {name} at {max(RATES)} requests per second", self._all(name)) for name in self.scenarios),
            ("Mean and P99 of startup latency (s) by number of models", self._many()),
            ("Aims", self._aims()),
        ]
        return "\n".join(f"### {heading}\n\n{table}" for heading, table in parts if table)

    def _means(self) -> str:
        headers = ["workload", "Ray Serve", "with local cache", "ServerlessLLM"]
        headers += [f"{policy} at {rate}" for policy in (_PAPER, _OURS) for rate in RATES]
        rows = []
        for name in self.scenarios:
            told = PUBLISHED[name]
            row = [name, *(f"{value:g}" for value in (told.ray_serve_s, told.with_cache_s, told.serverlessllm_s))]
            rows.append(row + [_mean(self.of(name, policy, rate)) for policy in (_PAPER, _OURS) for rate in RATES])
        return to_markdown(headers, rows) if rows else ""

    def _p99(self) -> str:
        policies = [policy for policy in ("random", "shepherd", _PAPER, _OURS) if policy in self.policies]
        headers = ["workload", "rate", *policies, "random / paper", "published", "shepherd / paper", "published"]
        rows = []
        for name in self.scenarios:
            for rate in RATES:
                found = {policy: self.of(name, policy, rate) for policy in (*policies, "random", "shepherd", _PAPER)}
                row = [name, f"{rate}", *(_p99(found[policy]) for policy in policies)]
                for policy, ratio in _PUBLISHED_P99.items():
                    # Published for GSM8K at the highest rate alone.
                    told = f"{ratio}" if name.endswith("gsm8k") and rate == max(RATES) else ""
                    row += [_ratio(found[policy], found[_PAPER]), told]
                rows.append(row)
        return to_markdown(headers, rows) if rows else ""

    def _all(self, name: str) -> str:
        headers = [
            "policy",
            "mean",
            "P50",
            "P95",
            "P99",
            "TTFT mean",
            "TTFT P99",
            "within",
            "starts",
            "moved",
            "preempted",
            "held",
        ]
        rows = []
        for policy in self.policies:
            one = self.of(name, policy, max(RATES))
            if one is not None:
                times = (one.startup.mean_s, one.startup.p50_s, one.startup.p95_s, one.startup.p99_s)
                firsts = (one.first_token.mean_s, one.first_token.p99_s)
                counts = [str(count) for count in (one.starts, one.migrations, one.preemptions)]
                within = share_text(one.within, one.requests)
                rows.append([policy, *map(seconds_text, times + firsts), within, *counts, f"{one.device_held_h:.1f} h"])
        return to_markdown(headers, rows) if rows else ""

    def _many(self) -> str:
        counts = sorted({count for scenario, _, _, count in self._by_run if scenario == MANY and isinstance(count, int)})
        rows = []
        for policy in self.policies:
            found = [self._by_run.get((MANY, policy, None, count)) for count in counts]
            if any(found):
                rows.append([policy, *(text for one in found for text in (_mean(one), _p99(one)))])
        headers = ["policy", *(f"{what}, {count}" for count in counts for what in ("mean", "P99"))]
        return to_markdown(headers, rows) if rows else ""

    def _aims(self) -> str:
        """Ours against what is aimed at. The least favourable workload counts, and is named."""
        rate = max(RATES)
        rows: list[list[str]] = []
        for policy, aim in _AIMS:
            for lengths in ("gsm8k", "sharegpt"):
                ratios = [
                    (theirs.startup.p99_s / ours.startup.p99_s, name)
                    for name in self.scenarios
                    if name.endswith(lengths)
                    and (theirs := self.of(name, policy, rate)) is not None
                    and (ours := self.of(name, _OURS, rate)) is not None
                    and ours.startup.p99_s > 0
                ]
                if ratios:
                    told = ", ".join(f"{ratio:.2f} ({name})" for ratio, name in ratios)
                    aimed = f"at least {aim:g}" if aim > 1 else "above 1"
                    reached = min(ratios)[0] >= aim if aim > 1 else min(ratios)[0] > aim
                    rows.append([f"P99 of {policy} / ours, {lengths}, at {rate}", aimed, told, _yes(reached)])
        thirty = self.of("opt-30b-gsm8k", _OURS, rate)
        if thirty is not None:
            told = share_text(thirty.within, thirty.requests)
            rows.append(
                [f"30B GSM8K within {thirty.timeout_s:g} s, at {rate}", "all", told, _yes(thirty.within == thirty.requests)]
            )
        few, many = (self._by_run.get((MANY, _OURS, None, count)) for count in (64, 256))
        if few is not None and many is not None and few.startup.mean_s > 0:
            ratio = many.startup.mean_s / few.startup.mean_s
            rows.append(["mean with 256 models / with 64", f"at most {_MANY_AIM:g}", f"{ratio:.2f}", _yes(ratio <= _MANY_AIM)])
        return to_markdown(["aim", "aimed at", "simulated", "reached"], rows) if rows else ""


def _mean(summary: Summary | None) -> str:
    return "-" if summary is None else seconds_text(summary.startup.mean_s)


def _p99(summary: Summary | None) -> str:
    return "-" if summary is None else seconds_text(summary.startup.p99_s)


def _ratio(one: Summary | None, other: Summary | None) -> str:
    if one is None or other is None or other.startup.p99_s <= 0:
        return "-"
    return f"{one.startup.p99_s / other.startup.p99_s:.2f}"


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"
