"""What a scenario must be besides well-formed: no contradictions, and room for every model. Names the place and the reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import msgspec

from schema.spec import ModelSpec
from sllmctl.cluster.settings import ControlSettings
from sllmctl.simulate.parts import Lengths, ModelGroup, NodeGroup, Scenario, Workload
from sllmctl.simulate.trace import LONGEST_S, read_counts, read_trace

__all__ = ["Fault", "check", "least_kv_bytes"]

_LEAST_CV, _MOST_CV = 0.01, 100.0
"""Of times between arrivals: beyond these, Gamma draws lose their precision."""
_MOST_MODELS = 1_000_000
_MOST_DEVICES = 1_000_000


class Fault(Exception):
    """The key at fault, dotted, and the reason."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


def check(scenario: Scenario) -> None:
    """Raises Fault for the first thing that is wrong, InvalidInput for what is wrong in a trace it names."""
    for key, groups in (("nodes", scenario.nodes), ("models", scenario.models), ("policies", scenario.policies)):
        if not groups:
            raise Fault(key, "there must be at least one")
    _names("nodes", ((f"nodes[{n}].name", group.name) for n, group in enumerate(scenario.nodes)))
    _names("models", ((f"models[{n}].name", group.name) for n, group in enumerate(scenario.models)))
    _names("policies", ((f"policies[{n}]", name) for n, name in enumerate(scenario.policies)))
    settings = _settings(scenario)
    if sum(group.count for group in scenario.models) > _MOST_MODELS:
        raise Fault("models", f"more than {_MOST_MODELS} models in all")
    if sum(group.count * group.devices for group in scenario.nodes) > _MOST_DEVICES:
        raise Fault("nodes", f"more than {_MOST_DEVICES} devices in all")
    for number, group in enumerate(scenario.models):
        for key, reason in _model_faults(group, scenario.nodes, settings):
            raise Fault(f"models[{number}].{key}" if key else f"models[{number}]", reason)
    _check_dram(scenario)
    _check_workload(scenario)


def _names(what: str, named: Iterable[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for key, name in named:
        if name in seen:
            raise Fault(key, f"{name!r} is already {seen[name]}; each of the {what} needs a name of its own")
        if not name:
            raise Fault(key, "an empty name")
        seen[name] = key


def _settings(scenario: Scenario) -> ControlSettings:
    try:
        return msgspec.convert(scenario.control, ControlSettings)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        raise Fault(f"control{place.rstrip('`')}", f"{reason}; see sllmctl.cluster.settings for what can be set") from error


def least_kv_bytes(group: ModelGroup, settings: ControlSettings) -> int:
    """What the KV cache of an instance takes on each device at the least, by the rule of sllmctl.planner.memory."""
    if group.kv_bytes is not None:
        return group.kv_bytes
    tokens = min(group.max_context_tokens, settings.kv_least_tokens)
    return tokens * -(-group.kv_token_bytes // group.devices)


def _model_faults(group: ModelGroup, nodes: tuple[NodeGroup, ...], settings: ControlSettings) -> Iterator[tuple[str, str]]:
    try:
        name = f"{group.name}-{group.count - 1:05d}"
        msgspec.convert({"name": name, "source": {"kind": "path", "path": "/"}}, ModelSpec)
    except msgspec.ValidationError:
        yield "name", f"{name!r}, which it makes, is no name for a model: letters, digits, '.', '_' and '-', 63 at most"
    machines = sum(node.count for node in nodes)
    for key, copies in (("on_disk", group.on_disk or 0), ("in_dram", group.in_dram)):
        if copies > machines:
            yield key, f"on {copies} nodes, but there are only {machines}"
    if group.min_instances > group.max_instances:
        yield "min_instances", f"{group.min_instances} are more than max_instances ({group.max_instances})"
    reasons = [f"{node.name}: {reason}" for node in nodes if (reason := _misfit(group, node, settings)) is not None]
    if len(reasons) == len(nodes):
        yield "", f"{group.name} fits on no node ({'; '.join(reasons)})"


def _misfit(group: ModelGroup, node: NodeGroup, settings: ControlSettings) -> str | None:
    """Why an empty node of this kind cannot run an instance, None if it can."""
    if group.devices > node.devices:
        return f"an instance spans {group.devices} devices, the node has {node.devices}"
    # On a CPU the weights are used where the arena holds them; a device has a share of them besides.
    share = 0 if node.device_kind == "cpu" else -(-group.weights_bytes // group.devices)
    kv_bytes = least_kv_bytes(group, settings)
    if share + kv_bytes > node.device_bytes:
        return (
            f"{_size(share)} of weights and at least {_size(kv_bytes)} of KV cache on each of {group.devices} devices,"
            f" device_bytes is {_size(node.device_bytes)}"
        )
    if group.weights_bytes > node.dram_bytes:
        return f"weights of {_size(group.weights_bytes)} pass through DRAM whole, dram_bytes is {_size(node.dram_bytes)}"
    return None


def _size(count: float) -> str:
    return f"{count / 1e9:.4g} GB"


def _check_dram(scenario: Scenario) -> None:
    """What lies in DRAM at the beginning must fit there, all of it and one by one."""
    total = sum(node.count * node.dram_bytes for node in scenario.nodes)
    asked = 0
    for number, group in enumerate(scenario.models):
        asked += group.count * group.in_dram * group.weights_bytes
        if asked > total:
            raise Fault(f"models[{number}].in_dram", f"{_size(asked)} in DRAM at the beginning, all nodes have {_size(total)}")
        roomy = sum(node.count for node in scenario.nodes if node.dram_bytes >= group.weights_bytes)
        if group.in_dram > roomy:
            raise Fault(f"models[{number}].in_dram", f"in the DRAM of {group.in_dram} nodes, but only {roomy} can hold it")


def _check_workload(scenario: Scenario) -> None:
    workload = scenario.workload
    if workload.trace is not None and workload.counts is not None:
        raise Fault("workload.counts", "there is a trace already; give one of trace, counts and rate")
    if workload.trace is None and workload.counts is None and workload.rate is None:
        raise Fault("workload", "give one of rate, trace and counts")
    if workload.trace is not None:
        _check_unused(workload, "trace", ("rate", "input_tokens", "output_tokens", "cv", "per_model", "popularity"))
        for _ in read_trace(workload.trace, scenario.contexts()):
            pass
        return
    for key, lengths in (("input_tokens", workload.input_tokens), ("output_tokens", workload.output_tokens)):
        if lengths is None:
            raise Fault(f"workload.{key}", "is missing: without a trace the lengths must be stated")
        _check_lengths(f"workload.{key}", lengths)
    assert workload.input_tokens is not None
    assert workload.output_tokens is not None
    most = workload.input_tokens.most + workload.output_tokens.most
    for number, group in enumerate(scenario.models):
        if most > group.max_context_tokens:
            raise Fault(
                f"models[{number}].max_context_tokens",
                f"{group.max_context_tokens} tokens, but workload.input_tokens.most and output_tokens.most are {most} together",
            )
    if workload.counts is not None:
        _check_unused(workload, "counts", ("cv", "per_model", "popularity"))
        read_counts(workload.counts)
        return
    if workload.requests is None and workload.duration_s is None:
        raise Fault("workload", "has no end: give requests or duration_s")
    assert workload.rate is not None
    lasts_s = min(
        math.inf if workload.duration_s is None else workload.duration_s,
        math.inf if workload.requests is None else workload.requests / workload.rate,
    )
    if lasts_s > LONGEST_S:
        raise Fault("workload", f"requests come for {lasts_s / 86400:,.0f} days; at most {LONGEST_S / 86400:.0f} are simulated")
    if not _LEAST_CV <= workload.cv <= _MOST_CV:
        raise Fault("workload.cv", f"{workload.cv:g} is not from {_LEAST_CV:g} to {_MOST_CV:g}")


def _check_unused(workload: Workload, source: str, keys: tuple[str, ...]) -> None:
    usual = Workload()
    for key in keys:
        if getattr(workload, key) != getattr(usual, key):
            raise Fault(f"workload.{key}", f"has no effect beside workload.{source}, which says it already; leave it out")


def _check_lengths(key: str, lengths: Lengths) -> None:
    if lengths.least > lengths.most:
        raise Fault(f"{key}.least", f"{lengths.least} is above most ({lengths.most})")
    if not lengths.least <= lengths.mean <= lengths.most:
        raise Fault(f"{key}.mean", f"{lengths.mean:g} is not within least and most ({lengths.least} to {lengths.most})")
