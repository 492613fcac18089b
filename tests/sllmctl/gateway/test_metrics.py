"""What /metrics says after requests, and how other parts add to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from schema.admin import OutcomeView, RequestTimeline
from schema.link import STEP_BOUNDS_S, EngineCounts, StartPhases, StepCounts
from schema.states import EndReason, Tier
from sllmctl.cluster.changes import RemoveInstance, RowChange
from sllmctl.control.watched import WatchedDatabase
from sllmctl.gateway.engines import EngineTotals
from sllmctl.gateway.metrics import Metrics
from tests.sllmctl.gateway.harness import chat_body, serving
from tests.sllmctl.gateway.metrics_table import table, whole, written


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


async def test_a_commit_is_timed_once_durable_and_told_to_all() -> None:
    metrics, database = Metrics(), _Database()
    told: list[Sequence[RowChange]] = []
    watched = WatchedDatabase(database, metrics.estimated, told.append, told.append, timed=metrics.committed)
    rows: list[RowChange] = [RemoveInstance("i"), RemoveInstance("j")]
    await watched.commit(rows)
    with pytest.raises(OSError, match="no disk"):
        await watched.commit([RemoveInstance("")])
    assert told == [rows, rows]
    assert metrics.value("sllm_commit_seconds_count") == 1
    assert metrics.value("sllm_committed_rows_total") == 2


def _counts(decode: int, seconds: float, cached: int) -> EngineCounts:
    by_duration = (decode,) + (0,) * len(STEP_BOUNDS_S)
    return EngineCounts(decode=StepCounts(by_duration=by_duration, total_s=seconds), prompt_tokens=50, cached_tokens=cached)


def _samples(engines: EngineTotals, models: set[str]) -> dict[tuple[str, ...], float]:
    found = {}
    for family in engines.families(models):
        for sample in family.samples:
            found[sample.name, *(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


def test_engines_are_summed_by_model_over_what_each_adds() -> None:
    engines = EngineTotals()
    engines.add("m", _counts(3, 0.003, 16), EngineCounts())
    engines.add("m", _counts(5, 0.006, 16), _counts(3, 0.003, 16))
    engines.add("m", _counts(2, 0.001, 0), EngineCounts())
    engines.add("gone", _counts(9, 1.0, 0), EngineCounts())
    found = _samples(engines, {"m"})
    assert found["sllm_engine_step_seconds_count", "decode", "m"] == 7
    assert found["sllm_engine_step_seconds_bucket", "decode", "0.001", "m"] == 7
    assert found["sllm_engine_step_seconds_sum", "decode", "m"] == pytest.approx(0.007)
    assert found["sllm_engine_cached_tokens_total", "m"] == 16
    assert not [key for key in found if "gone" in key]


def test_the_series_of_a_model_go_with_it() -> None:
    metrics = Metrics()
    for model in ("a", "b", ""):
        metrics.requests.labels(model, "200").inc()
        metrics.ended(model, RequestTimeline(cold=False, routed_s=1.0), 0)
        metrics.generated(model).inc(2)
    metrics.started("a", Tier.DRAM, StartPhases(load_s=1.0, loaded_from=Tier.DISK, loaded_bytes=7, total_s=2.0))
    metrics.forget_models({"b"})
    assert b'model="a"' not in metrics.render()
    assert metrics.value("sllm_requests_total", {"model": "", "status": "200"}) == 1
    assert metrics.value("sllm_loaded_bytes_total", {"source": "disk", "target": "dram"}) == 7
    metrics.generated("a").inc(3)
    assert metrics.value("sllm_generated_tokens_total", {"model": "a"}) == 3
    assert metrics.value("sllm_generated_tokens_total", {"model": "b"}) == 2


def test_every_metric_is_documented_as_it_is() -> None:
    assert written() == table(), "write it anew with python -m tests.sllmctl.gateway.metrics_table"
    families = list(whole().families())
    assert len({family.name for family in families}) == len(families)
    units = ("seconds", "bytes", "tokens", "ratio", "info")
    assert [f.name for f in families if f.type == "histogram" and not f.name.endswith(units)] == []
