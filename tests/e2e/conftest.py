from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_llama_dir
from tests.cluster import Cluster


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded random model that never ends by itself, so that a stream lasts long enough to be disturbed on any machine."""
    return make_llama_dir(tmp_path_factory.mktemp("models") / "talker", hidden=128, layers=8, context=4096, eos=False)


@pytest.fixture
def cluster(talker: Path) -> Iterator[Cluster]:
    """A fresh manager and node, with the random model deployed as ``docs``, scaled to zero."""
    with Cluster() as made:
        made.add_model(path=talker)
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the cluster's processes logged."""
    report = yield
    made = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(made, Cluster):
        report.sections.append(("logs of the cluster", made.log()))
    return report
