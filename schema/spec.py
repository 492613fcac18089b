"""The deployment spec: what an operator says of a model, validated; unknown keys are errors that name their place."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from schema.errors import InvalidInput
from schema.remote import check_remote_url

__all__ = ["EngineSpec", "HubSource", "ModelSpec", "PathSource", "ScaleSpec", "Source", "UrlSource", "parse_spec", "source_of"]

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Seconds = Annotated[float, Meta(ge=0, le=86400 * 365)]


class PathSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="path"):
    """A Hugging Face directory at an absolute ``path`` on ``node``; an empty node is the manager's own machine.

    With ``in_place`` its safetensors files are loaded as they lie there, and no second copy is made.
    """

    path: Annotated[str, Meta(pattern=r"^/[^\0]*$", max_length=4096)]
    node: str = ""
    in_place: bool = False


class HubSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="hub"):
    """A model of a Hugging Face hub: ``organisation/name`` and a revision."""

    repo: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$", max_length=200)]
    revision: Annotated[str, Meta(pattern=r"^[\w./-]+$", max_length=200)] = "main"


class UrlSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="url"):
    """A Hugging Face directory behind any HTTP server that honours Range requests; credentials are the node's own."""

    url: Annotated[str, Meta(pattern=r"^https?://[^/]", max_length=1024)]


Source = PathSource | HubSource | UrlSource


class ScaleSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many instances, and when. ``max_concurrency`` sequences run on one instance; ``queue_limit`` requests wait.

    With ``min`` 0 the last instance stops ``keep_alive_s`` after its last request ended; None derives it from what a reload
    would cost.
    """

    min: Annotated[int, Meta(ge=0, le=10_000)] = 0
    max: Annotated[int, Meta(ge=1, le=10_000)] = 1
    keep_alive_s: Seconds | None = None
    max_concurrency: Annotated[int, Meta(ge=1, le=4096)] = 64
    queue_limit: Annotated[int, Meta(ge=0, le=1_000_000)] = 256


class EngineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is asked of the engine. None leaves the choice to it.

    ``kv_bytes``: memory for the KV cache of one instance. ``max_context_tokens``: below the model's own limit.
    ``threads``: CPU threads of a worker on a CPU device. ``deterministic``: the same bits in every batch, chunk and
    migration on one kind of device, at half the speed or less.
    """

    kv_bytes: Annotated[int, Meta(ge=1 << 16)] | None = None
    max_context_tokens: Annotated[int, Meta(ge=8)] | None = None
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    deterministic: bool = False


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model under its deployed name. ``devices`` is how many devices one instance spans."""

    name: Annotated[str, Meta(pattern=_NAME)]
    source: Source
    devices: Annotated[int, Meta(ge=1, le=64)] = 1
    scale: ScaleSpec = ScaleSpec()
    engine: EngineSpec = EngineSpec()
    cold_start_timeout_s: Seconds = 120.0


def parse_spec(value: Any) -> ModelSpec:
    """A checked spec from decoded YAML or JSON. Raises InvalidInput naming the key at fault."""
    try:
        spec = msgspec.convert(value, ModelSpec)
    except msgspec.ValidationError as error:
        match = re.search(r" - at `\$\.?(.*)`$", str(error))
        raise InvalidInput(f"model spec: {error}", match.group(1) if match else None) from error
    if isinstance(spec.source, UrlSource):
        check_remote_url(spec.source.url)
    if spec.scale.min > spec.scale.max:
        raise InvalidInput(f"model spec: scale.min {spec.scale.min} is above scale.max {spec.scale.max}", "scale.min")
    return spec


def source_of(text: str) -> Source | None:
    """The source that a command-line word means, or None if it is none: ``/abs/path``, ``NODE:/abs/path``, ``org/name``, a URL.

    Raises InvalidInput for a URL that is none, or may hold a credential.
    """
    if text.startswith("/"):
        return PathSource(text)
    if re.match(r"https?://", text):
        return UrlSource(check_remote_url(text))
    if match := re.fullmatch(r"([A-Za-z0-9][\w.-]*):(/(?!/).*)", text):
        return PathSource(match.group(2), match.group(1))
    if match := re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", text):
        return HubSource(match.group(1), match.group(2) or "main")
    return None
