"""Worlds that are closed when their test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sllmctl.planner.interface import Abilities
from tests.sllmctl.control.scripted import MODELS, SETTINGS, ScriptedPlanner
from tests.sllmctl.control.world import Agent, World, spec

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


@pytest.fixture
def scripted(make_world: MakeWorld) -> Callable[..., tuple[World, ScriptedPlanner]]:
    """Nodes n1, n2... as given, the models a, b and c deployed, and a planner that does what it is told."""

    def make(*agents: Agent, most: int = 1, keep_alive_s: float = 1000.0) -> tuple[World, ScriptedPlanner]:
        planner = ScriptedPlanner()
        world = make_world(
            *agents,
            settings=SETTINGS,
            abilities=Abilities(migrate=True, fetch=True),
            planner=planner,
        )
        for agent in agents:
            world.connect(agent.name)
        for model in MODELS:
            world.serve(spec(model, node=agents[0].name, most=most, keep_alive_s=keep_alive_s))
        return world, planner

    return make
