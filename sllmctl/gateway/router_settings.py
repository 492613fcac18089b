"""The router's bounds and waits."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["RouterSettings"]

_Seconds = Annotated[float, Meta(ge=0)]
_Count = Annotated[int, Meta(ge=1)]


class RouterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What bounds requests in the router.

    ``max_attempts``: how often one sequence may be put on an instance without a token coming of it; then it fails with the last
    fault.
    ``max_journal_tokens``: prompt and generated tokens of all live requests, a log-probability counted as a token; a new
    request beyond it is refused. Replies that run may go over it by what they still generate.
    ``max_sequence_tokens``: prompt and reply of one sequence, so that its Submit fits a frame. ``expected_reply_tokens``: what
    a reply is taken to need of a KV cache until the model's own replies have taught better. ``reply_smoothing``: the weight of
    the newest reply in a model's averages.

    ``orphan_grace_s``: how long a sequence found on a node at the manager's start runs without a client.
    ``retry_grace_s``: how long a request with an Idempotency-Key, whose client went away, runs on for a retry to come.
    ``replies_kept_s``: how long a retry gets its reply once it has ended; at most ``replies_kept`` of them, of
    ``replies_kept_tokens`` together, prompts included, a log-probability counted as a token.
    ``demand_interval_s``: how often the control loop hears of a changed queue. ``prefill_interval_s``: how soon after the time
    of one prefill it hears of another of the same instance; twice as long each time, up to ``prefill_longest_s``.
    ``first_retry_after_s``: what a refused client is told before a model's pace is known; ``longest_retry_after_s``: at most.
    ``remembered_requests``: finished ones that can still be shown. ``remembered_progress``: operations and starts whose
    progress is kept.
    """

    max_attempts: _Count = 8
    max_journal_tokens: _Count = 32_000_000
    max_sequence_tokens: _Count = 4_000_000
    expected_reply_tokens: _Count = 256
    orphan_grace_s: _Seconds = 30.0
    retry_grace_s: _Seconds = 30.0
    replies_kept_s: _Seconds = 300.0
    replies_kept: _Count = 1000
    replies_kept_tokens: _Count = 2_000_000
    demand_interval_s: _Seconds = 0.1
    prefill_interval_s: _Seconds = 1.0
    prefill_longest_s: _Seconds = 60.0
    first_retry_after_s: _Seconds = 5.0
    longest_retry_after_s: _Seconds = 120.0
    remembered_requests: _Count = 1000
    remembered_progress: _Count = 1000
    reply_smoothing: Annotated[float, Meta(gt=0, le=1)] = 0.1
