"""What /metrics says after requests, and how other parts add to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from schema.admin import OutcomeView, RequestTimeline
from schema.states import EndReason
from sllmctl.control.effects import RemoveInstance, RowChange
from sllmctl.control.watched import WatchedDatabase
from sllmctl.gateway.metrics import Metrics
from tests.sllmctl.gateway.harness import chat_body, serving


async def test_requests_are_counted_once_and_tokens_each() -> None:
    async with serving() as here:
        here.router.reply = lambda request: request.say("four", EndReason.LENGTH)
        for stream in (False, True):
            await here.client.post("/v1/chat/completions", json=chat_body(stream=stream))
        await here.client.post("/v1/chat/completions", json={**chat_body(), "model": "made up"})
        response = await here.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples[("sllm_requests_total", ("model", "tiny"), ("status", "200"))] == 2
    assert samples[("sllm_requests_total", ("model", ""), ("status", "404"))] == 1
    assert samples[("sllm_generated_tokens_total", ("model", "tiny"))] == 8
    assert samples[("sllm_prompt_tokens_total", ("model", "tiny"))] == 2 * len(here.router.requests[0].sequence.prompt)
    assert samples[("sllm_request_errors_total", ("code", "model_not_found"))] == 1
    assert samples[("sllm_time_to_first_token_seconds_count", ("cold", "false"), ("model", "tiny"))] == 2
    assert samples[("sllm_request_queue_seconds_sum", ("cold", "false"), ("model", "tiny"))] == 0.002
    assert round(samples[("sllm_time_per_output_token_seconds_sum", ("model", "tiny"))], 6) == round(2 * 0.01 / 3, 6)
    assert samples[("sllm_live_requests",)] == samples[("sllm_live_streams",)] == 0


def test_other_parts_add_gauges_that_are_asked_at_each_scrape() -> None:
    metrics = Metrics()
    values = iter([3.0, 4.0])

    def collect() -> Iterable[Metric]:
        yield GaugeMetricFamily("sllm_nodes", "Nodes.", value=next(values))

    metrics.add(collect)
    assert b"sllm_nodes 3.0" in metrics.render()
    assert b"sllm_nodes 4.0" in metrics.render()


def test_what_did_not_happen_is_not_observed() -> None:
    metrics = Metrics()
    metrics.ended("m", RequestTimeline(cold=True), 0)
    metrics.ended("m", RequestTimeline(cold=True, routed_s=1.0, first_token_s=2.0, ended_s=2.5), 1)
    assert metrics.value("sllm_request_queue_seconds_count", {"model": "m", "cold": "true"}) == 1
    assert metrics.value("sllm_time_to_first_token_seconds_sum", {"model": "m", "cold": "true"}) == 2.0
    assert metrics.value("sllm_time_per_output_token_seconds_count", {"model": "m"}) == 0


class _Database:
    def __init__(self) -> None:
        self.rows: list[RowChange] = []

    async def commit(self, changes: Sequence[RowChange]) -> None:
        if any(change == RemoveInstance("") for change in changes):
            raise OSError("no disk")
        self.rows += changes


def _outcome(estimated_s: float, actual_s: float) -> OutcomeView:
    return OutcomeView(at=1.0, kind="start", model="m", node="n", source="disk", estimated_s=estimated_s, actual_s=actual_s)


async def test_estimates_are_counted_beside_their_outcomes_once_those_are_durable() -> None:
    metrics, database = Metrics(), _Database()
    watched = WatchedDatabase(database, metrics.estimated)
    rows: list[RowChange] = [_outcome(2.0, 2.5), RemoveInstance("i"), _outcome(4.0, 3.0), _outcome(0.0, 1.0)]
    await watched.commit(rows)
    assert database.rows == rows
    with pytest.raises(OSError, match="no disk"):
        await watched.commit([_outcome(2.0, 9.0), RemoveInstance("")])
    labels = {"kind": "start", "source": "disk"}
    assert metrics.value("sllm_estimate_error_seconds_count", labels) == 3
    assert metrics.value("sllm_estimate_error_seconds_sum", labels) == 2.5
    assert metrics.value("sllm_estimate_ratio_count", labels) == 2
    assert metrics.value("sllm_estimate_ratio_bucket", {**labels, "le": "0.8"}) == 1
    assert b"sllm_estimate_ratio" in metrics.render()
