from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import Cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A fresh manager and node, with the bundled model deployed, scaled to zero."""
    with Cluster() as made:
        made.add_model()
        yield made
