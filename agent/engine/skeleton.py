"""A checkpoint's model without weights: transformers' own class on the meta device, and what cannot be run exactly refused."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import initialization, modeling_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from agent.engine.architectures import unfit
from agent.engine.attention_modules import MASKED, REPLACED, replace_attention
from agent.engine.dtypes import torch_dtype
from agent.engine.transformers_runner import IMPLEMENTATION, register
from schema.checkpoint import Manifest
from schema.errors import InvalidCheckpoint

__all__ = ["build_skeleton"]

_MOST_BYTES: Final = 1 << 29
"""What building may take; skeletons of today's largest models take some ten MiB."""

_turn: Final = threading.Lock()

_homes: tuple[Any, ...] = (initialization, modeling_utils)
_no_init_weights: Any = next(home.no_init_weights for home in _homes if hasattr(home, "no_init_weights"))


def build_skeleton(manifest: Manifest) -> nn.Module:
    """The model of ``manifest.config`` in eval mode, every tensor on the meta device. Takes tens of milliseconds; one at a
    time, since the limit on memory and torch's default type that it sets are the process's.

    Raises InvalidCheckpoint, naming the architecture and the reason, for a model that this engine cannot run exactly. Code that
    a checkpoint brings along is never run: where its config names some (``auto_map``), the class that transformers itself has
    of that architecture computes, as it does for a transformers user who trusts no code.
    """
    with _turn, _bounded_memory():
        return _build(manifest)


def _build(manifest: Manifest) -> nn.Module:
    config, model_class = _classes(manifest)
    reason = unfit(config, model_class)
    if reason is not None:
        raise InvalidCheckpoint(f"{manifest.architecture} cannot be run exactly by this engine: {reason}")
    register()
    config._attn_implementation = "eager" if config.model_type in REPLACED else IMPLEMENTATION
    try:
        with _default_dtype(torch_dtype(manifest.kv.dtype)), torch.device("meta"), _no_init_weights():
            model: nn.Module = model_class(config)
    except Exception as error:  # hostile values fail in as many ways as there are models
        raise InvalidCheckpoint(f"{manifest.architecture} cannot be built from its config: {_said(error)}") from error
    replace_attention(model, manifest.max_context_tokens)
    if config.model_type not in MASKED:
        config._attn_implementation = IMPLEMENTATION
    return model.eval().requires_grad_(False)


def _classes(manifest: Manifest) -> tuple[Any, Any]:
    model_type = manifest.config.get("model_type")
    own = "; the model's own code (auto_map) is never run" if "auto_map" in manifest.config else ""
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InvalidCheckpoint(f"model type {model_type!r} is not one that transformers knows{own}")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(manifest.config)
    except Exception as error:  # hostile values fail in as many ways as there are configs
        raise InvalidCheckpoint(f"the config of this {model_type} model is not valid: {_said(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InvalidCheckpoint(f"model type {model_type!r} is no causal language model")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if isinstance(model_class, tuple) or model_class.__name__ != manifest.architecture:
        raise InvalidCheckpoint(
            f"architecture {manifest.architecture!r} is not the causal language model of {model_type!r}{own}"
        )
    return config, model_class


def _said(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it asks for a model whose description takes over {_MOST_BYTES >> 20} MiB of memory"
    return str(error)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Private memory may grow by `_MOST_BYTES` in here: a hostile config's counts of labels or experts are lists in memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    most = [limit for limit in (now + _MOST_BYTES, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
