"""The JSON Schema: it is what the types say, and it says of specs what the decoder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import schema
from schema.errors import InvalidInput
from schema.spec import parse_spec
from sllmctl.specs.files import read_specs
from sllmctl.specs.published import file_schema, schema_text

_PUBLISHED = Path(schema.__file__).parent / "model-spec.schema.json"
_PATH = {"kind": "path", "path": "/m"}
_SPEC = {"name": "a", "source": _PATH}
_GOOD: list[dict[str, Any]] = [
    _SPEC,
    _SPEC | {"source": {"kind": "path", "path": "/m", "node": "gpu1", "in_place": True}},
    _SPEC | {"source": {"kind": "hub", "repo": "Qwen/Qwen3-0.6B", "revision": "v1.0/x"}},
    _SPEC | {"source": {"kind": "url", "url": "https://host/m"}},
    _SPEC | {"name": "A" * 63, "devices": 64, "cold_start_timeout_s": 0.5},
    _SPEC | {"scale": {"min": 0, "max": 10_000, "keep_alive_s": None, "max_concurrency": 1, "queue_limit": 0}},
    _SPEC | {"scale": {"keep_alive_s": 3}, "engine": {}},
    _SPEC | {"engine": {"kv_bytes": 65536, "max_context_tokens": 8, "threads": None, "deterministic": True}},
]
_BAD: list[Any] = [
    {},
    [],
    "a",
    None,
    {"name": "a"},
    {"source": _PATH},
    _SPEC | {"name": ""},
    _SPEC | {"name": "-a"},
    _SPEC | {"name": "a/b"},
    _SPEC | {"name": "A" * 64},
    _SPEC | {"name": 1},
    _SPEC | {"source": {"path": "/m"}},
    _SPEC | {"source": {"kind": "ftp", "path": "/m"}},
    _SPEC | {"source": {"kind": "path", "path": "m"}},
    _SPEC | {"source": {"kind": "path", "path": "/a\0"}},
    _SPEC | {"source": {"kind": "path", "path": "/" + "a" * 4096}},
    _SPEC | {"source": {"kind": "path", "path": "/m", "repo": "a/b"}},
    _SPEC | {"source": {"kind": "hub", "repo": "a"}},
    _SPEC | {"source": {"kind": "hub", "repo": "a/b/c"}},
    _SPEC | {"source": {"kind": "hub", "repo": "\N{LATIN SMALL LETTER E WITH ACUTE}/b"}},
    _SPEC | {"source": {"kind": "url", "url": "ftp://host/m"}},
    _SPEC | {"devices": 0},
    _SPEC | {"devices": 65},
    _SPEC | {"devices": 1.5},
    _SPEC | {"devices": True},
    _SPEC | {"devices": None},
    _SPEC | {"scale": {"min": -1}},
    _SPEC | {"scale": {"max": 0}},
    _SPEC | {"scale": {"maximum": 1}},
    _SPEC | {"scale": {"keep_alive_s": -1}},
    _SPEC | {"scale": {"keep_alive_s": "auto"}},
    _SPEC | {"scale": None},
    _SPEC | {"engine": {"kv_bytes": 65535}},
    _SPEC | {"engine": {"deterministic": 1}},
    _SPEC | {"cold_start_timeout_s": 86400 * 366},
    _SPEC | {"replicas": 1},
]  # fmt: skip
_UNSAID = [
    _SPEC | {"scale": {"min": 2, "max": 1}},
    _SPEC | {"name": "a\n"},
    _SPEC | {"source": {"kind": "hub", "repo": "a/b\n"}},
    _SPEC | {"source": {"kind": "hub", "repo": "a/b", "revision": "v\n"}},
    _SPEC | {"source": {"kind": "url", "url": "https://user:word@host/m"}},
    _SPEC | {"source": {"kind": "url", "url": "https://host/../m"}},
]
"""What a schema cannot say, or (line breaks) validators in Python do not hear, and the manager refuses all the same."""

_WORDS = ["/m", "./m", "..", "gpu1:/m", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@v1.0/x", "https://host/m"]
_NO_WORDS = ["", "m", "~/m", "a/b/c", "gpu1://m", "ftp://host/m", "https:///m", "/a\0", "./a\0", ".hidden/m/x"]

_VALIDATOR = jsonschema.Draft7Validator(file_schema())


def test_the_published_schema_is_what_the_types_say() -> None:
    assert _PUBLISHED.read_text() == schema_text() + "\n", "write it anew: sllmctl schema > schema/model-spec.schema.json"
    jsonschema.Draft7Validator.check_schema(file_schema())


@pytest.mark.parametrize("spec", _GOOD)
def test_both_take_what_is_good(spec: dict[str, Any]) -> None:
    parse_spec(spec)
    assert _VALIDATOR.is_valid(spec)
    assert _VALIDATOR.is_valid([spec, spec])


@pytest.mark.parametrize("spec", _BAD)
def test_both_refuse_what_is_bad(spec: Any) -> None:
    with pytest.raises(InvalidInput):
        parse_spec(spec)
    assert not _VALIDATOR.is_valid([spec])


@pytest.mark.parametrize("spec", _UNSAID)
def test_what_a_schema_cannot_say_is_refused_by_the_decoder(spec: Any) -> None:
    assert _VALIDATOR.is_valid(spec)
    with pytest.raises(InvalidInput):
        parse_spec(spec)


@pytest.mark.parametrize("word", _WORDS + _NO_WORDS)
def test_of_a_source_in_a_word_both_say_the_same(word: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(_SPEC | {"source": word}))
    try:
        read_specs([str(tmp_path / "a.json")])
    except InvalidInput:
        taken = False
    else:
        taken = True
    assert taken == _VALIDATOR.is_valid(_SPEC | {"source": word}) == (word in _WORDS)


def test_every_key_is_described() -> None:
    for part in file_schema()["definitions"].values():
        for name, key in part["properties"].items():
            assert name == "kind" or "description" in key or "$ref" in str(key), name
