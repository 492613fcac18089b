"""Logs on their way from a node: asked for in pages, and followed from where the last one ended."""

from __future__ import annotations

import msgspec

from schema.errors import Fault
from schema.link.base import Count, Message

__all__ = ["LogChunk", "LogLine", "ReadLog"]


class LogLine(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``source`` is an instance or a process of the node; ``at`` is Unix seconds of its clock, None for what does not say."""

    source: str
    at: float | None
    text: str


class ReadLog(Message, frozen=True, kw_only=True, tag="readlog"):
    """Ask for what the workers of a ``model`` or of one ``instance`` wrote, dead ones too, or a ``process`` of the node (agent,
    store, zygote, ingest, publish); answered by `LogChunk`.

    Without ``cursors`` it begins with the last ``tail`` lines of each that are not older than ``newer_s`` (0: any age); with
    those of a chunk before, it goes on from there.
    """

    op: str
    model: str = ""
    instance: str = ""
    process: str = ""
    tail: Count = 0
    newer_s: float = 0.0
    cursors: dict[str, str] | None = None


class LogChunk(Message, frozen=True, kw_only=True, tag="logchunk"):
    """Whole lines, of each source in its order; ``more`` are there already. What was put aside twice since the last chunk is
    passed over."""

    op: str
    lines: tuple[LogLine, ...] = ()
    cursors: dict[str, str] = {}  # noqa: RUF012 - msgspec copies an empty one
    more: bool = False
    fault: Fault | None = None
