"""A trial store loads what the node's would, reports failures as errors, and can be used over and over."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.store import catalog
from agent.store.trial import TrialStore
from schema.errors import InvalidCheckpoint
from tests.agent.store.images import CHUNK, commit, read_image


def _store(entry: catalog.CatalogEntry) -> TrialStore:
    return TrialStore(entry.manifest.image_bytes, chunk_bytes=CHUNK, reader_threads=2)


def test_loads_again_and_again_into_the_same_memory(tmp_path: Path) -> None:
    _, directory, image = commit(tmp_path, 1, 3 * CHUNK + 12345, partitions=2)
    entry = catalog.read_entry(directory)
    store = _store(entry)
    try:
        for _ in range(3):
            resident, timing = store.fill(entry)
            assert read_image(store.arena.descriptor, resident) == image
            assert timing.seconds > 0
        store.arena.views([0], 0, CHUNK)[0][:] = bytes(CHUNK)
        assert store.read(entry, check=True).seconds > 0
        assert read_image(store.arena.descriptor, resident) == image
    finally:
        store.close()


def test_a_wrong_byte_is_an_error_of_a_checked_read_alone(tmp_path: Path) -> None:
    _, directory, image = commit(tmp_path, 1, CHUNK)
    (directory / "partition_0.bin").write_bytes(b"\0" + image[1:] if image[0] else b"\1" + image[1:])
    entry = catalog.read_entry(directory)
    store = _store(entry)
    try:
        assert store.read(entry, check=False).seconds > 0
        with pytest.raises(InvalidCheckpoint):
            store.read(entry, check=True)
        with pytest.raises(InvalidCheckpoint):
            store.fill(entry)
    finally:
        store.close()
