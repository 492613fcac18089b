"""What a cluster is at its beginning, by its scenario and policy: settings, models and their specs, what lies where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from random import Random
from typing import Any

import msgspec

from schema.errors import InvalidInput
from schema.spec import EngineSpec, ModelSpec, PathSource, ScaleSpec
from schema.states import ModelState, NodeState, Tier
from sllmctl.cluster.records import Model, Node
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.simulate.policies import Policy
from sllmctl.simulate.scenario import Scenario
from sllmctl.simulate.store import SimModel, Store

__all__ = ["fill_view", "models_of", "place", "settings_of"]


def settings_of(scenario: Scenario, policy: Policy) -> ControlSettings:
    """The policy's settings over the scenario's over the defaults; the network's speed, which no node measures, is set as its
    operator would. Raises InvalidInput for what they are not."""
    network_bps = min(group.network_bps for group in scenario.nodes)
    chosen: dict[str, Any] = {"network_bps": network_bps, **scenario.control, **policy.control}
    try:
        return msgspec.convert(chosen, ControlSettings)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"scenario {scenario.name!r}, control, with policy {policy.name!r}: {error}", "control") from error


def models_of(scenario: Scenario) -> dict[str, SimModel]:
    """Every model of every group, by name."""
    groups = [group for group in scenario.models for _ in range(group.count)]
    named = enumerate(zip(scenario.model_names(), groups, strict=True))
    return {name: SimModel(index, name, sha256(name.encode()).hexdigest(), group) for index, (name, group) in named}


def place(scenario: Scenario, models: Mapping[str, SimModel], stores: Mapping[str, Store]) -> None:
    """Lay checkpoints on disks and in DRAM. The nodes are drawn for each model, for DRAM those first that have it on disk."""
    random = Random(f"{scenario.seed} placement")  # noqa: S311 - to be drawn again, not to be secret
    names = list(stores)
    for model in models.values():
        group = model.group
        count = len(names) if group.on_disk is None else min(group.on_disk, len(names))
        chosen = names if count == len(names) else sorted(random.sample(names, count))
        for name in chosen:
            stores[name].place(model.digest, Tier.DISK)
        left = group.in_dram
        on_disk = set(chosen)
        for name in sorted(random.sample(names, len(names)), key=lambda name: name not in on_disk) if left else ():
            arena = stores[name].arena
            if left and arena.used_bytes + group.weights_bytes <= arena.budget_bytes:
                stores[name].place(model.digest, Tier.DRAM)
                left -= 1


def fill_view(
    view: ClusterView, scenario: Scenario, policy: Policy, models: Mapping[str, SimModel], nodes: Iterable[str]
) -> None:
    """All nodes, not connected yet, and all models, deployed."""
    for name in nodes:
        view.add_node(Node(name, name, "simulated", NodeState.JOINING, False, 0.0, 0.0))
    smallest = {
        group.devices: min((int(node.device_bytes) for node in scenario.nodes if node.devices >= group.devices), default=0)
        for group in scenario.models
    }
    for model in models.values():
        spec = _spec(scenario, policy, model, smallest[model.group.devices])
        view.add_model(Model(spec, ModelState.DEPLOYED, model.digest, None, None, None, 0.0, 0.0))


def _spec(scenario: Scenario, policy: Policy, model: SimModel, device_bytes: int) -> ModelSpec:
    """``device_bytes``: of the smallest device that may hold it, since an exclusive instance takes all of that."""
    group = model.group
    kv_bytes = group.kv_bytes
    if policy.exclusive:
        kv_bytes = device_bytes - model.share_bytes
    scale = ScaleSpec(
        min=group.min_instances,
        max=group.max_instances,
        keep_alive_s=group.keep_alive_s,
        max_concurrency=group.max_concurrency if policy.batching else 1,
        queue_limit=1_000_000,
    )
    return ModelSpec(
        name=model.name,
        source=PathSource(f"/models/{model.name}"),
        devices=group.devices,
        scale=scale,
        engine=EngineSpec(kv_bytes=kv_bytes),
        cold_start_timeout_s=scenario.timeout_s,
    )
