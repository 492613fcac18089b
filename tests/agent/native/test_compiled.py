"""When compiled code is called, and when not; what it computes has tests of its own."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.native import compiled, few_tokens, paged_attention
from tests.agent.native.conftest import COMPILER, SOURCES


def test_without_a_library_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    for path in (tmp_path / "none.so", broken):
        monkeypatch.setattr(compiled, "_BUILT", path)
        compiled.library.cache_clear()
        assert compiled.library() is None
        assert not few_tokens.ways()
        assert not paged_attention.widths()
    compiled.library.cache_clear()


def test_a_library_of_another_version_is_not_called(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_BUILT", built)
    compiled.library.cache_clear()
    assert compiled.library() is not None
    monkeypatch.setattr(compiled, "_INTERFACE", compiled._INTERFACE + 1)
    compiled.library.cache_clear()
    assert compiled.library() is None
    compiled.library.cache_clear()


def test_without_threads_to_share_the_work_it_is_not_called(built: Path) -> None:
    """On many cores one thread is slower than torch's many."""
    code = (
        "import sys, pathlib; from agent.native import compiled; compiled._BUILT = pathlib.Path(sys.argv[1]);"
        "print(compiled.library() is not None, 'torch' in sys.modules)"
    )
    answers = []
    for before in ("", "import torch; "):
        command = [sys.executable, "-c", before + code, str(built)]
        answers.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert answers == [["False", "False"], ["True", "True"]]


def test_nothing_is_compiled_where_no_way_would_come_of_it(built: Path) -> None:
    """So that what doctor finds to be there is there."""
    for source in SOURCES.glob("*.c"):
        command = [COMPILER or "", "-D__clang__", "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode != 0
        assert "x86-64" in done.stderr


def test_installing_this_tree_has_compiled_it() -> None:
    told = [each.read_text("direct_url.json") for each in importlib.metadata.distributions(name="sllmctl")]
    if f"file://{SOURCES.parents[1]}" not in [json.loads(text)["url"] for text in told if text]:
        pytest.skip("another tree is installed")
    assert list(SOURCES.glob("_compiled*.so"))
