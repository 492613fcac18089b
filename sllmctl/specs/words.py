"""A spec's source as one word, as `model add` takes it, instead of a mapping."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import msgspec

from schema.errors import InvalidInput
from schema.spec import source_of

__all__ = ["WORD_SCHEMA", "source_in_word"]

_ORGANISATION: Final = "[A-Za-z0-9][A-Za-z0-9_.-]*"
WORD_SCHEMA: Final[dict[str, Any]] = {
    "type": "string",
    "description": "/PATH, ./PATH (from the directory of this file), NODE:/PATH, ORGANISATION/NAME[@REVISION] of a hub, or "
    "https://HOST/PATH.",
    "pattern": rf"^(/[^\0]*|\.\.?(/[^\0]*)?|{_ORGANISATION}:/(?!/)[^\0]*|{_ORGANISATION}/[A-Za-z0-9_.-]+(@[A-Za-z0-9_./-]+)?"
    r"|https?://[^/].*)$",
}


def source_in_word(word: str, directory: Path) -> dict[str, Any]:
    """What the word means, as a mapping that is still to be checked; ``directory`` is where a path begins with ``.``.

    Raises InvalidInput for what is none, and for a URL that may hold a credential.
    """
    if word.split("/", 1)[0] in (".", ".."):
        word = os.path.normpath(directory.absolute() / word)
    try:
        source = source_of(word)
    except InvalidInput as error:
        raise InvalidInput(f"source: {error}", "source") from error
    if source is None:
        raise InvalidInput(
            f"source: {word[:80]!r} is none; it is /PATH, ./PATH, NODE:/PATH, ORGANISATION/NAME of a hub, or https://HOST/PATH",
            "source",
        )
    return dict(msgspec.to_builtins(source))
