"""What may be set of the gateway: every limit and every timeout of it, with defaults."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["GatewaySettings"]

_Seconds = Annotated[float, Meta(gt=0, le=86400.0)]
_Count = Annotated[int, Meta(ge=1)]


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of one HTTP gateway.

    Connections: ``header_timeout_s`` from a connection's opening to its first request's last header, which together take
    ``header_limit_bytes``; ``body_timeout_s`` from there to the last byte of a body of ``body_limit_bytes`` at most, and all
    bodies that are being read or understood take ``bodies_limit_bytes`` together;
    ``keep_alive_timeout_s`` between two requests. ``slow_reader_timeout_s``: how long a client may leave what was sent to it
    unread. ``drain_s``: how long running responses may go on once the gateway is told to stop. ``connection_limit`` open
    connections; one more is answered 503.

    Bodies: at most ``stop_strings_limit`` stop strings, of ``stop_chars_limit`` characters each.

    Text: ``assets_timeout_s`` waits for a checkpoint's tokenizer and template to be here, and again for them to be loaded.
    ``tokenizers_kept`` stay loaded.
    Texts over ``inline_encode_chars``, and all of a model whose tokenizer was slow twice, are tokenised off the event loop, by
    ``encode_threads`` for each model; a request waits ``encode_timeout_s`` for that. There, too, replies become text whose
    decoder is none of the usual ones. A text with more than
    ``chars_per_token_limit`` characters for each token of the context is refused without that: tokenising takes some hundred
    bytes of memory for each token, however few of them the model can take.

    Templates run in a helper process of ``template_memory_bytes`` address space, one at a time: ``template_timeout_s`` of a
    processor each, after ``template_queue_timeout_s`` in the queue at most; ``template_output_bytes`` bounds what one writes.
    ``template_spawn_timeout_s``: how long the helper may take to start.
    """

    body_limit_bytes: _Count = 8 << 20
    bodies_limit_bytes: _Count = 256 << 20
    body_timeout_s: _Seconds = 30.0
    header_limit_bytes: _Count = 64 << 10
    header_timeout_s: _Seconds = 15.0
    keep_alive_timeout_s: _Seconds = 75.0
    slow_reader_timeout_s: _Seconds = 60.0
    drain_s: _Seconds = 30.0
    connection_limit: _Count = 8192

    stop_strings_limit: _Count = 16
    stop_chars_limit: _Count = 256

    assets_timeout_s: _Seconds = 30.0
    tokenizers_kept: _Count = 16
    inline_encode_chars: _Count = 512
    chars_per_token_limit: _Count = 128
    encode_threads: Annotated[int, Meta(ge=1, le=64)] = 2
    encode_timeout_s: _Seconds = 30.0

    template_timeout_s: _Seconds = 2.0
    template_queue_timeout_s: _Seconds = 10.0
    template_spawn_timeout_s: _Seconds = 60.0
    template_memory_bytes: Annotated[int, Meta(ge=64 << 20)] = 512 << 20
    template_output_bytes: _Count = 16 << 20
