"""The deployment spec: what an operator says of a model, validated; unknown keys are errors that name their place.

Descriptions, bounds and patterns are those of the published JSON Schema too (`sllmctl.specs.published`), so patterns mean the
same to Python and to ECMAScript.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from schema.errors import InvalidInput
from schema.names import did_you_mean
from schema.remote import check_remote_url

__all__ = [
    "EngineSpec",
    "HubSource",
    "ModelSpec",
    "PathSource",
    "ScaleSpec",
    "Source",
    "UrlSource",
    "check_spec",
    "parse_spec",
    "source_of",
]

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_YEAR_S: Final = 86400 * 365


class PathSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="path"):
    """A Hugging Face directory on a node."""

    path: Annotated[str, Meta(pattern=r"^/[^\0]*$", max_length=4096, description="The directory, absolute.")]
    node: Annotated[str, Meta(description="The node that has it; empty for the manager's own machine.")] = ""
    in_place: Annotated[bool, Meta(description="Load its safetensors files as they lie there, and make no second copy.")] = (
        False
    )


class HubSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="hub"):
    """A model of a Hugging Face hub."""

    repo: Annotated[
        str,
        Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+$", max_length=200, description="ORGANISATION/NAME."),
    ]
    revision: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9_./-]+$", max_length=200, description="A branch, a tag or a commit.")
    ] = "main"


class UrlSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="url"):
    """A Hugging Face directory behind any HTTP server that honours Range requests; credentials are the node's own."""

    url: Annotated[
        str, Meta(pattern=r"^https?://[^/]", max_length=1024, description="http(s)://HOST/PATH, without credentials.")
    ]


Source = PathSource | HubSource | UrlSource


class ScaleSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many instances, and when."""

    min: Annotated[int, Meta(ge=0, le=10_000, description="Instances kept at least; 0 scales to zero.")] = 0
    max: Annotated[int, Meta(ge=1, le=10_000, description="Instances at most.")] = 1
    keep_alive_s: Annotated[
        Annotated[float, Meta(ge=0, le=_YEAR_S)] | None,
        Meta(
            description="With min 0, the last instance stops so many seconds after its last request ended; "
            "null derives it from what a reload would cost."
        ),
    ] = None
    max_concurrency: Annotated[int, Meta(ge=1, le=4096, description="Sequences that run on one instance at once.")] = 64
    queue_limit: Annotated[int, Meta(ge=0, le=1_000_000, description="Requests that may wait.")] = 256


class EngineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is asked of the engine. None (null) leaves the choice to it."""

    kv_bytes: Annotated[
        Annotated[int, Meta(ge=1 << 16)] | None, Meta(description="Bytes for the KV cache of one instance.")
    ] = None
    max_context_tokens: Annotated[
        Annotated[int, Meta(ge=8)] | None, Meta(description="A shorter context than the model's own.")
    ] = None
    threads: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None, Meta(description="CPU threads of a worker on a CPU device.")
    ] = None
    deterministic: Annotated[
        bool,
        Meta(description="The same bits in every batch, chunk and migration on one kind of device, at half the speed or less."),
    ] = False


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model under its deployed name."""

    name: Annotated[str, Meta(pattern=_NAME, description="What requests call it.")]
    source: Annotated[Source, Meta(description="Where it comes from.")]
    devices: Annotated[int, Meta(ge=1, le=64, description="Devices that one instance spans.")] = 1
    scale: ScaleSpec = ScaleSpec()
    engine: EngineSpec = EngineSpec()
    cold_start_timeout_s: Annotated[
        float, Meta(ge=0, le=_YEAR_S, description="A request waits for a start no longer, in seconds.")
    ] = 120.0


_FORMS: Final = {
    "name": "1 to 63 letters, digits, '.', '_' and '-', a letter or digit first",
    "source.path": "an absolute path",
    "source.repo": "ORGANISATION/NAME",
    "source.revision": "a branch, tag or commit",
    "source.url": "http(s)://HOST/PATH",
}
"""What a pattern means, in words."""

_SOURCES: Final[dict[str, type[msgspec.Struct]]] = {"path": PathSource, "hub": HubSource, "url": UrlSource}


def parse_spec(value: Any) -> ModelSpec:
    """A checked spec from decoded YAML or JSON. Raises InvalidInput naming the key at fault."""
    try:
        spec = msgspec.convert(value, ModelSpec)
    except msgspec.ValidationError as error:
        key, what = _explained(str(error), value)
        raise InvalidInput(f"model spec: {key}: {what}" if key else f"model spec: {what}", key or None) from error
    return check_spec(spec)


def check_spec(spec: ModelSpec) -> ModelSpec:
    """The spec, if what no type says holds too. Raises InvalidInput naming the key at fault."""
    if isinstance(spec.source, UrlSource):
        try:
            check_remote_url(spec.source.url)
        except InvalidInput as error:
            raise InvalidInput(f"model spec: source.url: {error}", "source.url") from error
    for key, text in _patterned(spec):
        if text.endswith("\n"):  # Python's $ lets it pass
            raise InvalidInput(f"model spec: {key}: expected {_FORMS[key]}", key)
    if spec.scale.min > spec.scale.max:
        raise InvalidInput(f"model spec: scale.min: {spec.scale.min} is above scale.max, {spec.scale.max}", "scale.min")
    return spec


def _patterned(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    yield "name", spec.name
    if isinstance(spec.source, HubSource):
        yield "source.repo", spec.source.repo
        yield "source.revision", spec.source.revision


def _explained(text: str, value: Any) -> tuple[str, str]:
    """The dotted key at fault, "" for the whole, and what is wrong with it, from msgspec's message."""
    what, _, place = text.rpartition(" - at `$")
    if not what:
        what, place = text, ""
    key = place.rstrip("`").lstrip(".")
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        name = found.group(1)
        return _below(key, name), f"unknown key{_meant(key, name, value)}"
    if found := re.fullmatch(r"Object missing required field `(.*)`", what):
        return _below(key, found.group(1)), "it is missing"
    if "matching regex" in what and key in _FORMS:
        return key, f"expected {_FORMS[key]}"
    if key == "source.kind":
        return key, f"expected one of {', '.join(_SOURCES)}"
    what = what.replace("`", "")
    given = _at(value, key)
    if ", got " in what and isinstance(given, str | int | float):
        what += f" {given if isinstance(given, int | float) else repr(given[:80])}"
    return key, what[:1].lower() + what[1:]


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _at(value: Any, key: str) -> Any:
    for name in key.split(".") if key else ():
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _meant(key: str, name: str, value: Any) -> str:
    """A key that is like the unknown one where it stands, or the same in another place."""
    places: dict[str, type[msgspec.Struct]] = {"": ModelSpec, "scale": ScaleSpec, "engine": EngineSpec}
    places["source"] = _SOURCES.get(str(_at(value, "source.kind")), PathSource)
    keys = {place: [field.name for field in msgspec.structs.fields(kind)] for place, kind in places.items()}
    if near := did_you_mean(name, keys.get(key, [])):
        return near
    elsewhere = [_below(place, name) for place, known in keys.items() if name in known]
    return f"; did you mean {elsewhere[0]!r}?" if elsewhere else ""


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
