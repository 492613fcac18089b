"""Worlds that are closed when their test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.sllmctl.control.world import Agent, World

MakeWorld = Callable[..., World]


@pytest.fixture
def make_world() -> Iterator[MakeWorld]:
    worlds: list[World] = []

    def make(*agents: Agent, **means: Any) -> World:
        worlds.append(World(*agents, **means))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    """One connected node, on which two instances of 10 MiB fit."""
    world = make_world(Agent("local"))
    world.connect("local")
    return world
