"""ServerlessLLM's deployment files as specs of ours; of what does not apply here, each key is told with why.

The format is that of its `sllm-cli deploy --config`: what a file leaves out, its defaults fill in, and so they do here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from schema.errors import InvalidInput

__all__ = ["Translated", "from_serverlessllm", "is_serverlessllm"]

_KEYS: Final = {
    "num_gpus": ("devices", 1),
    "auto_scaling_config.min_instances": ("scale.min", 0),
    "auto_scaling_config.max_instances": ("scale.max", 10),
    "auto_scaling_config.keep_alive": ("scale.keep_alive_s", 0),
    "backend_config.max_model_len": ("engine.max_context_tokens", None),
    "backend_config.context_length": ("engine.max_context_tokens", None),
}
"""What means the same here, and ServerlessLLM's default."""

_SOURCE: Final = "backend_config.pretrained_model_name_or_path"
_OWN_ENGINE: Final = "the engine is sllmctl's own"
_PLACES: Final = "the planner places instances by where the weights are; `sllmctl checkpoint pin` keeps weights on a node"
_REASONS: Final = {
    "backend": _OWN_ENGINE,
    "auto_scaling_config.target": "an instance takes scale.max_concurrency requests at once, and another starts when there is "
    "no room for more",
    "backend_config.device_map": "an instance takes as many devices as num_gpus says",
    "backend_config.tp_size": "an instance takes as many devices as num_gpus says",
    "backend_config.tensor_parallel_size": "an instance takes as many devices as num_gpus says",
    "backend_config.torch_dtype": "weights keep the type of their checkpoint",
    "backend_config.dtype": "weights keep the type of their checkpoint",
    "backend_config.hf_model_class": "the class comes from the checkpoint's config.json",
    "backend_config.enable_prefix_caching": "prefixes are always cached",
    "placement_config": _PLACES,
    "scheduler_config": "the planner learns what loads and migrations cost",
    "router_config": "the router decides when to migrate by what it costs",
    "enable_lora": "LoRA adapters are not served",
    "lora_adapters": "LoRA adapters are not served",
}


@dataclass(frozen=True, slots=True)
class Translated:
    """``spec`` is still to be checked. ``keys``: where in the file what a key of it says comes from."""

    spec: dict[str, Any]
    unused: list[tuple[str, str]] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)


def is_serverlessllm(value: dict[str, Any]) -> bool:
    """Whether this is one of its files: they name a ``model``, where ours have a name and a source."""
    return "model" in value and not {"name", "source"} & value.keys()


def from_serverlessllm(value: dict[str, Any]) -> Translated:
    """The spec that such a file means here. Raises InvalidInput naming its key."""
    if "ft_backend" in value:
        raise InvalidInput("ft_backend: this describes a fine-tuning job; sllmctl serves models, and trains none", "ft_backend")
    given = dict(_leaves(value))
    model = given.pop("model")
    if not isinstance(model, str) or not model:
        raise InvalidInput("model: expected a model of the hub, ORGANISATION/NAME", "model")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rpartition("/")[2]).lstrip("._-")[:63]
    named = given.pop(_SOURCE, None)
    spec: dict[str, Any] = {"name": name, "source": _source(named or model)}
    says = _SOURCE if named else "model"
    made = Translated(spec, keys={"name": "model", "source.repo": says, "source.path": says})
    if name != model:
        made.unused.append(("model", f"a name has no '/': requests call it {name!r} here"))
    for key, (ours, usual) in _KEYS.items():
        known = given.pop(key, usual)
        if known is not None and ours in made.keys:
            made.unused.append((key, f"{made.keys[ours]} says it"))
        elif known is not None:
            made.keys[ours] = key
            _put(spec, ours, known)
    if (metric := given.pop("auto_scaling_config.metric", "concurrency")) != "concurrency":
        made.unused.append(("auto_scaling_config.metric", f"{metric!r} is not measured; models scale by concurrency"))
    made.unused.extend((key, _reason(key)) for key in given)
    return made


def _leaves(value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Its keys, those of its sections dotted; a section that none of is known stays whole."""
    sections = ("auto_scaling_config", "backend_config")
    for key, below in value.items():
        if key not in sections:
            yield key, below
        elif isinstance(below, dict):
            yield from ((f"{key}.{name}", each) for name, each in below.items())
        else:
            raise InvalidInput(f"{key}: expected a mapping", key)


def _source(text: Any) -> dict[str, str]:
    if isinstance(text, str) and text.startswith("/"):
        return {"kind": "path", "path": text}
    return {"kind": "hub", "repo": text}


def _put(spec: dict[str, Any], key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    (spec.setdefault(section, {}) if section else spec)[name] = value


def _reason(key: str) -> str:
    return _REASONS.get(key) or (_OWN_ENGINE if key.startswith("backend_config.") else "it means nothing here")
