"""ServerlessLLM's deployment files: what they mean here, and that all else of them is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from schema.spec import EngineSpec, HubSource, ModelSpec, PathSource, ScaleSpec
from sllmctl.specs.files import Entry, InvalidSpecs, read_specs

_FILE: dict[str, Any] = {
    "model": "facebook/opt-1.3b",
    "backend": "transformers",
    "num_gpus": 1,
    "auto_scaling_config": {"metric": "concurrency", "target": 1, "min_instances": 0, "max_instances": 10, "keep_alive": 30},
    "placement_config": {"target_nodes": ["1"]},
    "backend_config": {
        "pretrained_model_name_or_path": "facebook/opt-1.3b",
        "device_map": "auto",
        "torch_dtype": "float16",
        "hf_model_class": "AutoModelForCausalLM",
        "max_model_len": 2048,
        "swap_space": 4,
    },
}


def _read(tmp_path: Path, value: dict[str, Any]) -> Entry:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(value, indent=2))
    (entry,) = read_specs([str(file)])
    return entry


def test_what_means_the_same_is_taken_and_the_rest_is_named_with_why(tmp_path: Path) -> None:
    entry = _read(tmp_path, _FILE)
    assert entry.spec == ModelSpec(
        name="opt-1.3b",
        source=HubSource("facebook/opt-1.3b"),
        scale=ScaleSpec(min=0, max=10, keep_alive_s=30),
        engine=EngineSpec(max_context_tokens=2048),
    )
    told = [note.removeprefix(f"{tmp_path}/config.json:") for note in entry.notes]
    assert [note.split(": ")[1] for note in told] == [
        "model",
        "backend",
        "auto_scaling_config.target",
        "placement_config",
        "backend_config.device_map",
        "backend_config.torch_dtype",
        "backend_config.hf_model_class",
        "backend_config.swap_space",
    ]
    assert told[0] == "2: model: a name has no '/': requests call it 'opt-1.3b' here"
    assert told[-1] == "23: backend_config.swap_space: the engine is sllmctl's own"


def test_what_is_left_out_is_as_its_defaults_have_it(tmp_path: Path) -> None:
    entry = _read(tmp_path, {"model": "tiny", "backend_config": {"pretrained_model_name_or_path": "/models/tiny"}})
    scale = ScaleSpec(min=0, max=10, keep_alive_s=0)
    assert (entry.spec, entry.notes) == (ModelSpec(name="tiny", source=PathSource("/models/tiny"), scale=scale), ())
    assert entry.place("source.path") == f"{tmp_path}/config.json:4"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": 3}, "2: model: expected a model of the hub"),
        ({"num_gpus": "two"}, "4: num_gpus (devices here): expected int, got str 'two'"),
        ({"auto_scaling_config": {"min_instances": -1}}, "6: auto_scaling_config.min_instances (scale.min here): expected"),
        ({"auto_scaling_config": 3}, "5: auto_scaling_config: expected a mapping"),
        (
            {"backend_config": {"pretrained_model_name_or_path": "opt"}},
            "18: backend_config.pretrained_model_name_or_path (source.repo here): expected ORGANISATION/NAME",
        ),
        ({"model": "opt", "backend_config": {}}, "2: model (source.repo here): expected ORGANISATION/NAME"),
        ({"model": ".."}, "2: model (name here): expected 1 to 63 letters"),
        ({"ft_backend": "peft_lora"}, "25: ft_backend: this describes a fine-tuning job"),
    ],
)
def test_what_is_wrong_names_the_line_it_stands_on(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpecs) as caught:
        _read(tmp_path, _FILE | change)
    assert str(caught.value).removeprefix(f"{tmp_path}/config.json:").startswith(said)


def test_of_two_lengths_of_the_context_the_first_is_taken_and_the_other_named(tmp_path: Path) -> None:
    entry = _read(tmp_path, {"model": "o/m", "backend_config": {"max_model_len": 1024, "context_length": 2048}})
    assert entry.spec.engine.max_context_tokens == 1024
    assert entry.notes[-1].endswith("backend_config.context_length: backend_config.max_model_len says it")


def test_another_metric_is_named(tmp_path: Path) -> None:
    entry = _read(tmp_path, {"model": "o/m", "auto_scaling_config": {"metric": "cpu"}})
    assert "auto_scaling_config.metric: 'cpu' is not measured" in entry.notes[1]
