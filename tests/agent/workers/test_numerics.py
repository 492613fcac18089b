"""What a node says that the bits of its models depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agent.native import few_tokens, paged_attention
from agent.native.few_tokens import Way
from agent.native.paged_attention import Width
from agent.workers.numerics import numerics

_FLAGS = "fpu sse2 avx avx2 fma avx512f"
_CPU = f"processor : 0\nvendor_id : GenuineIntel\ncpu family : 6\nmodel : 143\nstepping : 8\nflags : {_FLAGS}\n"
_ARM = "processor : 0\nCPU implementer : 0x41\nCPU part : 0xd40\nCPU variant : 0x1\nFeatures : fp asimd bf16 sve\n"


@pytest.fixture
def said(tmp_path: Path) -> Callable[[str], str]:
    """What a node says whose /proc/cpuinfo has this text."""

    def said(cpuinfo: str) -> str:
        path = tmp_path / "cpuinfo"
        path.write_text(cpuinfo)
        return numerics(path)

    return said


def test_processors_that_compute_alike_say_the_same(said: Callable[[str], str]) -> None:
    here = said(_CPU)
    assert f"torch {torch.__version__}" in here
    assert "on GenuineIntel/6/143-" in here
    alike = _CPU.replace("stepping : 8", "stepping : 4").replace("fpu sse2", "sse2 md_clear fpu")
    assert said(alike + _CPU.replace("processor : 0", "processor : 1")) == here
    others = [
        _CPU.replace("model : 143", "model : 85"),
        _CPU.replace("GenuineIntel", "AuthenticAMD"),
        _CPU.replace("avx512f", "avx512f avx512_bf16"),
        _ARM,
        _ARM.replace("sve", ""),
    ]
    assert len({here, *map(said, others)}) == 1 + len(others)
    assert "on 0x41/0xd40/0x1-" in said(_ARM)


def test_each_of_our_compiled_ways_is_told(said: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_tokens, "ways", lambda: Way(0))
    monkeypatch.setattr(paged_attention, "widths", lambda: Width(0))
    assert "compiled none, " in said(_CPU)
    monkeypatch.setattr(few_tokens, "ways", lambda: Way.DOT | Way.FLOAT16)
    assert "compiled dot+float16, " in said(_CPU)
    monkeypatch.setattr(paged_attention, "widths", lambda: Width.EIGHT | Width.SIXTEEN)
    assert "compiled dot+float16+eight+sixteen, " in said(_CPU)


def test_a_processor_that_cannot_be_looked_at_is_no_fault(tmp_path: Path) -> None:
    assert numerics(tmp_path / "nothing").endswith(" on an unknown processor")
