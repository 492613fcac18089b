"""The disk's budget: what counts, what is refused before it is written, and how much is missing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from agent.store.budget import check_room, claim_room, free_bytes, used_bytes
from agent.store.temporary import hold_kept
from schema.errors import Fault, OutOfSpace

BLOCK = 4096


def put(path: Path, blocks: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * blocks * BLOCK)


def test_what_is_committed_or_claimed_counts_and_nothing_else(tmp_path: Path) -> None:
    assert used_bytes(tmp_path) == 0
    put(tmp_path / "checkpoints" / "ab" / "exec1" / "partition_0.bin", 3)
    put(tmp_path / "partial" / "cd+exec1" / "partition_0.bin", 2)
    put(tmp_path / "tmp" / "ingest-1" / "exec1" / "partition_0.bin", 4)
    put(tmp_path / "tmp" / "trash-ef" / "partition_0.bin", 50)
    put(tmp_path / "tmp" / "fetch-1" / "model.safetensors", 60)
    (tmp_path / "checkpoints" / "link").symlink_to(tmp_path / "tmp")
    assert used_bytes(tmp_path) == 9 * BLOCK
    assert used_bytes(tmp_path, but=tmp_path / "partial" / "cd+exec1") == 7 * BLOCK


@pytest.mark.parametrize(("limit", "need", "short"), [(0, 1 << 50, None), (10, 7, None), (10, 8, 1), (10, 10, 3), (10, 11, 0)])
def test_what_would_pass_it_is_refused_with_what_is_missing(tmp_path: Path, limit: int, need: int, short: int | None) -> None:
    put(tmp_path / "checkpoints" / "ab" / "exec1" / "partition_0.bin", 3)
    if short is None:
        check_room(limit * BLOCK, tmp_path, need * BLOCK, "it")
        return
    with pytest.raises(OutOfSpace, match=r"node\.disk_bytes") as error:
        check_room(limit * BLOCK, tmp_path, need * BLOCK, "it")
    assert error.value.short_bytes == short * BLOCK
    again = Fault.of(error.value).to_error()
    assert isinstance(again, OutOfSpace)
    assert again.short_bytes == short * BLOCK


def test_what_was_broken_off_goes_where_it_makes_room_and_only_there(tmp_path: Path) -> None:
    kept = [tmp_path / "partial" / "ab+exec1", tmp_path / "tmp" / "fetch+key"]
    for path in kept:
        put(path / "file", 2)
    assert free_bytes(tmp_path, 1) > 0
    with pytest.raises(OutOfSpace), claim_room(10 * BLOCK, tmp_path, 11 * BLOCK, "it"):
        pass
    assert all(path.is_dir() for path in kept)
    assert free_bytes(tmp_path, 1 << 60) < 1 << 60
    assert not any(path.exists() for path in kept)


def test_of_a_disk_that_is_full_it_is_told_how_much_is_missing_and_of_a_quota_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "tmp" / "ingest+1"
    put(begun / "exec1" / "partition_0.bin", 3)
    held = hold_kept(begun)
    assert held is not None
    usage = shutil.disk_usage(tmp_path)
    for code, free, told in (
        (
            errno.ENOSPC,
            2,
            rf"No space left on device: it needs {7 * BLOCK} more .* at least {5 * BLOCK} are missing; free some",
        ),
        (errno.EDQUOT, 50, rf"quota exceeded: it needs {7 * BLOCK} more bytes of disk, and {tmp_path} has {50 * BLOCK} free; "),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free * BLOCK))
        with pytest.raises(OutOfSpace, match=told), claim_room(0, tmp_path, 10 * BLOCK, "it", but=begun):
            raise OSError(code, os.strerror(code))
    with pytest.raises(OSError, match="Input/output"), claim_room(0, tmp_path, 10 * BLOCK, "it", but=begun):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    os.close(held)
