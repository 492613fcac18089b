"""Scenarios from files: what is read, and what is refused with its place and reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from schema.errors import InvalidInput, NotFound
from sllmctl.simulate.scenario import load_scenario, override, shipped_scenarios
from sllmctl.simulate.sizes import read_bytes, read_rate, read_seconds

Edit = Callable[[dict[str, Any]], object]


def small() -> dict[str, Any]:
    return {
        "name": "small",
        "nodes": [
            {
                "name": "a",
                "count": 2,
                "devices": 2,
                "device_bytes": "48 GB",
                "device_bps": "25 GB/s",
                "dram_bytes": "64 GiB",
                "disk_bps": 6e9,
                "network_bps": "10 Gbps",
            }
        ],
        "models": [
            {
                "name": "m",
                "count": 3,
                "weights_bytes": "13.32 GB",
                "kv_token_bytes": 524288,
                "speed": {"prefill_base_s": 0.03, "prefill_token_s": "0.2 ms", "decode_step_s": "30 ms"},
            }
        ],
        "workload": {
            "rate": 1.5,
            "requests": 10,
            "input_tokens": {"mean": 50, "cv": 0.5, "most": 100},
            "output_tokens": {"mean": 50, "cv": 0.5, "most": 100},
        },
    }


def load(folder: Path, value: Any) -> Any:
    path = folder / "small.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return load_scenario(path)


def test_units_become_bytes_and_seconds(tmp_path: Path) -> None:
    scenario = load(tmp_path, small())
    node, model = scenario.nodes[0], scenario.models[0]
    assert (node.device_bytes, node.device_bps, node.dram_bytes) == (48e9, 25e9, 64 << 30)
    assert (node.disk_bps, node.network_bps) == (6e9, 1.25e9)
    assert (model.weights_bytes, model.speed.prefill_token_s, model.speed.decode_step_s) == (13_320_000_000, 0.2e-3, 0.03)
    assert scenario.model_names() == ["m-00000", "m-00001", "m-00002"]
    assert scenario.contexts() == {"m-00000": 2048, "m-00001": 2048, "m-00002": 2048}


@pytest.mark.parametrize(
    ("text", "read", "value"),
    [
        ("48 GB", read_bytes, 48 * 10**9),
        ("512GiB", read_bytes, 512 << 30),
        ("1.5 kB", read_bytes, 1500),
        ("7", read_bytes, 7),
        ("1e9", read_bytes, 10**9),
        ("12 GB/s", read_rate, 12 * 10**9),
        ("10 Gbps", read_rate, 1_250_000_000),
        ("8 Mbit/s", read_rate, 1_000_000),
        ("3 ms", read_seconds, 0.003),
        ("2 h", read_seconds, 7200.0),
        ("1.26 us", read_seconds, pytest.approx(1.26e-6)),
    ],
)
def test_units(text: str, read: Callable[[str], float], value: float) -> None:
    assert read(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-3 GB", "3 gb", "3 GB/s", "1e999 GB", "3 4 GB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        read_bytes(text)


def put(*path: Any) -> Edit:
    *parents, last, value = path

    def edit(scenario: dict[str, Any]) -> None:
        at: Any = scenario
        for step in parents:
            at = at[step]
        at[last] = value

    return edit


BAD = [
    (put("nodes", 0, "device_bytse", 1), "nodes[0]", "device_bytse"),
    (put("nodes", 0, "device_bytes", "48 XB"), "nodes[0].device_bytes", "unit 'XB'"),
    (put("nodes", 0, "device_bytes", -1), "nodes[0].device_bytes", "> 0"),
    (put("nodes", 0, "count", 0), "nodes[0].count", ">= 1"),
    (put("nodes", 0, "disk_bps", float("inf")), "nodes[0].disk_bps", "inf"),
    (put("nodes", []), "nodes", "at least one"),
    (put("models", []), "models", "at least one"),
    (put("policies", []), "policies", "at least one"),
    (put("policies", ["a", "a"]), "policies[1]", "already policies[0]"),
    (put("nodes", [small()["nodes"][0]] * 2), "nodes[1].name", "already nodes[0].name"),
    (put("models", [small()["models"][0]] * 2), "models[1].name", "already models[0].name"),
    (put("models", 0, "name", "no/slash"), "models[0].name", "no name for a model"),
    (put("models", 0, "name", "m" * 60), "models[0].name", "63 at most"),
    (put("models", 0, "count", 10**9), "models", "models in all"),
    (put("models", 0, "weights_bytes", "48 GB"), "models[0]", "KV cache on each of 1 devices, device_bytes is 48 GB"),
    (put("models", 0, "kv_bytes", "40 GB"), "models[0]", "fits on no node"),
    (put("nodes", 0, "dram_bytes", "13 GB"), "models[0]", "pass through DRAM whole"),
    (put("models", 0, "devices", 3), "models[0]", "spans 3 devices, the node has 2"),
    (put("models", 0, "on_disk", 3), "models[0].on_disk", "only 2"),
    (put("models", 0, "in_dram", 3), "models[0].in_dram", "only 2"),
    (put("models", 0, "min_instances", 65), "models[0].min_instances", "max_instances (64)"),
    (put("models", 0, "max_context_tokens", 199), "models[0].max_context_tokens", "200 together"),
    (put("models", 0, "speed", "decode_step_s", 0), "models[0].speed.decode_step_s", "> 0"),
    (put("workload", "rate", -1), "workload.rate", "> 0"),
    (put("workload", "rate", None), "workload", "one of rate, trace and counts"),
    (put("workload", "requests", None), "workload", "has no end"),
    (put("workload", "cv", 1000), "workload.cv", "not from 0.01 to 100"),
    (put("workload", "input_tokens", None), "workload.input_tokens", "must be stated"),
    (put("workload", "output_tokens", "least", 101), "workload.output_tokens.least", "above most (100)"),
    (put("workload", "output_tokens", "mean", 101), "workload.output_tokens.mean", "not within"),
    (put("workload", "trace", "gone.csv"), "workload.trace", "no file gone.csv"),
    (put("workload", "trace", "example.csv"), "workload.rate", "no effect beside workload.trace"),
    (put("workload", "counts", "../x.csv"), "workload.counts", "no file"),
    (put("timeout_s", 0), "timeout_s", "> 0"),
    (put("control", {"age": 1}), "control", "unknown field `age`"),
    (put("control", {"age_s": -1}), "control.age_s", ">= 0"),
]


@pytest.mark.parametrize(("edit", "key", "reason"), BAD, ids=[f"{key}: {reason}" for _, key, reason in BAD])
def test_bad_scenarios_are_refused_with_place_and_reason(tmp_path: Path, edit: Edit, key: str, reason: str) -> None:
    value = small()
    edit(value)
    with pytest.raises(InvalidInput) as caught:
        load(tmp_path, value)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'small.yaml'}: {key}: ") or caught.value.param is None, message
    assert reason in message


def test_checkpoints_in_dram_must_fit_there(tmp_path: Path) -> None:
    value = small()
    value["models"][0] |= {"count": 11, "in_dram": 1}
    with pytest.raises(
        InvalidInput, match=r"models\[0\]\.in_dram: 146\.5 GB in DRAM at the beginning, all nodes have 137\.4 GB"
    ):
        load(tmp_path, value)


def test_a_cpu_holds_its_weights_in_dram_alone(tmp_path: Path) -> None:
    value = small()
    value["nodes"][0] |= {"device_kind": "cpu", "device_bytes": "2 GB"}
    assert load(tmp_path, value).nodes[0].device_kind == "cpu"
    value["nodes"][0]["device_bytes"] = "1 GB"
    with pytest.raises(InvalidInput, match=r"0 GB of weights and at least 1\.074 GB of KV cache"):
        load(tmp_path, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", r"small\.yaml:\d+: not YAML"),
        ("name: a\nname: b\n", r"small\.yaml:2: not YAML: 'name' is given twice"),
        ("[\n" * 5000, r"small\.yaml: too deeply nested"),
        ("- a\n", r"small\.yaml: Expected `object`, got `array`"),
        ("", r"small\.yaml: Expected `object`, got `null`"),
        ("name: a\n", r"missing required field `nodes`"),
    ],
)
def test_files_that_are_no_scenarios(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load(tmp_path, text)


def test_an_unknown_name_is_answered_with_the_known(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"opt-6\.7b-gsm8k"):
        load_scenario(str(tmp_path / "none"))


@pytest.mark.parametrize("name", shipped_scenarios())
def test_shipped_scenarios_load_under_their_own_names(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.description
    assert override(scenario, []) == scenario


def test_the_paper_s_test_beds_are_there() -> None:
    for size, count, devices in (("6.7b", 32, 1), ("13b", 16, 1), ("30b", 8, 2)):
        for lengths in ("gsm8k", "sharegpt"):
            scenario = load_scenario(f"opt-{size}-{lengths}")
            assert sum(node.count * node.devices for node in scenario.nodes) == 16
            assert [(group.count, group.devices) for group in scenario.models] == [(count, devices)]
            assert (scenario.workload.cv, scenario.timeout_s) == (8, 300)


def test_assignments_are_made_and_checked_like_a_file() -> None:
    scenario = load_scenario("demo")
    changed = override(
        scenario,
        ["workload.rate=1.4", "models[0].count=64", "nodes[0].dram_bytes=1 TB", "control.age_s=3 s", "policies=[a, b]"],
    )
    assert (changed.workload.rate, changed.models[0].count, changed.nodes[0].dram_bytes) == (1.4, 64, 10**12)
    assert (changed.control, changed.policies) == ({"age_s": 3}, ("a", "b"))
    back = msgspec.structs.replace(
        changed,
        workload=scenario.workload,
        models=scenario.models,
        nodes=scenario.nodes,
        control=scenario.control,
        policies=scenario.policies,
    )
    assert back == scenario


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("workload.rate", "no assignment"),
        ("=1", "is no key"),
        ("workload..rate=1", "is no key"),
        ("models[0.count=1", "is no key"),
        ("models[7].count=1", r"\[7\] is beyond the end, there are 1"),
        ("workload[0]=1", "no list"),
        ("workload.rate.x=1", "nothing to take .x of"),
        ("workload.rate=[", "not YAML"),
        ("workload.rate=-1", "demo with workload.rate=-1: workload.rate: Expected"),
        ("workload.speed=1", "demo with workload.speed=1: workload: .*unknown field `speed`"),
        ("models[0].weights_bytes=49 GB", "fits on no node"),
        ("control.age=1", "unknown field `age`"),
        ("workload.trace=none.csv", "there is no file none.csv"),
    ],
)
def test_bad_assignments(assignment: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        override(load_scenario("demo"), [assignment])
