from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.cluster import Cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A fresh manager and node, with the bundled model deployed, scaled to zero."""
    with Cluster() as made:
        made.add_model()
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the cluster's processes logged."""
    report = yield
    made = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(made, Cluster):
        report.sections.append(("logs of the cluster", made.log()))
    return report
