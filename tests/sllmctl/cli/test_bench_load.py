"""`sllmctl bench load` measures in a process of the node's side, and says what bounds a start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.make_checkpoint import make_checkpoint
from tests.agent.store.images import CHUNK, commit
from tests.sllmctl.cli.conftest import Sllmctl


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A small one among the node's own."""
    monkeypatch.setenv("SLLM_NODE_DATA_DIR", str(tmp_path / "node"))
    digest, directory, _ = commit(tmp_path / "node" / "checkpoints", 0xABCDEF, 3 * CHUNK, partitions=2)
    return digest, directory


@pytest.mark.slow
def test_a_table_and_a_verdict(sllmctl: Sllmctl, checkpoint: tuple[str, Path]) -> None:
    said = sllmctl("bench", "load", "--rounds", "2")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[0].split() == ["STEP", "TIME", "RATE", "OF", "DISK", "CPU", "S/GB"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "disk, raw reads", "disk -> memory", "disk -> memory, checksums", "page cache -> memory", "memory -> tensors",
        "tensors, first pass",
    ]  # fmt: skip
    assert f"checkpoint {checkpoint[0][:12]}" in said.err
    assert "medians of 2" in said.err


@pytest.mark.slow
def test_the_report_as_json_by_digest_and_by_directory(sllmctl: Sllmctl, checkpoint: tuple[str, Path]) -> None:
    digest, directory = checkpoint
    for which in ((digest[:60],), ("--dir", str(directory))):
        said = sllmctl("bench", "load", *which, "--rounds", "1", "-o", "json")
        assert said.code == 0, said.err
        report = json.loads(said.out)
        assert (report["digest"], report["image_bytes"], report["rounds"]) == (digest, 6 * CHUNK, 1)
        assert all(row["seconds"] > 0 and row["low"] <= row["seconds"] <= row["high"] for row in report["rows"])
        assert report["bound"] == "size"
        assert "12.0 MiB are too small to judge" in report["verdict"]
        assert [row["of_limit"] for row in report["rows"]] == [None] * len(report["rows"]), "a share of the disk says nothing"


@pytest.mark.slow
def test_a_hugging_face_directory_beside_other_loaders(sllmctl: Sllmctl, tmp_path: Path) -> None:
    make_checkpoint("tiny-llama", tmp_path / "model")
    before = sorted((tmp_path / "model").iterdir())
    said = sllmctl("bench", "load", "--dir", str(tmp_path / "model"), "--rounds", "1", "-o", "json")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    rows = {row["step"]: row for row in report["rows"]}
    assert rows["safetensors, mapped and cloned"]["seconds"] > 0
    assert report["directory"] == str(tmp_path / "model")
    assert sorted((tmp_path / "model").iterdir()) == before


@pytest.mark.slow
def test_what_is_not_there_or_is_bad_ends_with_its_own_code(
    sllmctl: Sllmctl, checkpoint: tuple[str, Path], tmp_path: Path
) -> None:
    _, directory = checkpoint
    said = sllmctl("bench", "load", "123456", "--rounds", "1")
    assert (said.code, "there is no checkpoint 123456" in said.err) == (5, True)
    said = sllmctl("bench", "load", "--dir", str(tmp_path))
    assert (said.code, "is neither a checkpoint's directory nor a model's" in said.err) == (2, True)
    assert sllmctl("bench", "load", "123456", "--dir", str(tmp_path)).code == 2
    (directory / "partition_1.bin").write_bytes(bytes(3 * CHUNK))
    said = sllmctl("bench", "load", "--rounds", "1")
    assert (said.code, "not what was ingested" in said.err) == (1, True)
