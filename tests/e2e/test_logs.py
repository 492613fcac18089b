"""A request's story over the logs of all processes, and logs that outlive their writers, as an operator reads them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import httpx
import pytest

from tests.cluster import ROOT, Cluster
from tests.e2e.talk import ask

pytestmark = pytest.mark.slow

SECRET = "zanzibar"


def chat(cluster: Cluster, request_id: str, model: str = "docs") -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": f"{SECRET}?"}], "max_tokens": 8}
    headers = {"x-request-id": request_id}
    return httpx.post(f"{cluster.url}/v1/chat/completions", json=body, headers=headers, timeout=240)


def told(text: str, request_id: str) -> list[str]:
    """What lines say that have this id."""
    return [line["message"] for line in map(json.loads, text.splitlines()) if line.get("request") == request_id]


def logs(cluster: Cluster, path: str, **query: Any) -> list[dict[str, Any]]:
    answer = cluster.admin.get(f"/{path}/logs", params=query)
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


def test_one_id_tells_the_whole_story_and_no_log_has_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_LOG_FORMAT", "json")
    with Cluster() as cluster:
        cluster.add_model()
        answer = chat(cluster, "my-request.1")
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, "my-request.1")
        assert chat(cluster, "my-request.1").headers["x-request-id"] != "my-request.1"
        assert chat(cluster, "not one").headers["x-request-id"].startswith("req_")
        refused = chat(cluster, "my-request.2", "none")
        assert (refused.status_code, refused.headers["x-request-id"]) == (404, "my-request.2")

        said = cluster.directory / "manager.log"
        cluster.until(lambda: "ended" in told(said.read_text(), "my-request.1"), "the manager wrote its end", 60)
        manager = said.read_text()
        story = told(manager, "my-request.1")
        assert story == ["accepted", "queued", "loaded", "placed", "first token", "ended"]
        assert told(manager, "my-request.2") == ["answered with an error"]
        # Who has ended something tells of it before it writes it down.
        agent = cluster.directory / "data" / "log" / "agent.log"
        cluster.until(lambda: "ended by its worker" in told(agent.read_text(), "my-request.1"), "the agent wrote its end", 60)
        assert told(agent.read_text(), "my-request.1") == ["handed to its worker", "ended by its worker"]
        instance = cluster.ready_instance()["id"]

        def of_worker() -> str:
            return "\n".join(line["text"] for line in logs(cluster, f"instances/{instance}", tail=1000))

        cluster.until(lambda: "ended" in told(of_worker(), "my-request.1"), "the worker wrote its end", 60)
        worker = of_worker()
        assert told(worker, "my-request.1") == ["begun", "ended"]
        ended = [line for line in map(json.loads, worker.splitlines()) if line["message"] == "ended"]
        assert ended[0]["position"] == 8
        assert ended[0]["total_s"] >= ended[0]["first_token_s"] > 0
        written = manager + "".join(path.read_text() for path in (cluster.directory / "data" / "log").rglob("*.log"))
        assert SECRET not in written


def test_the_last_words_of_a_dead_worker_are_read_and_followed(cluster: Cluster) -> None:
    ask(cluster, "What is a node?")
    instance = cluster.ready_instance()
    args = [sys.executable, "-m", "sllmctl", "--config", str(cluster.config), "model", "logs", "docs", "-f", "--tail", "1"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True, cwd=ROOT) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline().startswith(f"[{instance['id']}] ")
        os.kill(instance["pid"], signal.SIGSEGV)
        seen = ""
        for line in follower.stdout:
            seen = line
            if "Segmentation fault" in line:
                break
        follower.send_signal(signal.SIGINT)
        follower.stdout.read()
        assert follower.wait(60) == 130
    assert "Segmentation fault" in seen
    cluster.post("/models/docs/stop")
    cluster.until(lambda: not cluster.instances(), "no instance is left", 60)
    last = [line["text"] for line in logs(cluster, f"instances/{instance['id']}", tail=1000)]
    assert any("Segmentation fault" in line for line in last)
    assert any(re.search(r"worker\.py", line) for line in last), "the stack of the crash"
    assert {line["source"] for line in logs(cluster, "models/docs")} >= {instance["id"]}
    assert any("the store runs" in line["text"] for line in logs(cluster, "nodes/local", tail=1000))
    assert logs(cluster, "nodes/local", process="store")[0]["source"] == "store"
    assert logs(cluster, "models/docs", since=0.001) == []
    assert cluster.admin.get("/models/none/logs").status_code == 404
