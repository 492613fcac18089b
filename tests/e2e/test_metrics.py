"""What a Prometheus server would read of a cluster that has served a request."""

from __future__ import annotations

import signal

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster import Cluster
from tests.e2e.talk import ask
from tests.sllmctl.gateway.metrics_table import written

pytestmark = pytest.mark.slow


Samples = dict[str, float]


def scrape(cluster: Cluster) -> Samples:
    """Every sample by its name and labels; each has its family's type and help, and none comes twice."""
    answer = httpx.get(f"{cluster.url}/metrics", timeout=60)
    assert answer.status_code == 200
    samples: Samples = {}
    table = written()
    for family in text_string_to_metric_families(answer.text):
        assert family.type != "unknown", family.name
        assert family.documentation, family.name
        title = family.name + ("_total" if family.type == "counter" else "")
        assert f"| `{title}` | {family.type} |" in table, family.name
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in samples
            samples[key] = sample.value
    return samples


def test_metrics_show_the_cluster_and_what_it_served(cluster: Cluster) -> None:
    ask(cluster, "What is sllmctl?")
    first = scrape(cluster)
    assert first['sllm_nodes{state="ready"}'] == 1
    assert first['sllm_instances{model="docs",state="ready"}'] == 1
    assert first['sllm_requests_total{model="docs",status="200"}'] == 1
    assert first['sllm_tier_bytes{node="local",tier="dram"}'] > 0
    assert first['sllm_tier_capacity_bytes{node="local",tier="disk"}'] > first['sllm_tier_bytes{node="local",tier="disk"}'] > 0
    assert first['sllm_time_to_first_token_seconds_count{cold="true",model="docs"}'] == 1
    assert first['sllm_planner_decisions_total{kind="start"}'] == 1
    assert first['sllm_start_phase_seconds_count{phase="load"}'] == 1
    assert sum(value for name, value in first.items() if name.startswith("sllm_start_seconds_count")) == 1
    assert first['sllm_link_up{node="local"}'] == first['sllm_link_connections_total{node="local"}'] == 1
    assert first["sllm_commit_seconds_count"] > 0
    assert first["process_start_time_seconds"] > 0
    steps = 'sllm_engine_step_seconds_count{kind="decode",model="docs"}'

    ask(cluster, "What is a node?")

    def counted() -> Samples | None:
        now = scrape(cluster)
        prompts = now.get('sllm_engine_prompt_tokens_total{model="docs"}') == now['sllm_prompt_tokens_total{model="docs"}']
        told = prompts and now.get(steps, 0) > 0 and now.get('sllm_link_round_trip_seconds{node="local"}', 0) > 0
        return now if told and now['sllm_kv_used_tokens{model="docs"}'] == 0 else None

    now = cluster.until(counted, "the engine's counts of both and a heartbeat have come", 60)
    assert now['sllm_requests_total{model="docs",status="200"}'] == 2
    assert now['sllm_engine_decode_tokens_total{model="docs"}'] >= now[steps]
    assert now['sllm_kv_capacity_tokens{model="docs"}'] > 0

    cluster.post("/models/docs/stop")
    cluster.until(lambda: not cluster.instances(), "no instance is left", 60)
    assert cluster.admin.delete("/models/docs").status_code == 204
    assert not [name for name in scrape(cluster) if 'model="docs"' in name]


SPY = """
import pathlib, signal, sys
from sllmctl.cli.main import main
def tell(*_):
    told = pathlib.Path(sys.argv[2] + ".modules")
    told.with_suffix(".part").write_text("\\n".join(sys.modules))
    told.with_suffix(".part").rename(told)
signal.signal(signal.SIGUSR1, tell)
sys.exit(main())
"""


def test_the_running_manager_has_neither_torch_nor_transformers() -> None:
    with Cluster(entry=("-c", SPY)) as cluster:
        cluster.add_model()
        ask(cluster, "What is sllmctl?")
        assert cluster.manager is not None
        cluster.manager.send_signal(signal.SIGUSR1)
        told = cluster.config.with_name("config.toml.modules")
        cluster.until(lambda: cluster.get("/status") and told.exists(), "the manager told its modules", 60)
        modules = {name.partition(".")[0] for name in told.read_text().splitlines()}
    assert "starlette" in modules
    assert not modules & {"torch", "transformers", "agent", "safetensors", "numpy"}
