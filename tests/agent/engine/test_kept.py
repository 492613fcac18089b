"""Skeletons kept on disk: what is read back runs as what was built, and nothing is read that others may have written."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from agent.engine import kept, skeleton
from agent.engine.build import assemble
from agent.engine.kept import SkeletonCache
from agent.engine.weights import attach
from schema.checkpoint import Manifest
from tests.agent.engine.models import kv_options, make_model, manifest_of, submit_of, tensors_of
from tests.agent.engine.test_engine import drive, reference
from tests.examples import sampled

PROMPT = [3, 7, 11, 7]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of the manifests of which a skeleton was built, and not read."""
    built: list[str] = []

    def build(manifest: Manifest, real: object = kept.build_skeleton) -> nn.Module:
        built.append(manifest.architecture)
        model: nn.Module = real(manifest)  # type: ignore[operator]
        return model

    monkeypatch.setattr(kept, "build_skeleton", build)
    return built


@pytest.mark.parametrize("name", sampled(["llama", "qwen3", "gpt2", "mistral-window", "qwen3_moe"], "llama", "gpt2"))
def test_a_skeleton_that_is_read_runs_as_one_that_is_built(name: str, tmp_path: Path, builds: list[str]) -> None:
    model = make_model(name)
    manifest = manifest_of(model)
    SkeletonCache(tmp_path / "kept").skeleton(manifest)
    skeleton = SkeletonCache(tmp_path / "kept").skeleton(manifest)
    assert len(builds) == 1
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    attach(skeleton, manifest, tensors_of(model), "cpu")
    outcome = drive(assemble(skeleton, manifest, kv_options(manifest, 64)), [submit_of(1, PROMPT, 12)])
    assert outcome.tokens[1] == reference(model, PROMPT, 12)


def test_what_cannot_be_trusted_or_read_is_built_anew(tmp_path: Path, builds: list[str]) -> None:
    manifest = manifest_of(make_model("llama"))
    cache = SkeletonCache(tmp_path / "kept")
    cache.skeleton(manifest)
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    cache.skeleton(manifest)
    assert len(builds) == 2
    path.chmod(0o620)
    cache.skeleton(manifest)
    assert len(builds) == 3
    assert path.stat().st_mode & 0o777 == 0o600
    path.parent.chmod(0o777)
    cache.skeleton(manifest)
    assert len(builds) == 4
    path.parent.chmod(0o700)
    cache.skeleton(manifest)
    assert len(builds) == 4


def test_what_a_writer_that_died_has_left_is_swept(tmp_path: Path) -> None:
    directory = tmp_path / "kept"
    directory.mkdir(mode=0o700)
    dead, alive = directory / "a.1.new", directory / "a.2.new"
    dead.write_bytes(b"half")
    alive.write_bytes(b"half")
    os.utime(dead, (0, 0))
    SkeletonCache(directory).skeleton(manifest_of(make_model("llama")))
    assert sorted(path.suffix for path in directory.iterdir()) == [".new", ".pickle"]
    assert alive.exists(), "another is just writing it"


def test_a_full_disk_keeps_nothing_and_harms_nothing(tmp_path: Path, builds: list[str]) -> None:
    manifest = manifest_of(make_model("llama"))
    (tmp_path / "kept").write_text("a file in the directory's place")
    cache = SkeletonCache(tmp_path / "kept")
    assert isinstance(cache.skeleton(manifest), nn.Module)
    assert next(cache.skeleton(manifest).parameters()).device == torch.device("meta")
    assert len(builds) == 2


def test_skeletons_built_on_two_threads_leave_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the second inside before the first is done, it would in the end put back what the first had set."""
    build, inside, first_done = skeleton._build, threading.Semaphore(0), threading.Event()

    def slow(manifest: Manifest) -> nn.Module:
        inside.release()
        if threading.current_thread() is threads[1]:
            first_done.wait(60)
        else:
            inside.acquire(timeout=0.2)  # its own
            inside.acquire(timeout=0.2)  # the other's, which does not come
        return build(manifest)

    def one() -> None:
        skeleton.build_skeleton(manifest)
        first_done.set()

    monkeypatch.setattr(skeleton, "_build", slow)
    before = resource.getrlimit(resource.RLIMIT_DATA), torch.get_default_dtype()
    manifest = manifest_of(make_model("llama", dtype=torch.bfloat16), "BF16")
    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (resource.getrlimit(resource.RLIMIT_DATA), torch.get_default_dtype()) == before
