"""The JSON Schema of a file of specs, as `sllmctl schema` prints it and schema/model-spec.schema.json keeps it.

What it cannot say, the manager checks: that scale.min is no more than scale.max, and what else a URL must not have.
"""

from __future__ import annotations

from typing import Any

import msgspec

from schema.spec import ModelSpec
from sllmctl.specs.words import WORD_SCHEMA

__all__ = ["file_schema", "schema_text"]

# Editors know this draft; the newer ones say nothing that is needed here.
_DRAFT = "http://json-schema.org/draft-07/schema#"


def file_schema() -> dict[str, Any]:
    """One spec, or a list of them, as a document of a file may be."""
    (reference,), parts = msgspec.json.schema_components([ModelSpec], ref_template="#/definitions/{name}")
    parts["ModelSpec"]["properties"]["source"]["anyOf"].append(WORD_SCHEMA)
    return {
        "$schema": _DRAFT,
        "title": "Model specs of sllmctl",
        "description": "What `sllmctl apply -f` takes: a model, or a list of models, in each document.",
        "if": {"type": "array"},
        "then": {"items": reference},
        "else": reference,
        "definitions": {name: _plain(part) for name, part in parts.items()},
    }


def schema_text() -> str:
    """The schema as it is printed."""
    return msgspec.json.format(msgspec.json.encode(file_schema()), indent=2).decode()


def _plain(part: Any) -> Any:
    """Without what JSON Schema does not know: the discriminator is OpenAPI's."""
    if isinstance(part, dict):
        return {key: _plain(value) for key, value in part.items() if key != "discriminator"}
    return [_plain(each) for each in part] if isinstance(part, list) else part
