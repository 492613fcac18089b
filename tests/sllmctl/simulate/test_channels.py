"""Loads over shared channels against a twin that moves small chunks in small steps of time."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from sllmctl.simulate.channels import Channel, transfer


@dataclass
class Load:
    """When it begins, and which channels it runs through, each with its bytes there."""

    at: float
    path: list[tuple[int, float]]
    left: float = 1.0
    end: float = 0.0


def in_small_steps(speeds: list[float], loads: list[Load], step_s: float) -> None:
    """In every step each load, the earliest first, moves as much as all channels of its path have left."""
    step = 0
    while any(load.left > 0 for load in loads):
        now = step * step_s
        room = [bps * step_s for bps in speeds]
        for load in loads:
            if load.at > now or load.left <= 0:
                continue
            part = min(load.left, *(room[channel] / size for channel, size in load.path))
            for channel, size in load.path:
                room[channel] -= part * size
            load.left -= part
            if load.left <= 1e-12:
                load.left, load.end = 0.0, now + step_s
        step += 1


@pytest.mark.parametrize("seed", range(20))
def test_loads_end_when_their_chunks_are_through(seed: int) -> None:
    random = Random(seed)
    speeds = [random.choice([1.0, 4.0, 20.0]) * 1e9 for _ in range(5)]
    step_s = 0.002
    loads = [
        Load(
            random.randrange(2000) * step_s,
            [(channel, random.uniform(0.5, 4) * 1e9) for channel in random.sample(range(5), random.randint(1, 3))],
        )
        for _ in range(12)
    ]
    loads.sort(key=lambda load: load.at)
    channels = [Channel(bps) for bps in speeds]
    ends = [transfer([(channels[channel], size) for channel, size in load.path], load.at) for load in loads]
    in_small_steps(speeds, loads, step_s)
    # A chunk that spans two steps is late by one at most, on each channel and for each load before it.
    for load, end in zip(loads, ends, strict=True):
        assert end == pytest.approx(load.end, abs=step_s * 30), seed


def test_an_idle_path_goes_at_its_slowest_part() -> None:
    disk, link = Channel(5e9), Channel(20e9)
    assert transfer([(disk, 10e9), (link, 10e9)], 3.0) == pytest.approx(5.0)


def test_a_second_load_waits_for_the_disk_but_uses_what_is_left_of_the_link() -> None:
    disk, link = Channel(5e9), Channel(20e9)
    assert transfer([(disk, 10e9), (link, 10e9)], 0.0) == pytest.approx(2.0)
    assert transfer([(link, 15e9)], 0.0) == pytest.approx(1.0)
    assert transfer([(disk, 10e9)], 0.0) == pytest.approx(4.0)


def test_nothing_to_load_takes_no_time() -> None:
    assert transfer([], 7.0) == 7.0
    assert transfer([(Channel(1.0), 0.0)], 7.0) == 7.0
