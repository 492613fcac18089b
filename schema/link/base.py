"""What all messages are made of: their base, the protocol's versions and its limits."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

__all__ = ["MAX_FRAME_BYTES", "PROTOCOL", "PROTOCOL_OLDEST", "TOKEN_WINDOW_FRAMES", "Count", "Message", "Part"]

PROTOCOL: Final = 1
"""The newest version of these messages that this build speaks."""
PROTOCOL_OLDEST: Final = 1
"""The oldest version that this build still speaks."""
MAX_FRAME_BYTES: Final = 32 << 20
"""A longer frame is refused before its body is read; bulk data never travels here."""
TOKEN_WINDOW_FRAMES: Final = 256
"""How many `Tokens` frames an agent sends ahead of the manager's `Acked`; then runs coalesce at the agent."""

Count = Annotated[int, Meta(ge=0)]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="t"):
    """Base of all messages; the tag field ``t`` names the kind."""


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of the structs inside messages."""
