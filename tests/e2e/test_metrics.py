"""What a Prometheus server would read of a cluster that has served a request."""

from __future__ import annotations

import signal

import httpx
import pytest

from tests.cluster import Cluster
from tests.e2e.talk import ask

pytestmark = pytest.mark.slow


def test_metrics_show_the_cluster_and_what_it_served(cluster: Cluster) -> None:
    ask(cluster, "What is sllmctl?")
    answer = httpx.get(f"{cluster.url}/metrics")
    assert answer.status_code == 200
    samples = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line and not line.startswith("#"))
    assert samples['sllm_nodes{state="ready"}'] == "1.0"
    assert samples['sllm_instances{model="docs",state="ready"}'] == "1.0"
    assert samples['sllm_requests_total{model="docs",status="200"}'] == "1.0"
    assert float(samples['sllm_tier_bytes{node="local",tier="dram"}']) > 0
    assert float(samples['sllm_tier_bytes{node="local",tier="disk"}']) > 0
    assert float(samples['sllm_time_to_first_token_seconds_count{cold="true",model="docs"}']) == 1


SPY = """
import pathlib, signal, sys
from sllmctl.cli.main import main
signal.signal(signal.SIGUSR1, lambda *_: pathlib.Path(sys.argv[2] + ".modules").write_text("\\n".join(sys.modules)))
sys.exit(main())
"""


def test_the_running_manager_has_neither_torch_nor_transformers() -> None:
    with Cluster(entry=("-c", SPY)) as cluster:
        cluster.add_model()
        ask(cluster, "What is sllmctl?")
        assert cluster.manager is not None
        cluster.manager.send_signal(signal.SIGUSR1)
        told = cluster.config.with_name("config.toml.modules")
        cluster.until(lambda: cluster.get("/status") and told.exists(), "the manager told its modules", 10)
        modules = {name.partition(".")[0] for name in told.read_text().splitlines()}
    assert "starlette" in modules
    assert not modules & {"torch", "transformers", "agent", "safetensors", "numpy"}
