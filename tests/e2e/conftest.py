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


@pytest.fixture(scope="session")
def prepared(talker: Path) -> Iterator[Cluster]:
    """A cluster that was stopped when the random model had been deployed as ``docs``, deterministic, so that what goes on
    elsewhere has the same bits. To ingest it takes as long as all that a cluster does in most tests."""
    with Cluster() as made:
        made.add_model(path=talker, engine={"deterministic": True})
        assert made.stop() == 0
        yield made


@pytest.fixture
def cluster(prepared: Cluster) -> Iterator[Cluster]:
    """A manager and node of the test's own, with the random model deployed as ``docs``, scaled to zero."""
    with Cluster(like=prepared) as made:
        yield made


@pytest.fixture(scope="module")
def standing(prepared: Cluster) -> Iterator[Cluster]:
    """As ``cluster``, for those tests of a file that say that it is disturbed by nothing: they share it one after the other."""
    with Cluster(like=prepared) as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the cluster's processes logged."""
    report = yield
    funcargs = getattr(item, "funcargs", {})
    made = funcargs.get("cluster") or funcargs.get("standing")
    if report.failed and isinstance(made, Cluster):
        report.sections.append(("logs of the cluster", made.log()))
    return report
