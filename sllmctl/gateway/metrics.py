"""The manager's Prometheus metrics: what the gateway measures itself, and a place where other parts add theirs.

Counters and histograms are touched once per request; only the count of generated tokens is, once per batch that is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from schema.admin import OutcomeView, RequestTimeline
from schema.link import StartPhases
from schema.states import Tier
from schema.version import VERSION

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# A second series of every counter, of which Prometheus makes nothing in this format.
disable_created_metrics()  # type: ignore[no-untyped-call]
_WAITS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_STARTS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_COMMITS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_PHASES = ("load", "fork", "build", "attach", "warm")
_ERRORS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96)
_RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)


class _Callback(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        """Empty, so that registering does not call back into a part that is not up yet."""
        return []


class Metrics:
    """One registry of its own, so that several managers may live in one process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "sllm_requests",
            "Requests by model and HTTP status (499: the client went away).",
            ("model", "status"),
            registry=registry,
        )
        self.errors = Counter("sllm_request_errors", "Failed requests by error code.", ("code",), registry=registry)
        self.prompt_tokens = Counter("sllm_prompt_tokens", "Prompt tokens taken in.", ("model",), registry=registry)
        self.generated_tokens = Counter("sllm_generated_tokens", "Tokens delivered to clients.", ("model",), registry=registry)
        self.queued = Histogram(
            "sllm_request_queue_seconds",
            "From a request's arrival until an instance was found, by whether it waited for a start.",
            ("model", "cold"),
            buckets=_WAITS_S,
            registry=registry,
        )
        self.first_token = Histogram(
            "sllm_time_to_first_token_seconds",
            "From a request's arrival to its first token, by whether it waited for a start.",
            ("model", "cold"),
            buckets=_WAITS_S,
            registry=registry,
        )
        self.token_time = Histogram(
            "sllm_time_per_output_token_seconds",
            "Mean time per token after the first.",
            ("model",),
            buckets=_TOKEN_S,
            registry=registry,
        )
        self.longest_gap = Histogram(
            "sllm_longest_token_gap_seconds",
            "The longest that a streamed response stood still between two of its pieces, a move to another instance included.",
            ("model",),
            buckets=_WAITS_S,
            registry=registry,
        )
        self.streams = Gauge("sllm_live_streams", "Responses being streamed now.", registry=registry)
        self.live = Gauge("sllm_live_requests", "Requests being served now.", registry=registry)
        self.dropped = Counter(
            "sllm_connections_dropped", "Connections that the gateway broke off, by reason.", ("reason",), registry=registry
        )

        self.starts = Histogram(
            "sllm_start_seconds",
            "From an instance's start to ready, by model and the tier that its weights came from.",
            ("model", "source"),
            buckets=_STARTS_S,
            registry=registry,
        )
        self.phases = Histogram(
            "sllm_start_phase_seconds",
            "What the phases of a start took; they overlap: load (weights), fork, build (skeleton), attach, warm.",
            ("phase",),
            buckets=_STARTS_S,
            registry=registry,
        )
        self.loads = Histogram(
            "sllm_load_seconds",
            "What bringing an instance's weights to their tier took, by the tiers that they came from and went to.",
            ("source", "target"),
            buckets=_STARTS_S,
            registry=registry,
        )
        self.loaded = Counter(
            "sllm_loaded_bytes", "What those loads read of the disk.", ("source", "target"), registry=registry
        )
        self.faults = Counter(
            "sllm_instance_faults", "Lives of instances that ended with a fault, by its code.", ("code",), registry=registry
        )
        self.commits = Histogram(
            "sllm_commit_seconds",
            "What a commit to the manager's database took, until it was durable.",
            buckets=_COMMITS_S,
            registry=registry,
        )
        self.rows = Counter("sllm_committed_rows", "Rows of those commits.", registry=registry)
        self.estimate_error = Histogram(
            "sllm_estimate_error_seconds",
            "By how much an estimate of the planner missed, whichever way; by kind (start, prefill) and source of the weights.",
            ("kind", "source"),
            buckets=_ERRORS_S,
            registry=registry,
        )
        self.estimate_ratio = Histogram(
            "sllm_estimate_ratio",
            "What was, over what the planner had estimated: above 1 it took longer; by kind and source of the weights.",
            ("kind", "source"),
            buckets=_RATIOS,
            registry=registry,
        )
        build = Gauge("sllm_build_info", "Always 1; the manager's version is its label.", ("version",), registry=registry)
        build.labels(VERSION).set(1)
        ProcessCollector(registry=registry)
        self._by_model: tuple[tuple[Counter | Histogram, tuple[str, ...]], ...] = (
            (self.requests, ("model", "status")),
            (self.prompt_tokens, ("model",)),
            (self.generated_tokens, ("model",)),
            (self.queued, ("model", "cold")),
            (self.first_token, ("model", "cold")),
            (self.token_time, ("model",)),
            (self.longest_gap, ("model",)),
            (self.starts, ("model", "source")),
        )
        self._generated: dict[str, Counter] = {}

    def add(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Have ``collect`` called at every scrape, on the event loop; it returns metric families made on the spot."""
        self._registry.register(_Callback(collect))

    def forget_models(self, known: Collection[str]) -> None:
        """Leave out the series of all models but these; of requests for none ("") they stay."""
        self._generated = {model: counter for model, counter in self._generated.items() if model in known}
        for metric, names in self._by_model:
            series = {tuple(sample.labels[name] for name in names) for each in metric.collect() for sample in each.samples}
            for labels in series:
                if labels[0] and labels[0] not in known:
                    metric.remove(*labels)

    def generated(self, model: str) -> Counter:
        """The counter of a model's tokens, found without looking at labels."""
        if (counter := self._generated.get(model)) is None:
            counter = self._generated[model] = self.generated_tokens.labels(model)
        return counter

    def committed(self, took_s: float, rows: int) -> None:
        """Take in what a commit took."""
        self.commits.observe(took_s)
        self.rows.inc(rows)

    def started(self, model: str, target: Tier, phases: StartPhases) -> None:
        """Take in where the time of a start went."""
        source = phases.loaded_from.value if phases.loaded_from is not None else target.value
        self.starts.labels(model, source).observe(phases.total_s)
        for phase in _PHASES:
            self.phases.labels(phase).observe(getattr(phases, f"{phase}_s"))
        self.loads.labels(source, target.value).observe(phases.load_s)
        self.loaded.labels(source, target.value).inc(phases.loaded_bytes)

    def faulted(self, code: str) -> None:
        """Take in how a life of an instance ended."""
        self.faults.labels(code).inc()

    def ended(self, model: str, timeline: RequestTimeline, tokens: int) -> None:
        """Take in where the time of a request went that generated ``tokens``."""
        cold = "true" if timeline.cold else "false"
        if timeline.routed_s is not None:
            self.queued.labels(model, cold).observe(timeline.routed_s)
        if timeline.first_token_s is None:
            return
        self.first_token.labels(model, cold).observe(timeline.first_token_s)
        if timeline.ended_s is not None and tokens > 1:
            self.token_time.labels(model).observe((timeline.ended_s - timeline.first_token_s) / (tokens - 1))

    def estimated(self, outcome: OutcomeView) -> None:
        """Take in how good an estimate was."""
        labels = (outcome.kind, outcome.source)
        self.estimate_error.labels(*labels).observe(abs(outcome.actual_s - outcome.estimated_s))
        if outcome.estimated_s > 0:
            self.estimate_ratio.labels(*labels).observe(outcome.actual_s / outcome.estimated_s)

    def value(self, name: str, labels: dict[str, str] | None = None) -> float:
        """One sample by its name; 0 for one that was never touched."""
        return self._registry.get_sample_value(name, labels or {}) or 0.0

    def families(self) -> Iterable[Metric]:
        """All metrics as they are now."""
        return self._registry.collect()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
