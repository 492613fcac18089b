"""What the engines of all instances have done, by model, from the counts that come along with their loads.

An engine counts from its start, and instances come and go; so it is what was added between two words of the same life that
is summed up here. A life that an earlier manager knew is counted from its first word to this one on, which its node repeats
as soon as it is linked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from schema.link import STEP_BOUNDS_S, EngineCounts, StepCounts

__all__ = ["EngineTotals"]

_SLOTS = len(STEP_BOUNDS_S) + 1


@dataclass(slots=True)
class _Steps:
    by_duration: list[int] = field(default_factory=lambda: [0] * _SLOTS)
    total_s: float = 0.0

    def add(self, now: StepCounts, before: StepCounts) -> None:
        for slot, count in enumerate(now.by_duration[:_SLOTS]):
            self.by_duration[slot] += max(0, count - (before.by_duration[slot] if slot < len(before.by_duration) else 0))
        self.total_s += max(0.0, now.total_s - before.total_s)


_COUNTERS = (
    ("decode_tokens", "sllm_engine_decode_tokens", "Tokens that engines computed one at a time, after a prompt."),
    ("prefill_tokens", "sllm_engine_prefill_tokens", "Tokens that engines computed of prompts, repeated ones too."),
    ("prompt_tokens", "sllm_engine_prompt_tokens", "Tokens of the sequences that engines began, or began again."),
    ("cached_tokens", "sllm_engine_cached_tokens", "Those of them that were found in the prefix cache."),
    (
        "sequences",
        "sllm_engine_step_sequences",
        "Sequences computed, summed over steps: by the count of steps, the batch size.",
    ),
    ("preemptions", "sllm_engine_preemptions", "Sequences that gave back their KV cache for want of room, and waited again."),
)


class EngineTotals:
    """Sums by model; those of a model that is gone are left out, and forgotten."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, str], _Steps] = {}
        self._counters: dict[str, dict[str, int]] = {}

    def add(self, model: str, now: EngineCounts, before: EngineCounts) -> None:
        """Take in what the engine of an instance says, with what it had said ``before`` in the same life."""
        for kind in ("decode", "prefill"):
            self._steps.setdefault((model, kind), _Steps()).add(getattr(now, kind), getattr(before, kind))
        counters = self._counters.setdefault(model, {})
        for name, *_ in _COUNTERS:
            counters[name] = counters.get(name, 0) + max(0, getattr(now, name) - getattr(before, name))

    def families(self, models: Collection[str]) -> Iterable[Metric]:
        for gone in self._counters.keys() - set(models):
            del self._counters[gone]
            for kind in ("decode", "prefill"):
                self._steps.pop((gone, kind), None)
        steps = HistogramMetricFamily(
            "sllm_engine_step_seconds",
            "How long an engine's steps took: decode (one token of each sequence), or prefill (with a prompt among them).",
            labels=("model", "kind"),
        )
        bounds = [*(str(bound) for bound in STEP_BOUNDS_S), "+Inf"]
        for labels, each in self._steps.items():
            steps.add_metric(labels, list(zip(bounds, accumulate(each.by_duration), strict=True)), each.total_s)
        yield steps
        for name, title, text in _COUNTERS:
            family = CounterMetricFamily(title, text, labels=("model",))
            for model, counters in self._counters.items():
                family.add_metric((model,), counters[name])
            yield family
