"""All that is wrong with a spec, not only what is met first: that is put out of the way, and the rest judged again."""

from __future__ import annotations

from typing import Any, Final

from schema.errors import InvalidInput
from schema.spec import parse_spec

__all__ = ["STAND_INS", "faults_of"]

_MOST: Final = 20
"""So many are told of one spec; each takes another look at all of it."""
STAND_INS: Final[dict[str, Any]] = {"name": "name", "source": {"kind": "path", "path": "/"}}
"""What stands in for a key that cannot be left out."""


def faults_of(value: dict[str, Any]) -> list[InvalidInput]:
    """What `parse_spec` refuses of it, one by one; empty for a good spec. Of a ``source`` only the first."""
    found: list[InvalidInput] = []
    rest: Any = value
    while len(found) < _MOST:
        try:
            parse_spec(rest)
        except InvalidInput as error:
            found.append(error)
            key = error.param or ""
            needed = key.partition(".")[0]
            before, rest = rest, rest | {needed: STAND_INS[needed]} if needed in STAND_INS else _without(rest, key)
            if rest == before:
                break
        else:
            break
    return found


def _without(value: Any, key: str) -> Any:
    """It without what stands under a dotted key; as it is if there is nothing."""
    top, _, below = key.partition(".")
    if not isinstance(value, dict) or top not in value:
        return value
    if below:
        return value | {top: _without(value[top], below)}
    return {name: each for name, each in value.items() if name != top}
