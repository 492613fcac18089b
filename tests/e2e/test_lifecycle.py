"""Deploy, scale to zero and back, stop, delete, and the refusals, against a real manager and node."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.cluster import Cluster, gone, killed_at_exit
from tests.e2e.talk import LONG, Endless, ask, client, completion

pytestmark = pytest.mark.slow


def test_a_cold_request_starts_an_instance_and_a_warm_one_does_not(cluster: Cluster) -> None:
    cold = ask(cluster, "What is sllmctl?")
    assert cold.text
    timeline = cluster.get(f"/requests/{cold.request_id}")["timeline"]
    assert timeline["cold"]
    assert timeline["start"]["loaded_from"] == "disk"
    assert timeline["start"]["loaded_bytes"] > 0
    warm = ask(cluster, "What is sllmctl?")
    assert warm.text == cold.text
    assert not cluster.get(f"/requests/{warm.request_id}")["timeline"]["cold"]
    assert len(cluster.instances()) == 1


def test_an_idle_model_goes_to_zero_and_comes_back_without_reading_the_disk(cluster: Cluster) -> None:
    cluster.post("/models/docs/deploy", {"scale": {"min": 0, "max": 1, "keep_alive_s": 0.2}})
    first = ask(cluster, "What is a tier?")
    cluster.until(lambda: not cluster.instances(), "the instance has gone", 60)
    again = ask(cluster, "What is a tier?")
    assert again.text == first.text
    start = cluster.get(f"/requests/{again.request_id}")["timeline"]["start"]
    assert start["loaded_from"] == "dram"
    assert start["loaded_bytes"] == 0


def test_min_instances_are_kept_and_stopped_with_the_model(cluster: Cluster) -> None:
    cluster.post("/models/docs/deploy", {"scale": {"min": 1, "max": 1}})
    instance = cluster.ready_instance()
    cluster.post(f"/instances/{instance['id']}/stop")
    other = cluster.until(
        lambda: next((i for i in cluster.instances() if i["state"] == "ready" and i["id"] != instance["id"]), None),
        "another instance took its place",
        60,
    )
    assert other["pid"] != instance["pid"]
    cluster.post("/models/docs/stop")
    cluster.until(lambda: not cluster.instances(), "the instances have gone", 60)
    with pytest.raises(openai.NotFoundError):
        completion(cluster, "hello")


def test_a_model_whose_instances_are_full_scales_up_to_its_maximum(cluster: Cluster) -> None:
    cluster.post("/models/docs/deploy", {"scale": {"min": 0, "max": 2, "max_concurrency": 1}})
    with client(cluster) as api, Endless(api, max_tokens=LONG) as first, Endless(api, max_tokens=LONG) as second:
        assert first.token()
        assert second.token()
        assert len([i for i in cluster.instances() if i["state"] == "ready"]) == 2


def test_a_deleted_model_is_gone_with_its_checkpoint(cluster: Cluster) -> None:
    ask(cluster, "What is an epoch?")
    assert cluster.admin.delete("/models/docs").status_code < 300
    cluster.until(lambda: not cluster.get("/models")["items"], "the model has gone", 60)
    cluster.until(lambda: not cluster.get("/checkpoints")["items"], "its checkpoint has gone", 60)
    # It counts as gone from the moment on that nothing may begin to use it, before the last of its files is.
    cluster.until(
        lambda: not any((cluster.directory / "data" / "checkpoints").glob("*/*/manifest.json")), "so have its files", 60
    )
    with pytest.raises(openai.NotFoundError):
        completion(cluster, "hello")


def test_a_model_that_no_node_can_hold_is_refused_with_the_reason() -> None:
    with Cluster(arena_bytes=4 << 20) as small:
        small.add_model()
        with pytest.raises(openai.InternalServerError) as caught:
            completion(small, "hello")
        assert caught.value.status_code == 503
        assert "node" in caught.value.message


def test_a_directory_that_is_no_model_fails_with_its_name(standing: Cluster, tmp_path: Path) -> None:
    standing.post("/models", {"name": "broken", "source": {"kind": "path", "path": str(tmp_path)}})
    model = standing.until(
        lambda: m if (m := standing.get("/models/broken"))["state"] != "ingesting" else None, "the ingest has ended", 60
    )
    assert model["state"] == "failed"
    assert str(tmp_path) in model["fault"]["message"]
    assert not list((standing.directory / "data" / "tmp").glob("*"))


def test_a_second_manager_on_the_same_state_is_refused(standing: Cluster) -> None:
    with killed_at_exit(standing.spawn()) as second:
        assert second.wait(60) == 6
    assert ask(standing, "What is a plan?").text


def test_another_clusters_manager_is_refused_by_the_agent_and_disturbs_nothing(standing: Cluster) -> None:
    before = ask(standing, "What is a plan?")
    with killed_at_exit(standing.spawn("--state-dir", str(standing.directory / "other"), "--port", "0")) as second:
        assert second.wait(60) == 6
    assert "cluster" in standing.log().rpartition("error: ")[2].splitlines()[0]
    again = ask(standing, "What is a plan?")
    assert again.text == before.text
    assert not standing.get(f"/requests/{again.request_id}")["timeline"]["cold"]


def test_a_taken_port_is_refused(cluster: Cluster) -> None:
    cluster.stop()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with killed_at_exit(cluster.spawn("--port", port)) as second:
            assert second.wait(60) == 6
    assert port in cluster.log()


def test_nothing_is_left_after_a_stop(cluster: Cluster) -> None:
    cluster.post("/models/docs/deploy", {"scale": {"min": 1, "max": 1}})
    ask(cluster, "What is sllmctl?")
    pids = cluster.processes()
    assert len(pids) >= 5, "manager, agent, store, zygote and a worker"
    assert cluster.stop() == 0
    assert cluster.processes() == []
    assert all(gone(pid) for pid in pids)
    parting = cluster.log().partition("stopping: ")[2]
    assert "Stopped" in parting
    assert not any(reason in parting for reason in ("Scheduled", "Crashed", "BackOff")), parting
    assert _troubles(cluster) == []
    left = {path.name for path in (cluster.directory / "run").glob("*")}
    assert not left & {"agent.sock", "agent.token", "roster.json"}
    assert not any(name.startswith(("sllm", "sl")) for name in os.listdir("/dev/shm"))  # noqa: PTH208


def test_a_stop_that_does_not_wait_is_no_trouble_either(cluster: Cluster) -> None:
    assert cluster.manager is not None
    with client(cluster) as api, Endless(api, max_tokens=LONG) as running:
        assert running.token()
        cluster.manager.send_signal(signal.SIGTERM)
        cluster.until(lambda: "stopping: " in cluster.log(), "it has heard the first signal", 60)
        assert cluster.stop() == 0
    (said,) = _troubles(cluster)
    assert "asked again" in said
    assert "Traceback" not in (cluster.directory / "manager.log").read_text()


def _troubles(cluster: Cluster) -> list[str]:
    """What the manager has logged that an operator must look at."""
    lines = (cluster.directory / "manager.log").read_text().splitlines()
    return [line for line in lines if re.match(r"\S+ (WARNING|ERROR|CRITICAL) manager ", line)]


def test_a_stopped_manager_starts_again_with_its_models(cluster: Cluster) -> None:
    before = ask(cluster, "What is a journal?")
    generation = cluster.get("/status")["generation"]
    cluster.stop()
    cluster.start()
    after = ask(cluster, "What is a journal?")
    assert after.text == before.text
    assert cluster.get("/status")["generation"] == generation + 1


def test_specs_are_applied_and_another_engine_makes_other_instances(cluster: Cluster, talker: Path) -> None:
    def applied(**engine: object) -> tuple[str, list[str]]:
        spec = {"name": "filed", "source": {"kind": "path", "path": str(talker)}, "scale": {"min": 1}, "engine": engine}
        (told,) = cluster.post("/apply", {"models": [spec]})["items"]
        return told["action"], [change["key"] for change in told["changes"]]

    def ready() -> dict[str, Any] | None:
        return next((one for one in cluster.instances("filed") if one["state"] == "ready"), None)

    assert applied()[0] == "created"
    first = cluster.until(ready, "it is served once it has been ingested", 60)
    assert applied() == ("unchanged", [])
    assert applied(max_context_tokens=256) == ("configured", ["engine.max_context_tokens"])
    cluster.until(lambda: (one := ready()) and one["id"] != first["id"], "another instance took its place", 60)
    assert cluster.get("/models/filed")["spec"]["engine"]["max_context_tokens"] == 256
