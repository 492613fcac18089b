"""What the admin API's structs promise to those who read them as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from schema import admin

_FRAMES = {admin.StreamFrame}
"""What they have is what has changed."""
_VIEWS = [kind for name in admin.__all__ if isinstance(kind := getattr(admin, name), type) and kind not in _FRAMES]


def _structs(kind: Any) -> Iterator[type[msgspec.Struct]]:
    """The structs that a type is made of, itself among them."""
    known: set[type[msgspec.Struct]] = set()

    def look(info: Any) -> Iterator[type[msgspec.Struct]]:
        if isinstance(info, msgspec.inspect.StructType):
            if info.cls in known:
                return
            known.add(info.cls)
            yield info.cls
        for name in getattr(info, "__struct_fields__", ()):
            value = getattr(info, name)
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, msgspec.inspect.Type | msgspec.inspect.Field):
                    yield from look(each)

    return look(msgspec.inspect.type_info(kind))


@pytest.mark.parametrize("kind", _VIEWS)
def test_whoever_reads_json_finds_every_field(kind: type) -> None:
    """Also one that has its default: a key that is missing at times is one that a script trips over."""
    assert [each.__name__ for each in _structs(kind) if each.__struct_config__.omit_defaults] == []
