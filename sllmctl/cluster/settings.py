"""The control loop's settings: every wait and bound of placing, starting, restarting and forgetting. No I/O."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["ControlSettings"]

_Seconds = Annotated[float, Meta(ge=0, le=86400 * 365)]
_Positive = Annotated[float, Meta(gt=0)]
_Count = Annotated[int, Meta(ge=1)]


class ControlSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Timeouts in seconds, bandwidths in bytes per second.

    ``local_node``: the name of the node that runs beside the manager, where a source without a node lies.
    ``unreachable_grace_s``: instances of a node that is away for longer count as lost, and it is told of as why a model
    finds no place.
    ``start_timeout_s``: a life that is not ready after so long is given up and counted as a death.
    ``fetch_timeout_s``: what one gets beside that whose weights come from a remote.
    ``drain_s``: what a stopped instance gets to finish its sequences; ``drain_longest_s``: what it gets when it leaves only to
    make room. ``room_timeout_s``: a planned instance whose room has not come by then is planned anew.
    ``stop_timeout_s``: a node that has not stopped an
    instance so long after its drain is told again.
    ``ingest_timeout_s``: an ingest is cancelled after this. ``drop_retry_s``, ``drop_attempts``: a checkpoint still in use
    when it is to be dropped. ``reply_timeout_s``: an operator's command waits so long for its answer.

    A dead instance is restarted at once, then after ``restart_first_s``, twice that, and so on up to ``restart_longest_s``;
    after ``restarts_max`` restarts it is failed, and its room is free. A failed one is planned anew after ``retry_first_s``,
    the next of its model after twice that, and so on up to ``retry_longest_s``. A life that was ready for ``healthy_s`` sets
    both counts back.

    ``scale_up_after_s``: requests wait so long while every ready instance is full before another instance is started.
    ``evict_idle_s``: an instance idle for so long gives its place to a model whose requests wait for one;
    ``evict_look_s``: how often such a model is looked at again.

    ``keep_alive_per_reload``: a model whose spec names no keep-alive keeps an idle instance for so many times what its reload
    would take, but ``keep_alive_least_s`` at least and ``keep_alive_most_s`` at most. ``heat_s``: calls of a model count for
    its demand for about so long. ``unserved_s``: an instance that no request has reached yet is not evicted so long.
    ``age_s``: a model whose requests have waited so long for room is given the first that appears, before any other.
    ``remote``: the URL that checkpoints are published to, and fetched from, where no other is named.
    ``prefetch_every_s``: how often deployed checkpoints are brought from idle disks into free DRAM ahead of need; 0 is never.

    The KV cache of an instance whose spec says nothing: see sllmctl.planner.memory. ``kv_sequence_tokens`` times
    ``kv_sequences`` tokens are wanted, ``kv_least_tokens`` (or the model's context, if shorter) are the least. A place whose
    cache is short costs a plan the missing part times ``kv_short_s``.

    A start that fetches from a remote costs a plan ``fetch_cost_s`` beside its time, since it takes room on a disk; one on a
    node where the model was just given up costs ``failed_cost_s``, since it may fail there again.
    The bandwidths, ``start_base_s`` (a worker without its weights), ``import_s`` (what a node imports before its first
    worker), ``prefill_token_s`` and ``prefill_base_s`` (recomputing a sequence: per token, and once) and ``scale_up_after_s``
    are assumed until a node has measured, or experience told, better.
    ``events_keep``, ``outcomes_keep``, ``decisions_keep``: older events, estimates with their outcomes, and decisions are cut.
    ``plan_candidates``: how many candidates a plan remembers. ``plan_nodes``: of nodes that differ in nothing but room and
    queues, so many are looked at for one plan, the roomiest first.
    """

    local_node: str = "local"
    unreachable_grace_s: _Seconds = 60.0
    start_timeout_s: _Seconds = 600.0
    fetch_timeout_s: _Seconds = 3600.0
    drain_s: _Seconds = 30.0
    drain_longest_s: _Seconds = 300.0
    room_timeout_s: Annotated[float, Meta(gt=0, le=86400)] = 400.0
    stop_timeout_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    ingest_timeout_s: _Seconds = 6 * 3600.0
    drop_retry_s: _Seconds = 1.0
    drop_attempts: _Count = 10
    reply_timeout_s: _Seconds = 30.0
    restart_first_s: _Seconds = 1.0
    restart_longest_s: _Seconds = 60.0
    restarts_max: Annotated[int, Meta(ge=0)] = 5
    retry_first_s: Annotated[float, Meta(gt=0, le=86400)] = 60.0
    retry_longest_s: Annotated[float, Meta(gt=0, le=86400)] = 1800.0
    healthy_s: _Seconds = 60.0
    scale_up_after_s: _Seconds = 1.0
    evict_idle_s: _Seconds = 1.0
    evict_look_s: Annotated[float, Meta(gt=0, le=3600)] = 0.5
    keep_alive_per_reload: Annotated[float, Meta(ge=0, le=1e6)] = 60.0
    keep_alive_least_s: _Seconds = 30.0
    keep_alive_most_s: _Seconds = 3600.0
    heat_s: Annotated[float, Meta(gt=0, le=86400 * 30)] = 600.0
    unserved_s: _Seconds = 10.0
    age_s: _Seconds = 15.0
    prefetch_every_s: _Seconds = 2.0
    remote: str = ""
    kv_short_s: _Seconds = 2.0
    kv_sequence_tokens: _Count = 4096
    kv_sequences: _Count = 8
    kv_least_tokens: _Count = 2048
    disk_read_bps: _Positive = 1e9
    device_copy_bps: _Positive = 10e9
    network_bps: _Positive = 0.25e9
    fetch_cost_s: _Seconds = 1.0
    failed_cost_s: _Seconds = 30.0
    start_base_s: _Seconds = 0.5
    import_s: _Seconds = 5.0
    prefill_token_s: _Positive = 1e-3
    prefill_base_s: _Seconds = 0.05
    events_keep: _Count = 10_000
    outcomes_keep: _Count = 10_000
    decisions_keep: _Count = 10_000
    plan_candidates: _Count = 3
    plan_nodes: _Count = 64
