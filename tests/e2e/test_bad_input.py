"""Bad input and limits at the doors that users have: each ends with its status or exit code, a message, and nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.checkpoints import make_llama_dir
from tests.cluster import ROOT, Cluster
from tests.e2e.talk import LONG, Endless, ask, client, completion

pytestmark = pytest.mark.slow


def sllmctl(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sllmctl", "--config", str(cluster.config), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False, stdin=subprocess.DEVNULL)


def checkpoints(cluster: Cluster) -> set[str]:
    return {one["digest"] for one in cluster.get("/checkpoints")["items"]}


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system of a few megabytes at ``place``; only root may make one."""
    place.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def refused_ingest(cluster: Cluster, source: Path) -> str:
    """The fault of an ingest that must fail. It goes to the agent and back, so that what was said before it has been heard."""
    cluster.post("/models", {"name": "refused", "source": {"kind": "path", "path": str(source)}})

    def ended() -> dict[str, Any] | None:
        model: dict[str, Any] = cluster.get("/models/refused")
        return None if model["state"] == "ingesting" else model

    model = cluster.until(ended, "the ingest has ended", 60)
    assert model["state"] == "failed", model
    assert cluster.admin.delete("/models/refused").status_code == 204
    message: str = model["fault"]["message"]
    return message


def test_a_client_that_disconnects_costs_the_engine_two_steps_at_most(standing: Cluster, tmp_path: Path) -> None:
    with client(standing) as api:
        with Endless(api, max_tokens=LONG) as stream:
            assert stream.token()
            (instance,) = standing.instances()
            # While the worker is held no step is taken, however slow everything else is.
            os.kill(instance["pid"], signal.SIGSTOP)
            try:
                refused_ingest(standing, tmp_path)
                delivered = standing.get(f"/requests/{stream.request_id}")["generated_tokens"]
                stream.__exit__(None, None, None)
                standing.until(
                    lambda: standing.get(f"/requests/{stream.request_id}")["state"] == "cancelled", "the cancel is known", 60
                )
                refused_ingest(standing, tmp_path)
            finally:
                os.kill(instance["pid"], signal.SIGCONT)
        engine = standing.until(
            lambda: standing.get(f"/requests/{stream.request_id}")["timeline"]["engine"], "the engine has ended it", 60
        )
    assert 0 < delivered < LONG - 2
    assert delivered <= engine["steps"] <= delivered + 2


def test_more_than_the_queue_takes_is_refused_and_what_waits_is_served(cluster: Cluster) -> None:
    cluster.post("/models/docs/deploy", {"scale": {"min": 0, "max": 1, "max_concurrency": 1, "queue_limit": 1}})
    waited: list[str] = []
    with client(cluster) as api, Endless(api, max_tokens=LONG) as running:
        assert running.token()
        (instance,) = cluster.instances()
        os.kill(instance["pid"], signal.SIGSTOP)
        waiter = threading.Thread(target=lambda: waited.append(completion(cluster, "A tier is", max_tokens=4)))
        waiter.start()
        try:
            cluster.until(
                lambda: any(r["state"] == "waiting" for r in cluster.get("/requests")["items"]), "a request waits", 60
            )
            with pytest.raises(openai.RateLimitError) as caught:
                completion(cluster, "One more")
        finally:
            os.kill(instance["pid"], signal.SIGCONT)
    waiter.join(60)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.body["code"] == "overloaded"  # type: ignore[index]
    assert "'docs'" in caught.value.message
    assert waited
    assert waited[0]


def test_a_cold_start_that_takes_too_long_is_504_and_its_instance_serves_the_next(standing: Cluster) -> None:
    standing.add_model("hasty", make_llama_dir(standing.directory / "hasty"), cold_start_timeout_s=0.001)
    with client(standing) as api:
        with pytest.raises(openai.InternalServerError) as caught:
            api.completions.create(model="hasty", prompt="hi", max_tokens=1)
        assert caught.value.status_code == 504
        assert "cold_start_timeout_s" in caught.value.message
        standing.post("/models/hasty/deploy", {"scale": {"min": 1, "max": 1}})
        standing.ready_instance("hasty")

        def served() -> bool:
            # The router hears of a ready instance a commit later than it is shown, and this model's requests wait 1 ms.
            with contextlib.suppress(openai.InternalServerError):
                return api.completions.create(model="hasty", prompt="hi", max_tokens=1).usage.completion_tokens == 1  # type: ignore[union-attr]
            return False

        standing.until(served, "the instance serves", 60)


def _climbs_out(source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def _claims_gigabytes(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def _overlaps(source: Path) -> None:
    path = source / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    first, second = [name for name, tensor in header.items() if name != "__metadata__" and tensor["shape"] == [64]][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _is_cut_off(source: Path) -> None:
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(_climbs_out, "outside"), (_claims_gigabytes, "header"), (_overlaps, "overlap"), (_is_cut_off, "model.safetensors")],
)
def test_a_hostile_directory_is_refused_by_name_and_leaves_nothing(
    standing: Cluster, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    source = make_llama_dir(tmp_path / "model")
    damage(source)
    before = checkpoints(standing)
    done = sllmctl(standing, "model", "add", "bad", str(source), "--wait")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((standing.directory / "data" / "tmp").glob("*"))
    assert checkpoints(standing) == before
    assert ask(standing, "What is a tier?").text
    assert standing.admin.delete("/models/bad").status_code == 204


def test_a_template_that_loops_fails_its_own_requests_only(standing: Cluster, tmp_path: Path) -> None:
    source = make_llama_dir(tmp_path / "model")
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (source / "chat_template.jinja").write_text(loop)
    standing.add_model("loops", source)
    with client(standing) as api:
        with pytest.raises(openai.BadRequestError, match="template"):
            api.chat.completions.create(model="loops", messages=[{"role": "user", "content": "hi"}])
        assert ask(standing, "What is a tier?").text
        assert api.completions.create(model="loops", prompt="hi", max_tokens=1).choices


def test_a_full_disk_ends_an_ingest_by_name_and_what_is_there_is_served(tmp_path: Path) -> None:
    with Cluster() as cluster:
        cluster.add_model()
        with small_disk(cluster.directory / "data" / "tmp", "2m"):
            done = sllmctl(cluster, "model", "add", "large", str(make_llama_dir(tmp_path / "m", hidden=512)), "--wait")
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert "is full" in done.stderr or "space" in done.stderr
        assert ask(cluster, "What is a tier?").text


def test_a_full_disk_under_the_database_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    made = Cluster()
    with small_disk(made.directory / "state", "6m"), made as cluster:
        cluster.add_model()
        assert ask(cluster, "What is a tier?").text
        cluster.post("/models/docs/deploy")  # what was learnt from that request is written before this is answered
        filler = cluster.directory / "state" / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        answer = cluster.admin.post("/models", json={"name": "more", "source": {"kind": "path", "path": "/x" * 2000}})
        assert answer.status_code == 507
        assert "is full" in answer.json()["error"]["message"]
        assert cluster.manager is not None
        assert cluster.manager.wait(60) == 1
        filler.unlink()
        cluster.start()
        assert [model["name"] for model in cluster.get("/models")["items"]] == ["docs"]
        assert ask(cluster, "What is a tier?").text
        assert cluster.stop() == 0


def test_a_database_of_a_newer_version_is_refused_and_left_alone(cluster: Cluster) -> None:
    ask(cluster, "What is a tier?")
    assert cluster.stop() == 0
    path = cluster.directory / "state" / "state.db"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        (known,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    done = sllmctl(cluster, "serve")
    assert (done.returncode, done.stdout) == (6, "")
    assert "9999" in done.stderr
    assert known in done.stderr
    assert "Traceback" not in done.stderr
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (known,))
    cluster.start()
    assert ask(cluster, "What is a tier?").text


def test_garbage_on_the_agents_socket_disturbs_nobody(standing: Cluster) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    frames = (b"\xff" * 8, struct.pack(">I", 0), struct.pack("<I", 0xFFFFFFFF) + b"x", seed.to_bytes(4, "big") * 4096)
    with client(standing) as api, Endless(api) as stream:
        assert stream.token()
        for frame in frames:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(60)
                link.connect(str(standing.directory / "run" / "agent.sock"))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    link.sendall(frame)
                    link.shutdown(socket.SHUT_WR)
                    while link.recv(65536):
                        pass
        assert len(stream.rest()) > 200
    assert standing.get(f"/requests/{stream.request_id}")["attempts"] == 1
    (instance,) = standing.instances()
    assert instance["restarts"] == 0
