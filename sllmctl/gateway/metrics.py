"""The manager's Prometheus metrics: what the gateway measures itself, and a place where other parts add theirs.

Counters and histograms are touched once per request; only the count of generated tokens is, once per batch that is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from schema.admin import OutcomeView, RequestTimeline

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_WAITS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
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
        self.streams = Gauge("sllm_live_streams", "Responses being streamed now.", registry=registry)
        self.live = Gauge("sllm_live_requests", "Requests being served now.", registry=registry)
        self.dropped = Counter(
            "sllm_connections_dropped", "Connections that the gateway broke off, by reason.", ("reason",), registry=registry
        )

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

    def add(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Have ``collect`` called at every scrape, on the event loop; it returns metric families made on the spot."""
        self._registry.register(_Callback(collect))

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

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
