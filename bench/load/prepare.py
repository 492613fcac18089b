"""What a run needs and keeps between runs in its working directory: checkpoints in every format, the peers, the C reader.

Everything is made once: what is there is left alone. Weights come from a seeded generator (bench/make_checkpoint.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agent.store import catalog
from agent.store.ingest.convert import IN_PLACE, LAYOUT, convert
from bench import make_checkpoint
from schema.checkpoint import FORMAT_VERSION

__all__ = ["HERE", "PEERS", "Checkpoint", "Prepared", "data_sum", "prepare"]

HERE = Path(__file__).resolve().parent
PEERS = (
    "run_ai", "safetensors_mmap", "safetensors_pread", "safetensors_prefetch", "fast_safetensors", "instant_tensor",
    "tensorizer_file", "torch_load", "mmap_clone", "torch_dcp",
)  # fmt: skip
CONVERTED = ("tensorizer_file", "torch_load", "torch_dcp")
PRERELEASE = {"safetensors_pread": "safetensors==0.9.0rc1", "safetensors_prefetch": "safetensors==0.9.0rc1"}

_SHAPE: dict[str, Any] = {"model_type": "llama", "vocab_size": 1024, "max_position_embeddings": 2048}
_SHAPE |= {"tie_word_embeddings": False, "dtype": "bfloat16"}
# The same bytes within half a percent: 22 layers of 9 tensors, and 2,110.
SPECS = {
    "tensors-200": {
        **_SHAPE, "hidden_size": 1280, "intermediate_size": 4800, "num_hidden_layers": 22,
        "num_attention_heads": 10, "num_key_value_heads": 10,
    },
    "tensors-19000": {
        **_SHAPE, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2110,
        "num_attention_heads": 1, "num_key_value_heads": 1,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory and its ingested layout, whose copy is marked as verified: a load after the first."""

    source: Path
    layout: Path

    @property
    def shards(self) -> list[Path]:
        return sorted(self.source.glob("*.safetensors"))

    @property
    def partitions(self) -> list[Path]:
        partitions = catalog.read_entry(self.layout).manifest.partitions
        return [catalog.partition_path(self.layout, partition) for partition in partitions]


@dataclass(slots=True)
class Prepared:
    """Where all of it lies. ``files`` are a peer's, ``small`` those that warm it up, ``environment`` what it needs set."""

    work: Path
    python: Path | None
    raw: Path
    main: Checkpoint
    in_place: Checkpoint
    few: Checkpoint
    many: Checkpoint
    files: dict[str, list[Path]] = field(default_factory=dict)
    small: dict[str, list[Path]] = field(default_factory=dict)
    environment: dict[str, dict[str, str]] = field(default_factory=dict)


def prepare(work: Path, *, with_peers: bool) -> Prepared:
    """Make what is not there. The first time takes some minutes and 14 GB of disk, most of it for the peers' own formats."""
    work.mkdir(parents=True, exist_ok=True)
    make_checkpoint.ARCHITECTURES.update(SPECS)
    raw = work / "raw"
    subprocess.run(["gcc", "-O2", "-o", str(raw), str(HERE / "raw.c"), "-lpthread"], check=True)
    prepared = Prepared(
        work,
        _environment(work) if with_peers else None,
        raw,
        _checkpoint(work, "llama-1.1b", 500_000_000),
        _checkpoint(work, "llama-1.1b", 500_000_000, in_place=True),
        _checkpoint(work, "tensors-200", 1 << 62),
        _checkpoint(work, "tensors-19000", 1 << 62),
    )
    small = work / "small"
    if not small.exists():
        make_checkpoint.make_checkpoint("tiny-qwen2", small)
    if with_peers:
        for peer in PEERS:
            _peer_files(prepared, peer, sorted(small.glob("*.safetensors")))
    os.sync()  # nothing is to be written back while something is timed
    return prepared


def data_sum(shards: list[Path]) -> int:
    """The sum of all 8-byte words of the tensors in safetensors files: what every load must show to have read it all."""
    total = 0
    for shard in shards:
        data = np.memmap(shard, np.uint8, "r")
        header = int.from_bytes(data[:8].tobytes(), "little")
        total += int(data[8 + header :].view("<u8").sum())
    return total % 2**64


def _checkpoint(work: Path, architecture: str, shard_bytes: int, *, in_place: bool = False) -> Checkpoint:
    source, data = work / architecture, work / f"{architecture}-{'in-place' if in_place else 'data'}"
    if not (source / "README.md").exists():  # what is written last
        shutil.rmtree(source, ignore_errors=True)
        _say(f"writing {source}")
        make_checkpoint.make_checkpoint(architecture, source, shard_bytes=shard_bytes)
    entry = _ingested(data)
    if entry is None:
        _say(f"ingesting {source}")
        shutil.rmtree(data, ignore_errors=True)  # of an older format, perhaps
        for path in (data / "checkpoints", data / "tmp"):
            path.mkdir(parents=True)
        convert(source, data / "checkpoints", data / "tmp", lambda done, total: None, in_place=in_place)
        entry = _ingested(data)
        assert entry is not None
    catalog.mark_verified(entry.directory)
    return Checkpoint(source, entry.directory)


def _ingested(data: Path) -> catalog.CatalogEntry | None:
    """The one checkpoint there, if it lies as this build would write it."""
    entries = [entry for entry in catalog.scan(data / "checkpoints").values() if entry.directory.name in (LAYOUT, IN_PLACE)]
    return entries[0] if entries and entries[0].manifest.format_version == FORMAT_VERSION else None


def _environment(work: Path) -> Path:
    home = work / "peers"
    python = home / "bin" / "python"
    wanted = (HERE / "peers.txt").read_text()
    stamp = home / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        _say(f"installing the peers in {home}")
        venv.create(home, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / "peers.txt")], check=True)
        for requirement in set(PRERELEASE.values()):
            alone = ["--no-deps", "--target", str(home / requirement), requirement]
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *alone], check=True)
        stamp.write_text(wanted)
    return python


def _peer_files(prepared: Prepared, peer: str, small: list[Path]) -> None:
    if (requirement := PRERELEASE.get(peer)) is not None:
        prepared.environment[peer] = {"PYTHONPATH": str(prepared.work / "peers" / requirement)}
    if peer not in CONVERTED:
        prepared.files[peer], prepared.small[peer] = prepared.main.shards, small
        return
    for directory, sources, found in (
        (prepared.work / f"{peer}-small", small, prepared.small),
        (prepared.work / peer, prepared.main.shards, prepared.files),
    ):
        if not directory.exists():
            _say(f"writing {directory}")
            new = directory.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            command = [str(prepared.python), str(HERE / "worker.py"), peer, "convert", str(new), *map(str, sources)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            if "error" in (error := json.loads(answer.stdout)):
                raise SystemExit(f"{peer} cannot write its format: {error['error']}")
            new.rename(directory)
        found[peer] = sorted(path for path in directory.iterdir() if path.is_file())


def _say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)
