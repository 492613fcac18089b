"""A checkpoint published, taken from the disk, fetched and served, by real processes and servers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import ROOT, Cluster
from tests.e2e.talk import ask
from tests.remotes import S3_ENVIRONMENT, s3_server, web_server

pytestmark = pytest.mark.slow


def sllmctl(cluster: Cluster, *arguments: str) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a command."""
    command = [sys.executable, "-m", "sllmctl", "--config", str(cluster.config), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout, done.stderr


def done(cluster: Cluster, *arguments: str) -> str:
    code, out, err = sllmctl(cluster, *arguments)
    assert code == 0, err + cluster.log()
    return out


def tiers(cluster: Cluster) -> set[str]:
    (checkpoint,) = cluster.get("/checkpoints")["items"]
    return {placement["tier"] for placement in checkpoint["placements"]}


def quiet(cluster: Cluster) -> None:
    """Wait until the model's instances have gone, so that its weights can go too."""
    cluster.post("/models/docs/deploy", {"scale": {"min": 0, "max": 1, "keep_alive_s": 0.1}})
    cluster.until(lambda: not cluster.instances(), "the instances have gone", 60)


def test_published_removed_fetched_served(cluster: Cluster, tmp_path: Path) -> None:
    before = ask(cluster, "What is a tier?").text
    quiet(cluster)
    share = tmp_path / "share"
    url = f"file://{share}"
    code, _, err = sllmctl(cluster, "checkpoint", "publish", "docs", url)
    assert code == 5, err
    assert "mount the share" in err
    share.mkdir()
    assert "done" in done(cluster, "checkpoint", "publish", "docs", url)
    assert url in done(cluster, "checkpoint", "show", "docs")
    done(cluster, "checkpoint", "rm", "docs", "-y")
    cluster.until(lambda: not tiers(cluster), "the copies have gone", 60)
    assert not list((cluster.directory / "data" / "checkpoints").iterdir())
    with web_server(share) as web:
        out = done(cluster, "checkpoint", "fetch", "docs", "--from", web.url)
        assert "done" in out
        assert web.sent_bytes > 1_000_000
    done(cluster, "checkpoint", "forget", "docs", web.url)
    assert tiers(cluster) == {"disk"}
    assert ask(cluster, "What is a tier?").text == before
    quiet(cluster)
    done(cluster, "checkpoint", "rm", "docs", "-y")
    planned = ask(cluster, "What is a tier?")  # a start fetches what lies on a remote alone
    assert planned.text == before
    start = cluster.get(f"/requests/{planned.request_id}")["timeline"]["start"]
    assert start["loaded_from"] == "remote"
    assert start["loaded_bytes"] > 1_000_000
    cluster.until(
        lambda: tiers(cluster) == {"disk", "dram"}, "its copy on the disk is whole too, maybe after its first words", 60
    )
    quiet(cluster)
    done(cluster, "checkpoint", "rm", "docs", "-y")
    done(cluster, "checkpoint", "fetch", "docs", "--from", url, "--tier", "dram")
    assert tiers(cluster) == {"disk", "dram"}
    again = ask(cluster, "What is a tier?")
    assert again.text == before
    start = cluster.get(f"/requests/{again.request_id}")["timeline"]["start"]
    assert (start["loaded_from"], start["loaded_bytes"]) == ("dram", 0)
    assert not list((cluster.directory / "data" / "partial").iterdir())
    code, _, err = sllmctl(cluster, "checkpoint", "fetch", "f" * 64, "--from", url)
    assert code == 5, err


def test_another_cluster_serves_what_one_has_published_to_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server(tmp_path / "log") as endpoint:
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="models")
        client.close()
        settings = f'[node.remote]\ns3_endpoint = "{endpoint}"\n[control]\nremote = "s3://models/here"\n'
        with Cluster(settings=settings) as one:
            one.add_model()
            (checkpoint,) = one.get("/checkpoints")["items"]
            done(one, "checkpoint", "publish", "docs")
            first = ask(one, "What is a tier?").text
            secrets = S3_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"], "Signature="
            written = [path for path in one.directory.rglob("*") if path.is_file() and path.stat().st_size < 10_000_000]
            for path in written:
                assert not [secret for secret in secrets if secret.encode() in path.read_bytes()], path
        with Cluster(settings=settings) as other:
            done(other, "checkpoint", "fetch", checkpoint["digest"], "--tier", "dram")
            other.add_model()  # the ingest finds it there
            (found,) = other.get("/checkpoints")["items"]
            assert found["digest"] == checkpoint["digest"]
            assert [each["url"] for each in found["publications"]] == ["s3://models/here"]
            assert ask(other, "What is a tier?").text == first
