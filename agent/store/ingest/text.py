"""The text side of a checkpoint: one tokenizer.json, one template, and the defaults, whatever form they came in."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

from agent.store.ingest.files import SourceDirectory
from agent.store.ingest.headers import parse_json
from schema.checkpoint import AssetEntry, TextDefaults
from schema.errors import InvalidCheckpoint

__all__ = ["TEMPLATE_FILE", "TOKENIZER_FILE", "TextSide", "read_text_side", "write_assets"]

TOKENIZER_FILE: Final = "tokenizer.json"
TEMPLATE_FILE: Final = "chat_template.jinja"

_MAX_TEMPLATE_BYTES: Final = 1 << 20
_MOST_GROWTH: Final = 256
_LONGEST_MAPPED: Final = 64
"""Bytes; Unicode's own longest, a ligature of eighteen letters, takes 33."""
_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_CONVERTIBLE: Final = (
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TextSide:
    """The normalised tokenizer, the template if there is one, and what goes into the manifest."""

    tokenizer: str
    template: str | None
    defaults: TextDefaults


class _Sampling(msgspec.Struct, frozen=True):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_text_side(directory: SourceDirectory, config: dict[str, Any], vocab_size: int, scratch: Path) -> TextSide:
    """Normalise tokenizer, template and defaults. ``scratch`` is an empty directory for a conversion.

    Raises InvalidCheckpoint naming what cannot be: no tokenizer of a known kind, one with its own code, a damaged one, or a
    generation_config that makes no sense.
    """
    settings = _json(directory, "tokenizer_config.json")
    if "auto_map" in settings:
        raise InvalidCheckpoint("tokenizer_config.json asks for the model's own code (auto_map), which is never run")
    tokenizer = _tokenizer(directory, vocab_size, scratch)
    template = _template(directory, settings)
    special = _special_tokens(_json(directory, "special_tokens_map.json") | settings)
    generation = _json(directory, "generation_config.json")
    try:
        sampling = msgspec.convert({key: generation.get(key) for key in _Sampling.__struct_fields__}, _Sampling)
    except msgspec.ValidationError as error:
        raise InvalidCheckpoint(f"generation_config.json: {error}") from error
    _check_sampling(sampling)
    stops = _token_ids(generation.get("eos_token_id", config.get("eos_token_id")), "eos_token_id")
    if "eos_token" in special and (named := tokenizer.token_to_id(special["eos_token"])) is not None:
        stops = (*stops, named)
    defaults = TextDefaults(
        # An id beyond the vocabulary can never be sampled; some configs use -1 or a stale id for "none".
        stop_token_ids=tuple(dict.fromkeys(each for each in stops if 0 <= each < vocab_size)),
        has_template=template is not None,
        special_tokens=special,
        **msgspec.structs.asdict(sampling),
    )
    return TextSide(tokenizer.to_str(), template, defaults)


def write_assets(text: TextSide, directory: Path) -> tuple[AssetEntry, ...]:
    """Write the assets beside the partitions; the caller makes them durable with the rest."""
    files = {TOKENIZER_FILE: text.tokenizer} | ({TEMPLATE_FILE: text.template} if text.template is not None else {})
    entries = []
    for name, content in files.items():
        data = content.encode()
        (directory / name).write_bytes(data)
        entries.append(AssetEntry(name, len(data), hashlib.sha256(data).hexdigest()))
    return tuple(entries)


def _json(directory: SourceDirectory, name: str) -> dict[str, Any]:
    return parse_json(directory.read(name), name) if directory.has(name) else {}


def _tokenizer(directory: SourceDirectory, vocab_size: int, scratch: Path) -> Tokenizer:
    if directory.has(TOKENIZER_FILE):
        data, what = directory.read(TOKENIZER_FILE), TOKENIZER_FILE
    else:
        data, what = _convert(directory, scratch), "the converted tokenizer"
    with _refused(f"{what} is not readable"):
        tokenizer = Tokenizer.from_str(data.decode())
    # Limits and padding are the gateway's affair: what a request says must arrive whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_growth(tokenizer, what)
    with _refused(f"{what} cannot frame a text"):
        frame = tokenizer.encode("").ids
    if (highest := max(frame, default=0)) >= vocab_size:
        raise InvalidCheckpoint(f"{what} frames every text with token id {highest}, beyond the vocabulary of {vocab_size}")
    return tokenizer


def _check_growth(tokenizer: Tokenizer, what: str) -> None:
    """Raises InvalidCheckpoint for a tokenizer by which a text, or a reply, could become so long that it fills the memory of
    whoever reads it: replacements feed each other, so twenty of them that each double a text make a million of it."""
    for kind in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(tokenizer, kind)
        if part is not None and (growth := _growth(json.loads(part.__getstate__()))) > _MOST_GROWTH:
            raise InvalidCheckpoint(f"{what}: its {kind} may make a text {growth:g} times as long, which is not taken")


def _growth(part: Any) -> float:
    """How many times as long a step of a tokenizer, as its file describes it, may make a text by what the file says itself."""
    if not isinstance(part, dict):
        return 1.0
    pattern, content = part.get("pattern"), part.get("content")
    match part.get("type"):
        case "Sequence":
            steps = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
            return math.prod(map(_growth, steps))
        case "Replace" if isinstance(pattern, dict) and isinstance(content, str):
            replaced = pattern.get("String")
            # Any regular expression may find the empty text between all characters.
            return max(1.0, len(content) / len(replaced)) if replaced else 1.0 + len(content)
        case "Prepend":
            return 1.0 + len(part.get("prepend", ""))
        case "Precompiled":
            return max(1.0, _longest_mapped(part.get("precompiled_charsmap") or "") / _LONGEST_MAPPED)
    return 1.0


def _longest_mapped(charsmap: str) -> int:
    """The bytes of the longest text that SentencePiece's table puts in place of another: they come after its trie, whose size
    the first four bytes tell, each with a zero byte at its end."""
    data = base64.b64decode(charsmap)
    return max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")), default=0)


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever the library raises in here, a panic of Rust's too, as InvalidCheckpoint with its first line."""
    try:
        yield
    except BaseException as error:  # hostile files fail in as many ways as there are tokenizers
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":  # where Rust's panics come from
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidCheckpoint(f"{what}: {reason[0]}") from error


def _convert(directory: SourceDirectory, scratch: Path) -> bytes:
    """A tokenizer.json from the older forms, by transformers, over checked copies of the files."""
    found = [name for name in _CONVERTIBLE if directory.has(name)]
    if not any(name.endswith((".model", "vocab.json", "vocab.txt")) for name in found):
        raise InvalidCheckpoint(f"{directory.path} has no tokenizer.json, and nothing that one could be made of")
    for name in found:
        (scratch / name).write_bytes(directory.read(name))
    from transformers import AutoTokenizer

    try:
        with _refused(f"the tokenizer ({', '.join(found)}) cannot be made a tokenizer.json"):
            tokenizer = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False, local_files_only=True, use_fast=True)
            backend: Tokenizer = tokenizer.backend_tokenizer
            return backend.to_str().encode()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _template(directory: SourceDirectory, settings: dict[str, Any]) -> str | None:
    if directory.has(TEMPLATE_FILE):
        try:
            return directory.read(TEMPLATE_FILE, _MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise InvalidCheckpoint(f"{TEMPLATE_FILE} is no text: {error}") from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default")
    if value is not None and (not isinstance(value, str) or len(value.encode()) > _MAX_TEMPLATE_BYTES):
        raise InvalidCheckpoint("tokenizer_config.json: chat_template is no text of at most 1 MiB")
    return value


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in _SPECIAL:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _token_ids(value: Any, what: str) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int for each in values):
        raise InvalidCheckpoint(f"{what} is {value!r}, not a token id or a list of them")
    return tuple(values)


def _check_sampling(sampling: _Sampling) -> None:
    bounds = {
        "temperature": (0, 100), "top_p": (0, 1), "top_k": (0, 1 << 31), "min_p": (0, 1), "repetition_penalty": (0.01, 100),
    }  # fmt: skip
    for name, (low, high) in bounds.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:
            raise InvalidCheckpoint(f"generation_config.json: {name} is {value}, not between {low} and {high}")
