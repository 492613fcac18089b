"""Other loaders of safetensors files, those that happen to be installed here: what `sllmctl bench load` sets a load against.

Each loads in the measuring process, which has imported it before, into memory of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Peer", "installed"]


@dataclass(frozen=True, slots=True)
class Peer:
    """``load`` returns the tensors of these files once all of their bytes are in memory."""

    name: str
    load: Callable[[Sequence[Path]], dict[str, Tensor]]


def installed() -> list[Peer]:
    """The peers of this environment, imported. safetensors always is among them: the node's part needs it."""
    found: list[Peer] = []
    for module, make in (
        ("safetensors.torch", _safetensors),
        ("runai_model_streamer", _run_ai),
        ("fastsafetensors", _fast_safetensors),
    ):
        with contextlib.suppress(Exception):  # whatever keeps a library from being imported, it is not here to be measured
            found += make(importlib.import_module(module))
    return found


def _safetensors(library: Any) -> list[Peer]:
    def load(files: Sequence[Path]) -> dict[str, Tensor]:
        return {name: tensor for file in files for name, tensor in library.load_file(file).items()}

    def touched(files: Sequence[Path]) -> dict[str, Tensor]:
        tensors = load(files)
        for tensor in tensors.values():
            if tensor.nbytes:
                tensor.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].max()
        return tensors

    def cloned(files: Sequence[Path]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in load(files).items()}

    return [Peer("safetensors, mapped and touched", touched), Peer("safetensors, mapped and cloned", cloned)]


def _run_ai(library: Any) -> list[Peer]:
    def load(files: Sequence[Path]) -> dict[str, Tensor]:
        with library.SafetensorsStreamer() as streamer:
            streamer.stream_files([str(file) for file in files])
            return dict(streamer.get_tensors())

    return [Peer("Run:ai model streamer", load)]


def _fast_safetensors(library: Any) -> list[Peer]:
    def load(files: Sequence[Path]) -> dict[str, Tensor]:
        with library.fastsafe_open([str(file) for file in files], nogds=True, device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in list(opened.keys())}

    return [Peer("fastsafetensors", load)]
