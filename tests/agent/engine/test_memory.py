"""An instance's memory is divided before anything runs: no step takes more beside the KV cache than was planned."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from agent.engine import memory
from agent.engine.build import build_engine
from agent.engine.memory import free_bytes, plan_memory, step_costs
from schema.errors import OutOfSpace
from schema.link import EngineOptions
from schema.memory import GATHERED_BYTES
from tests.agent.engine.models import kv_options, make_model, manifest_of, submit_of, tensors_of
from tests.agent.engine.test_engine import prompts
from tests.examples import sampled


class Peak(TorchDispatchMode):
    """Bytes of the storages that were made under it and live at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and (pointer := tensor.untyped_storage().data_ptr()) not in old | self._seen:
                size = tensor.untyped_storage().nbytes()
                if size == GATHERED_BYTES:  # attention's own, made once
                    continue
                self._seen.add(pointer)
                self._now += size
                self.most = max(self.most, self._now)
                weakref.finalize(tensor.untyped_storage(), self._gone, pointer, size)
        return out

    def _gone(self, pointer: int, size: int) -> None:
        self._seen.discard(pointer)
        self._now -= size


@pytest.mark.parametrize(
    "name", sampled(["llama", "gpt2", "gemma", "qwen3_moe", "gemma2", "bloom", "gpt_oss"], "llama", "gemma")
)
@pytest.mark.parametrize("shared", [0, 160])
def test_no_step_takes_more_than_was_planned(name: str, shared: int) -> None:
    """Whatever requests ask for; nor where many share a prefix, which is gathered once for each."""
    model = make_model(name)
    manifest = manifest_of(model)
    options = kv_options(manifest, 2048, concurrency=8)
    engine = build_engine(manifest, tensors_of(model), options, prefill_tokens=64)
    plan = plan_memory(model, manifest, options, 64, None)
    wishes = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 5}
    for index, prompt in enumerate(prompts()):
        engine.submit(submit_of(index + 1, [7] * shared + prompt, 24, **wishes))  # type: ignore[arg-type]
    most = 0
    while engine.running or engine.waiting:
        with Peak() as peak:
            engine.step()
        most = max(most, peak.most)
    gathered = plan.blocks * plan.block_bytes // manifest.kv.layers
    assert 0 < most <= plan.activation_bytes - gathered + plan.logits_bytes


def test_tables_of_rotary_angles_are_planned_up_to_the_longest_context() -> None:
    model = make_model("llama")
    manifest = msgspec.structs.replace(manifest_of(model), max_context_tokens=2048)
    options = kv_options(manifest, 1600, concurrency=1)
    runner: Any = build_engine(manifest, tensors_of(model), options)._runner
    alone = msgspec.structs.replace(step_costs(model, manifest), token_bytes=0, layer_kv_bytes=0)
    planned = alone.activation_bytes(sequences=1, context_tokens=2048, kv_tokens=1600, prefill_tokens=0)
    held = 0
    for last in (0, 1100, 1599):
        with Peak() as peak:
            cos, sin = runner._rotary.at(torch.tensor([last]), last)
        assert held + peak.most <= planned
        held = runner._rotary._cos.nbytes + runner._rotary._sin.nbytes
        angles = runner._rotary._inverse * last
        assert torch.equal(cos[0, 0], torch.cat((angles, angles)).cos())
        assert torch.equal(sin[0, 0], torch.cat((-angles.sin(), angles.sin())))


def test_memory_that_cannot_be_had_is_told_with_its_parts() -> None:
    manifest = manifest_of(make_model("llama"))
    tensors = tensors_of(make_model("llama"))
    with pytest.raises(OutOfSpace, match=r"for the KV cache, \d+ for activations, \d+ for logits\) and \d+ are free"):
        build_engine(manifest, tensors, EngineOptions(kv_bytes=1 << 50))
    with pytest.raises(OutOfSpace, match="hold no KV block"):
        build_engine(manifest, tensors, EngineOptions(kv_bytes=manifest.kv.token_bytes))
    free = free_bytes("cpu")
    assert free is not None
    assert free > 0


def test_what_is_planned_fits_what_is_free_to_the_byte() -> None:
    model = make_model("llama")
    manifest = manifest_of(model)
    options = kv_options(manifest, 256)
    plan = plan_memory(model, manifest, options, 512, None)
    assert plan.kv_bytes <= options.kv_bytes < plan.kv_bytes + plan.block_bytes
    assert plan_memory(model, manifest, options, 512, plan.total_bytes) == plan
    with pytest.raises(OutOfSpace):
        plan_memory(model, manifest, options, 512, plan.total_bytes - 1)


def _group(path: Path, limit: str, current: int, inactive: int) -> Path:
    path.mkdir()
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{current}\n")
    (path / "memory.stat").write_text(f"anon 7\nactive_file 5\ninactive_file {inactive}\nshmem 3\n")
    return path


@pytest.mark.parametrize(("limit", "free"), [("max", 900), ("1500", 600)])
def test_the_tightest_control_group_counts_and_files_that_can_go_are_free(
    limit: str, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _group(tmp_path / "root", "2000", 1500, 400)
    _group(root / "node.slice", limit, 1200, 300)
    _group(root / "node.slice" / "worker.scope", "max", 50, 10)
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/elsewhere\n0::/node.slice/worker.scope\n")
    monkeypatch.setattr(memory, "_CGROUPS", root)
    monkeypatch.setattr(memory, "_OWN_CGROUP", own)
    assert free_bytes("cpu") == free
    own.write_text("0::/of/the/host\n")
    assert free_bytes("cpu") == 900
