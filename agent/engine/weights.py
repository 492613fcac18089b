"""Weights into a skeleton by name: nothing is copied, nothing missing, nothing left over."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from agent.engine.dtypes import torch_dtype
from schema.checkpoint import Manifest
from schema.errors import InvalidCheckpoint

__all__ = ["attach", "computed_anyway", "fused_view"]

_ONCE_SAVED: Final = (r"rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$", r"\.masked_bias$", r"(?:^|\.)decoder\.version$")
"""Constants that older versions of transformers, and trainers built on them, saved: each layer's rotary frequencies and tables,
what a masked score was, and the version of the code that OPT comes from."""

_Place = tuple[nn.Module, str]


def fused_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """One tensor over several that lie behind one another in the image, as q, k, v and gate, up do: shape (sum of their
    first dimensions, ...). None where they do not lie so, or differ in type or in other dimensions.
    """
    first = tensors[0]
    if not first.dim() or any(t.dtype != first.dtype or t.shape[1:] != first.shape[1:] for t in tensors):
        return None
    if any(not t.is_contiguous() or t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for t in tensors):
        return None
    at = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != at:
            return None
        at += tensor.nbytes
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def computed_anyway(model: nn.Module) -> Callable[[str], bool]:
    """Whether a name that a checkpoint has, and the model's state has not, is of what the model computes by itself: a buffer
    that is not saved any more (causal masks, frequencies), or what transformers passes over in loading."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = model.state_dict()
    buffers = {name.removeprefix(prefix) for name, _ in model.named_buffers() if name not in known}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    pattern = re.compile("|".join(f"(?:{each})" for each in (*_ONCE_SAVED, *ignored)))
    return lambda name: name.removeprefix(prefix) in buffers or pattern.search(name) is not None


def attach(model: nn.Module, manifest: Manifest, tensors: Mapping[str, Tensor], device: str) -> None:
    """Make ``tensors`` the weights of a skeleton, and remake on ``device`` the buffers that no checkpoint holds.

    A tensor already on the device in the model's numeric type is used as it is. Raises InvalidCheckpoint naming tensors
    that the model lacks, that it does not know, or whose shape is another.
    """
    _remake_buffers(model, device)
    places = _places(model)
    rename = _renamer(model, places)
    dtype = torch_dtype(manifest.kv.dtype)
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) + tuple(
        getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    )
    attached: dict[str, Tensor] = {}
    unknown: list[str] = []
    is_computed = computed_anyway(model)
    for name, tensor in tensors.items():
        place_name = rename(name)
        if place_name not in places:
            if not is_computed(name):
                unknown.append(name)
            continue
        if tensor.is_floating_point() and tensor.dtype != dtype and not any(part in name for part in keep):
            tensor = tensor.to(dtype)
        attached[place_name] = _assign(places[place_name], name, tensor.to(device))
    for alias, source in manifest.ties.items():
        if (alias_name := rename(alias)) in places and rename(source) in attached:
            attached[alias_name] = _assign(places[alias_name], alias, attached[rename(source)])
    missing = [name for name in places if name not in attached]
    if missing:
        ties = _model_ties(model)
        for name in missing:
            if ties.get(name) in attached:
                attached[name] = _assign(places[name], name, attached[ties[name]])
        missing = [name for name in missing if name not in attached]
    if unknown or missing:
        lacking = f"lacks {_some(missing)}" if missing else ""
        extra = f"has {_some(unknown)}, which the model does not know" if unknown else ""
        raise InvalidCheckpoint(f"the checkpoint of {manifest.architecture} {' and '.join(filter(None, (lacking, extra)))}")
    _check_none_left(model, manifest)


def _places(model: nn.Module) -> dict[str, _Place]:
    """Where each name of the state dict lives: the module and its attribute."""
    places: dict[str, _Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dotted = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places[dotted + name] = (module, name)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                places[dotted + name] = (module, name)
    return places


def _renamer(model: nn.Module, places: Mapping[str, _Place]) -> Any:
    """A checkpoint saved from the bare base model lacks its prefix, one saved from a larger model has it too much."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def rename(name: str) -> str:
        if name in places:
            return name
        if prefix + name in places:
            return prefix + name
        shorter = name.removeprefix(prefix)
        return shorter if shorter in places else name

    return rename


def _assign(place: _Place, name: str, tensor: Tensor) -> Tensor:
    module, leaf = place
    parameter = module._parameters.get(leaf)
    present = module._buffers[leaf] if parameter is None else parameter
    if present is None or present.shape != tensor.shape:
        shape = None if present is None else tuple(present.shape)
        raise InvalidCheckpoint(f"tensor {name!r} has shape {tuple(tensor.shape)}, the model wants {shape}")
    if parameter is None:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        return module._parameters[leaf]  # type: ignore[return-value]
    return tensor


def _model_ties(model: nn.Module) -> dict[str, str]:
    """Names that the model itself ties to others, when its config says so."""
    ties = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(ties, dict):
        tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
        ties = getattr(model, "_tied_weights_keys", None) if tied else None
    return dict(ties) if isinstance(ties, dict) else {}


def _remake_buffers(model: nn.Module, device: str) -> None:
    """Rotary frequencies and their like are computed, not stored: transformers' own initialisation fills them again.

    It runs while all weights are still on the meta device, so that it can write to nothing else.
    """
    initialise: Any = getattr(model, "_init_weights", None)
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if not names:
            continue
        for name in names:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.full_like(buffer, torch.nan if buffer.is_floating_point() else 0, device=device)
        if initialise is not None:
            with torch.no_grad():
                initialise(module)


def _check_none_left(model: nn.Module, manifest: Manifest) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise InvalidCheckpoint(f"{manifest.architecture} has a tensor {name!r} that nothing fills")
        if name.rpartition(".")[2] in ("inv_freq", "original_inv_freq") and not bool(tensor.isfinite().all()):
            raise InvalidCheckpoint(f"{manifest.architecture} has a computed buffer {name!r} that its class does not fill")


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"tensor {shown}" if len(names) <= 3 else f"tensors {shown} and {len(names) - 3} more"
