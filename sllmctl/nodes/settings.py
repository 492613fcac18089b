"""The waits and bounds of everything that reaches a node."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["AssetSettings", "LinkSettings", "LocalSettings"]

_Seconds = Annotated[float, Meta(ge=0)]
_Count = Annotated[int, Meta(ge=1)]


class LinkSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Links to agents.

    ``dial_timeout_s``: until connected; ``truth_timeout_s``: from there until the truth is complete (an agent may wait
    for its own processes first). ``heartbeat_s``: a link is asked for a sign of life so often; ``heartbeat_timeout_s``: one
    silent for so long is closed. ``redial_first_s`` to ``redial_longest_s``: the back-off, jittered; ``redial_local_s``
    is the longest for the agent of this machine. ``refused_retry_s``: between dials
    while an agent refuses this manager. ``unreachable_after_s``: dialling in vain for so long is told to the control loop.
    ``read_file_timeout_s``: for each part of a file; ``max_file_bytes``: a larger text asset is refused.
    ``max_unsent_bytes``: a node that lets more pile up is taken for dead.
    """

    dial_timeout_s: _Seconds = 5.0
    truth_timeout_s: _Seconds = 60.0
    heartbeat_s: _Seconds = 2.0
    heartbeat_timeout_s: _Seconds = 10.0
    redial_first_s: _Seconds = 0.01
    redial_longest_s: _Seconds = 1.0
    redial_local_s: _Seconds = 0.05
    refused_retry_s: _Seconds = 5.0
    unreachable_after_s: _Seconds = 10.0
    read_file_timeout_s: _Seconds = 10.0
    max_file_bytes: _Count = 128 << 20
    max_unsent_bytes: _Count = 256 << 20


class LocalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The agent process of this machine.

    ``respawn_first_s`` to ``respawn_longest_s``: the back-off between spawns of an agent that keeps dying;
    ``stable_s``: one that lived so long is made again at once. ``poll_s``: how often a shutdown looks whether it is over.
    ``kill_timeout_s``: how long killed processes may take to be gone.
    """

    respawn_first_s: _Seconds = 0.2
    respawn_longest_s: _Seconds = 10.0
    stable_s: _Seconds = 10.0
    poll_s: _Seconds = 0.02
    kill_timeout_s: _Seconds = 5.0


class AssetSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Text assets of checkpoints. One fetch tries every known holder up to ``rounds`` times, ``retry_first_s`` to
    ``retry_longest_s`` apart."""

    rounds: _Count = 8
    retry_first_s: _Seconds = 0.05
    retry_longest_s: _Seconds = 5.0
