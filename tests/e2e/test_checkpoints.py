"""Checkpoints from the command line against a real manager and node: prefetch, verify, pin, remove, over restarts of all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.cluster import ROOT, Cluster
from tests.e2e.talk import ask, completion

pytestmark = pytest.mark.slow


def run(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sllmctl", "--config", str(cluster.config), "checkpoint", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, cwd=ROOT)


def checkpoint(cluster: Cluster) -> dict[str, Any]:
    (found,) = cluster.get("/checkpoints")["items"]
    return dict(found)


def tiers(cluster: Cluster) -> dict[str, str]:
    return {one["tier"]: one["state"] for one in checkpoint(cluster)["placements"]}


def partition(cluster: Cluster) -> Path:
    (path,) = (cluster.directory / "data" / "checkpoints").glob("*/*/partition_0.bin")
    return path


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())


def kill(cluster: Cluster, role: str) -> None:
    pid = cluster.roster()[role]
    os.kill(pid, signal.SIGKILL)
    cluster.until(lambda: cluster.roster().get(role, pid) != pid, f"another {role} runs", 60)
    cluster.until(cluster.ready_status, "the manager is ready", 60)


def test_a_checkpoint_is_brought_verified_quarantined_healed_and_removed(cluster: Cluster) -> None:
    digest = checkpoint(cluster)["digest"]
    said = run(cluster, "prefetch", "docs", "-o", "json")
    assert said.returncode == 0, said.stderr
    (operation,) = json.loads(said.stdout)
    assert (operation["kind"], operation["node"], operation["tier"], operation["fault"]) == ("prefetch", "local", "dram", None)
    assert operation["read_bytes"] == checkpoint(cluster)["image_bytes"]
    assert tiers(cluster) == {"disk": "resident", "dram": "resident"}
    said = run(cluster, "prefetch", digest[:8], "-o", "json")
    assert json.loads(said.stdout)[0]["read_bytes"] == 0, "it was there"
    said = run(cluster, "verify", "docs")
    assert said.returncode == 0, said.stderr
    assert "done" in said.stdout

    flip(partition(cluster), 70_000)
    said = run(cluster, "verify", digest[:8])
    assert said.returncode == 1
    assert f"{partition(cluster)}: the" in said.stderr
    assert "bytes at offset 0 " in said.stderr
    assert tiers(cluster) == {"disk": "quarantined", "dram": "resident"}
    assert "local:disk(quarantined)" in run(cluster, "ls").stdout
    assert "are not what was ingested" in run(cluster, "show", "docs").stdout
    first = ask(cluster, "What is a tier?")
    assert cluster.get(f"/requests/{first.request_id}")["timeline"]["start"]["loaded_from"] == "dram"

    (instance,) = cluster.instances()
    said = run(cluster, "rm", "docs", "-y", "--tier", "dram")
    assert said.returncode == 6
    assert instance["id"] in said.stderr
    cluster.post("/models/docs/stop")
    cluster.until(lambda: not cluster.instances(), "the instance has gone", 60)
    assert run(cluster, "rm", "docs", "--tier", "dram").returncode == 2, "nobody was asked"
    said = run(cluster, "rm", "docs", "-y", "--tier", "dram")
    assert said.returncode == 0, said.stderr
    cluster.until(lambda: tiers(cluster) == {"disk": "quarantined"}, "only the bad copy is left", 60)
    cluster.post("/models/docs/deploy")
    with pytest.raises(openai.APIStatusError):
        completion(cluster, "hello")

    flip(partition(cluster), 70_000)
    said = run(cluster, "verify", "docs")
    assert said.returncode == 0, said.stderr
    assert tiers(cluster) == {"disk": "resident"}
    assert ask(cluster, "What is a tier?").text == first.text

    beside = partition(cluster).parent.with_name("broken")
    beside.mkdir()
    (beside / "manifest.json").write_text("{")
    said = run(cluster, "verify", "docs")
    assert said.returncode == 1
    assert f"1 of 2 copies: broken ({beside}/manifest.json: " in said.stderr
    assert "the copy is in quarantine" in said.stderr
    assert tiers(cluster) == {"disk": "resident", "dram": "resident"}
    assert "copy broken is in quarantine" in run(cluster, "show", "docs").stdout
    shutil.rmtree(beside)
    assert run(cluster, "verify", "docs").returncode == 0
    assert "in quarantine" not in run(cluster, "show", "docs").stdout

    cluster.admin.delete("/models/docs")
    cluster.until(lambda: not cluster.get("/checkpoints")["items"], "it has gone with its model", 60)
    said = run(cluster, "verify", digest[:8])
    assert said.returncode == 5


def test_pins_and_quarantine_outlast_every_process(cluster: Cluster) -> None:
    assert run(cluster, "prefetch", "docs").returncode == 0
    said = run(cluster, "pin", "docs")
    assert said.returncode == 0, said.stderr
    assert "local:disk" in said.stderr
    assert "local:dram" in said.stderr

    def kept() -> None:
        assert tiers(cluster) == {"disk": "resident", "dram": "resident"}
        assert {pin["tier"] for pin in checkpoint(cluster)["pins"]} == {"disk", "dram"}
        said = run(cluster, "rm", "docs", "-y", "--tier", "dram")
        assert said.returncode == 6
        assert "unpin" in said.stderr

    kept()
    for role in ("store", "agent"):
        kill(cluster, role)
        cluster.until(lambda: tiers(cluster).get("dram") == "resident", "the image is stated again", 60)
        kept()
    cluster.kill_manager()
    cluster.start()
    kept()
    assert run(cluster, "unpin", "docs", "--tier", "dram").returncode == 0
    flip(partition(cluster), 9)
    assert run(cluster, "verify", "docs").returncode == 1
    cluster.stop()
    cluster.start()
    cluster.until(lambda: tiers(cluster) == {"disk": "quarantined"}, "a new node states the quarantine", 60)
    (placement,) = checkpoint(cluster)["placements"]
    assert "bytes at offset 0 " in placement["reason"]
    assert {pin["tier"] for pin in checkpoint(cluster)["pins"]} == {"disk"}
