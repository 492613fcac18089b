"""What a simulation leaves behind: one entry per request in flat arrays, and counts of what the cluster did."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Record"]


def _doubles() -> array[float]:
    return array("d")


@dataclass(slots=True)
class Record:
    """Entry i of each array is the i-th request in order of arrival; times in seconds, NaN for what never happened.

    ``startup_s``: from arrival until a ready instance took it, plus every later time in which it stood still because it was
    preempted or moved. ``first_token_s``: until its first token; ``ended_s``: until its last; ``failed``: 1 if it ended with an
    error, counted by code in ``faults``. ``cold``: 1 if it waited for a start.

    ``loads`` counts starts by where their weights came from (device, dram, disk, peer, remote); ``device_busy_s`` is the time
    devices computed, ``device_held_s`` the time they were promised to instances, summed over devices.
    """

    scenario: str
    policy: str
    seed: int
    arrived_at: array[float] = field(default_factory=_doubles)
    model: array[int] = field(default_factory=lambda: array("l"))
    startup_s: array[float] = field(default_factory=_doubles)
    first_token_s: array[float] = field(default_factory=_doubles)
    ended_s: array[float] = field(default_factory=_doubles)
    failed: array[int] = field(default_factory=lambda: array("b"))
    cold: array[int] = field(default_factory=lambda: array("b"))
    faults: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    migrations: int = 0
    preemptions: int = 0
    evictions: int = 0
    starts: int = 0
    device_busy_s: float = 0.0
    device_held_s: float = 0.0
    simulated_s: float = 0.0
    wall_s: float = 0.0
    events: int = 0
