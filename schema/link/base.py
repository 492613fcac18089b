"""What all messages are made of: their base, the protocol's versions and its limits."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from schema.ids import Epoch

__all__ = [
    "MAX_FRAME_BYTES",
    "PROTOCOL",
    "PROTOCOL_OLDEST",
    "TOKEN_WINDOW_FRAMES",
    "Count",
    "Finite",
    "Life",
    "Message",
    "Part",
]

PROTOCOL: Final = 5
"""The newest version of these messages that this build speaks. Another field is another version: who does not know it refuses
the frame."""
PROTOCOL_OLDEST: Final = 5
"""The oldest version that this build still speaks."""
MAX_FRAME_BYTES: Final = 32 << 20
"""A longer frame is refused before its body is read; bulk data never travels here."""
TOKEN_WINDOW_FRAMES: Final = 256
"""How many `Tokens` frames an agent sends ahead of the manager's `Acked`; then runs coalesce at the agent."""

_MAX_INT: Final = (1 << 63) - 1

Count = Annotated[int, Meta(ge=0, le=_MAX_INT)]
"""A number of things or bytes, or the index of one; a database takes it."""
Life = Annotated[Epoch, Meta(ge=0, le=_MAX_INT)]
"""The epoch of an instance's life, as its node states it."""
Finite = Annotated[float, Meta(ge=-1e18, le=1e18)]
"""Seconds, or bytes per second: no NaN and no infinity, which would spread through every estimate, and have no JSON."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="t"):
    """Base of all messages; the tag field ``t`` names the kind."""


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of the structs inside messages."""
