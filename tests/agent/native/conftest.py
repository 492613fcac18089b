from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.native import compiled as native

COMPILER = shutil.which("gcc")
SOURCES = Path(native.__file__).parent


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """These sources, compiled: what was installed may be another version's."""
    if COMPILER is None or platform.machine() != "x86_64":
        pytest.skip("no gcc, or not for this machine")
    library = tmp_path_factory.mktemp("compiled") / "compiled.so"
    flags = ["-O3", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([COMPILER, *flags, *sorted(SOURCES.glob("*.c")), "-o", library], check=True)
    return library


@pytest.fixture
def compiled(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "_BUILT", built)
    native.library.cache_clear()
    yield
    native.library.cache_clear()
