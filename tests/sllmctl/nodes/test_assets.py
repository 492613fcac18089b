"""Text assets: fetched once, verified, kept; every bad copy refused."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from schema.checkpoint import AssetEntry, KvGeometry, Manifest, TextDefaults, encode_manifest
from schema.errors import NotFound, TimedOut, Unreachable, Unschedulable
from sllmctl.nodes.assets import Assets
from sllmctl.nodes.settings import AssetSettings

DIGEST = "ab" * 32
WAIT_S = 60.0
TOKENIZER = b'{"model": {}}'
QUICK = AssetSettings(rounds=2, retry_first_s=0.001, retry_longest_s=0.001)


def manifest(digest: str = DIGEST, assets: tuple[AssetEntry, ...] | None = None) -> bytes:
    entry = AssetEntry("tokenizer.json", len(TOKENIZER), hashlib.sha256(TOKENIZER).hexdigest())
    return encode_manifest(
        Manifest(
            format_version=1, digest=digest, layout="l", architecture="Llama", parameters=0, vocab_size=10,
            max_context_tokens=10, chunk_bytes=4096, partitions=(), tensors=(), ties={},
            kv=KvGeometry(1, 1, 1, "F32"), config={}, text=TextDefaults(), assets=(entry,) if assets is None else assets,
        )
    )  # fmt: skip


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Nodes:
    """Files by node; a node that is not in it is unreachable. ``gate`` holds every read back until it is set."""

    def __init__(self, **files: dict[str, bytes]) -> None:
        self.files = files
        self.reads: list[tuple[str, str]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def read_file(self, node: str, digest: str, file: str) -> bytes:
        self.reads.append((node, file))
        await self.gate.wait()
        if node not in self.files:
            raise Unreachable(f"node {node} is down")
        if file not in self.files[node]:
            raise NotFound(f"no {file}")
        return self.files[node][file]


GOOD = {"manifest.json": manifest(), "tokenizer.json": TOKENIZER}


async def test_assets_are_fetched_once_and_kept_over_restarts(tmp_path: Path) -> None:
    nodes = Nodes(a=GOOD)
    assets = Assets(tmp_path / "assets", nodes, QUICK)
    assets.known(DIGEST, "a")
    assets.known(DIGEST, "a")
    got = await assets.get(DIGEST, WAIT_S)
    assert got.manifest.digest == DIGEST
    assert (got.directory / "tokenizer.json").read_bytes() == TOKENIZER
    assert await assets.get(DIGEST, WAIT_S) is got
    assert nodes.reads == [("a", "manifest.json"), ("a", "tokenizer.json")]
    await assets.close()
    again = Assets(tmp_path / "assets", Nodes(), QUICK)
    assert (await again.get(DIGEST, WAIT_S)).directory == got.directory
    await again.close()


async def test_another_node_is_tried_when_one_cannot_give_them(tmp_path: Path) -> None:
    bad = {"manifest.json": manifest(), "tokenizer.json": b"tampered"}
    nodes = Nodes(good=GOOD, bad=bad)
    assets = Assets(tmp_path, nodes, QUICK)
    for node in ("good", "bad", "away"):
        assets.known(DIGEST, node)
    assert (await assets.get(DIGEST, WAIT_S)).manifest.digest == DIGEST
    assert [node for node, _ in nodes.reads] == ["away", "bad", "bad", "good", "good"]
    await assets.close()


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"manifest.json": manifest(), "tokenizer.json": b"x" * len(TOKENIZER)}, "not what the manifest says"),
        ({"manifest.json": manifest(digest="cd" * 32), "tokenizer.json": TOKENIZER}, "gave the manifest of"),
        ({"manifest.json": b"{}"}, "not readable"),
        ({"manifest.json": manifest(assets=(AssetEntry("manifest.json", 1, "0" * 64),))}, "twice"),
        ({"manifest.json": manifest().replace(b"tokenizer.json", b"../tokenizer")}, "not readable"),
        ({}, "no manifest.json"),
    ],
    ids=["content", "digest", "manifest", "twice", "climbs-out", "missing"],
)
async def test_a_bad_copy_is_refused_and_leaves_nothing(tmp_path: Path, files: dict[str, bytes], why: str) -> None:
    assets = Assets(tmp_path / "assets", Nodes(a=files), QUICK)
    assets.known(DIGEST, "a")
    with pytest.raises(Unschedulable, match=why):
        await assets.get(DIGEST, WAIT_S)
    assert names_in(tmp_path) == []
    await assets.close()


async def test_damaged_assets_on_disk_are_fetched_again(tmp_path: Path) -> None:
    first = Assets(tmp_path, Nodes(a=GOOD), QUICK)
    first.known(DIGEST, "a")
    directory = (await first.get(DIGEST, WAIT_S)).directory
    await first.close()
    (directory / "tokenizer.json").write_bytes(b"torn")
    (tmp_path / ".part-left").mkdir()
    second = Assets(tmp_path, Nodes(a=GOOD), QUICK)
    second.known(DIGEST, "a")
    await second.get(DIGEST, WAIT_S)
    assert (directory / "tokenizer.json").read_bytes() == TOKENIZER
    assert names_in(tmp_path) == [DIGEST]
    await second.close()


async def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "assets"
    blocked.write_bytes(b"a file where the directory should be")
    assets = Assets(blocked, Nodes(a=GOOD), QUICK)
    assets.known(DIGEST, "a")
    with pytest.raises(Unschedulable, match="cannot be had"):
        await assets.get(DIGEST, WAIT_S)
    await assets.close()


async def test_waiting_is_bounded_and_ends_when_a_node_becomes_known(tmp_path: Path) -> None:
    nodes = Nodes(a=GOOD)
    assets = Assets(tmp_path, nodes, QUICK)
    with pytest.raises(Unschedulable, match="no node"):
        await assets.get(DIGEST, 0.01)
    waiting = asyncio.create_task(assets.get(DIGEST, WAIT_S))
    nodes.gate.clear()
    assets.known(DIGEST, "a")
    with pytest.raises(TimedOut):
        await assets.get(DIGEST, 0.01)
    nodes.gate.set()
    assert (await waiting).manifest.digest == DIGEST
    await assets.close()


async def test_a_fetch_that_was_given_up_is_begun_again_when_asked(tmp_path: Path) -> None:
    nodes = Nodes()
    assets = Assets(tmp_path, nodes, QUICK)
    assets.known(DIGEST, "a")
    with pytest.raises(Unschedulable, match="is down"):
        await assets.get(DIGEST, WAIT_S)
    nodes.files["a"] = GOOD
    assert (await assets.get(DIGEST, WAIT_S)).manifest.digest == DIGEST
    await assets.close()


async def test_closing_tells_those_who_wait(tmp_path: Path) -> None:
    nodes = Nodes(a=GOOD)
    nodes.gate.clear()
    assets = Assets(tmp_path, nodes, QUICK)
    assets.known(DIGEST, "a")
    waiting = asyncio.create_task(assets.get(DIGEST, WAIT_S))
    await asyncio.sleep(0)
    await assets.close()
    with pytest.raises(Unschedulable):
        await waiting


async def test_a_name_that_is_no_digest_never_becomes_a_path(tmp_path: Path) -> None:
    assets = Assets(tmp_path / "assets", Nodes(a=GOOD), QUICK)
    assets.known("../escape", "a")
    with pytest.raises(Unschedulable, match="no checkpoint's digest"):
        await assets.get("../escape", WAIT_S)
    await assets.close()
