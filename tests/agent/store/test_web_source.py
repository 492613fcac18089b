"""Models from a web server that is no hub: what lies there comes, in parts, resumable, and each failure has its name."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.store.ingest.pipeline import CHUNK_BYTES
from agent.store.ingest.web import fetch_directory
from agent.store.remote.api import STEADY_BYTES
from schema.errors import InvalidCheckpoint, InvalidInput, NotFound, SllmError, Unauthorised, Unreachable
from schema.remote import RemoteSettings
from schema.spec import PathSource, UrlSource
from tests.agent.store.test_ingest_process import Node
from tests.checkpoints import make_llama_dir, write_safetensors
from tests.remotes import NO_LIMIT, WebServer, cut, web_server

QUICK = RemoteSettings(attempts=3, longest_delay_s=0.01, read_s=60, connect_s=60, part_bytes=CHUNK_BYTES, streams=3, part_s=100)
SIZE = 5 * CHUNK_BYTES + 1234


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model of one large file, and things beside it that are not asked for."""
    root = make_llama_dir(tmp_path / "root" / "m")
    write_safetensors(root / "model.safetensors", {"a": ("U8", (SIZE,), os.urandom(SIZE))})
    (root / "pytorch_model.bin").write_bytes(b"not this")
    (root / "README.md").write_text("nor this")
    return tmp_path / "root"


@pytest.fixture
def web(root: Path) -> Iterator[WebServer]:
    with web_server(root) as server:
        yield server


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "to").mkdir()
    return tmp_path / "to"


def fetch(web: WebServer, directory: Path, settings: RemoteSettings = QUICK) -> tuple[int, list[int]]:
    spared: list[int] = []
    heard: list[int] = []
    fetch_directory(
        UrlSource(f"{web.url}/m"), directory, settings, lambda done, _: heard.append(done), lambda _: 1 << 40, spared.append
    )
    return spared[0], heard


def same(root: Path, directory: Path) -> bool:
    return all(
        (directory / name).read_bytes() == (root / "m" / name).read_bytes()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")
    )


def test_only_what_ingest_reads_comes_and_it_is_the_same(web: WebServer, root: Path, directory: Path) -> None:
    assert fetch(web, directory)[0] == 0
    assert same(root, directory)
    assert not (directory / "README.md").exists()
    assert not any("pytorch" in path or "README" in path for path in web.gets)


def test_shards_by_their_index_and_pickled_weights_where_there_are_no_others(
    web: WebServer, root: Path, directory: Path
) -> None:
    (root / "m" / "model.safetensors").unlink()
    fetch(web, directory)
    assert (directory / "pytorch_model.bin").read_bytes() == b"not this"
    make_llama_dir(root / "m", shards=3)
    fetch(web, directory)
    assert not (directory / "pytorch_model.bin").exists()
    for path in (root / "m").glob("model-*"):
        assert (directory / path.name).read_bytes() == path.read_bytes()
    assert len(list(directory.glob("model-*"))) == 3


def test_a_fetch_that_broke_off_goes_on(web: WebServer, root: Path, directory: Path) -> None:
    web.fault = lambda handler, path, count: path.endswith("safetensors") and count > 4 and fail(handler, 503)
    with pytest.raises(Unreachable, match="503"):  # of several streams one could break off before another has a chunk
        fetch(web, directory, msgspec.structs.replace(QUICK, streams=1))
    web.fault = None
    before = len(web.ranges)
    spared, heard = fetch(web, directory)
    assert spared >= CHUNK_BYTES
    assert heard[0] >= spared
    assert web.asked_bytes(before) < SIZE - spared + CHUNK_BYTES
    assert same(root, directory)
    whole = (directory / "model.safetensors").stat()
    assert fetch(web, directory)[0] == whole.st_size
    assert (directory / "model.safetensors").stat().st_mtime_ns == whole.st_mtime_ns, "an ingest that reads it would begin anew"


def test_what_has_come_is_believed_by_its_checksum_alone(web: WebServer, root: Path, directory: Path) -> None:
    fetch(web, directory)
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(CHUNK_BYTES + 7)
        file.write(b"rot")
    assert fetch(web, directory)[0] == (root / "m" / "model.safetensors").stat().st_size - CHUNK_BYTES
    assert same(root, directory)


def test_another_file_at_the_same_address_begins_anew(web: WebServer, root: Path, directory: Path) -> None:
    fetch(web, directory)
    write_safetensors(root / "m" / "model.safetensors", {"a": ("U8", (SIZE + 1,), os.urandom(SIZE + 1))})
    assert fetch(web, directory)[0] == 0
    assert same(root, directory)


def shard(root: Path, names: list[str], size: int = 10) -> None:
    """Weights in files of these names, by an index."""
    (root / "m" / "model.safetensors").unlink(missing_ok=True)
    for name in names:
        (root / "m" / name).write_bytes(os.urandom(size))
    index = {"weight_map": {f"tensor {number}": name for number, name in enumerate(names)}}
    (root / "m" / "model.safetensors.index.json").write_text(json.dumps(index))


def test_few_of_many_shards_are_open_at_a_time(web: WebServer, root: Path, directory: Path) -> None:
    names = [f"model-{number}.safetensors" for number in range(60)]
    shard(root, names)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, limits[1]))
    try:
        fetch(web, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for name in names:
        assert (directory / name).read_bytes() == (root / "m" / name).read_bytes()


def test_a_shard_whose_name_is_as_long_as_it_may_be(web: WebServer, root: Path, directory: Path) -> None:
    name = "m" * (255 - len(".safetensors")) + ".safetensors"
    shard(root, [name])
    fetch(web, directory)
    assert (directory / name).read_bytes() == (root / "m" / name).read_bytes()


def test_nothing_of_an_earlier_fetch_goes_before_the_weights_were_looked_at(
    web: WebServer, root: Path, directory: Path
) -> None:
    shard(root, ["model-1.safetensors", "model-2.safetensors"], SIZE)
    web.fault = lambda handler, path, count: path.endswith("model-2.safetensors") and count > 2 and fail(handler, 503)
    with pytest.raises(Unreachable, match="503"):
        fetch(web, directory)
    web.fault = None
    index = root / "m" / "model.safetensors.index.json"
    right = index.read_text()
    index.write_text(right.replace("model-", "other-"))
    with pytest.raises(NotFound, match="although the index names it"):
        fetch(web, directory)
    index.write_text(right)
    assert fetch(web, directory)[0] >= CHUNK_BYTES


def test_small_files_are_bounded_together(web: WebServer, root: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {path.name: path.stat().st_size for path in (root / "m").glob("*.json")}
    monkeypatch.setattr("agent.store.ingest.web._MAX_SMALL_SUM_BYTES", sum(sizes.values()) - 1)
    with pytest.raises(InvalidCheckpoint, match=f"has more than {sizes['tokenizer_config.json'] - 1} bytes"):
        fetch(web, directory)


def test_a_server_that_refuses_what_is_not_there(web: WebServer, root: Path, directory: Path) -> None:
    web.fault = lambda handler, path, count: not (root / path).is_file() and fail(handler, 403)
    fetch(web, directory)
    assert same(root, directory)
    (root / "m" / "model.safetensors").unlink()
    (root / "m" / "pytorch_model.bin").unlink()
    with pytest.raises(Unauthorised, match=r"model\.safetensors: access is refused \(403\)"):
        fetch(web, directory)
    (root / "m" / "config.json").unlink()
    with pytest.raises(Unauthorised, match=r"config\.json: access is refused"):
        fetch(web, directory)


def test_a_short_body_is_gone_on_with(web: WebServer, root: Path, directory: Path) -> None:
    def short(handler: Any, path: str, count: int) -> bool:
        if not path.endswith("safetensors") or count not in (2, 3):
            return False
        start = int(handler.headers["Range"].removeprefix("bytes=").split("-")[0])
        total = (root / path).stat().st_size
        data = (root / path).read_bytes()[start : start + 1000]
        cut(handler, 206, min(CHUNK_BYTES, total - start), data, total)
        return True

    web.fault = short
    fetch(web, directory)
    assert same(root, directory)


def test_a_chunk_may_take_more_connections_than_may_fail(web: WebServer, root: Path, directory: Path) -> None:
    assert QUICK.attempts * STEADY_BYTES < CHUNK_BYTES

    def short(handler: Any, path: str, count: int) -> bool:
        if not path.endswith("safetensors") or count == 1:  # the first asks for its size
            return False
        data = (root / path).read_bytes()
        start, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        cut(handler, 206, last + 1 - start, data[start : min(start + STEADY_BYTES, last + 1)], len(data))
        return True

    web.fault = short
    fetch(web, directory)
    assert same(root, directory)
    assert all(int(sent.removeprefix("bytes=").split("-")[0]) % STEADY_BYTES == 0 for _, sent in web.ranges if sent)


def fail(handler: Any, status: int) -> bool:
    handler.answer(status, b"")
    return True


def silent(handler: Any, path: str, count: int) -> bool:
    if path.endswith("safetensors") and count > 1:
        time.sleep(0.6)
        handler.close_connection = True
        return True
    return False


def redirected(target: str) -> Callable[[Any, str, int], bool]:
    def fault(handler: Any, path: str, count: int) -> bool:
        if not path.startswith("m/"):
            return False
        handler.send_response(302)
        handler.send_header("Location", target + path.removeprefix("m/"))
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    return fault


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        (
            lambda handler, path, count: fail(handler, 404),
            NotFound,
            r"config\.json does not exist; give the URL of a directory",
        ),
        (lambda handler, path, count: fail(handler, 401), Unauthorised, "access is refused"),
        (lambda handler, path, count: "model" in path and fail(handler, 404), NotFound, "but neither model.safetensors nor"),
        (lambda handler, path, count: fail(handler, 500), Unreachable, r"500 \(tried 3 times\)"),
        (silent, Unreachable, "tried 3 times"),
        (redirected("ftp://elsewhere/"), Unreachable, "neither http nor https"),
        (redirected("/m/again/"), Unreachable, "redirected more than"),
    ],
    ids=["404", "401", "no weights", "500", "silent", "ftp", "loop"],
)
def test_each_failure_has_its_name(web: WebServer, directory: Path, fault: Any, error: type[SllmError], match: str) -> None:
    web.fault = fault
    with pytest.raises(error, match=match):
        fetch(web, directory, msgspec.structs.replace(QUICK, read_s=0.3) if fault is silent else QUICK)


def test_a_redirect_is_followed(web: WebServer, root: Path, directory: Path) -> None:
    (root / "m").rename(root / "moved")
    web.fault = redirected("/moved/")
    fetch(web, directory)
    (root / "moved").rename(root / "m")
    assert same(root, directory)


def test_a_server_that_ignores_ranges(web: WebServer, directory: Path) -> None:
    web.honour_ranges = False
    with pytest.raises(InvalidInput, match="ignores Range requests"):
        fetch(web, directory)


def test_a_file_that_is_changed_meanwhile(web: WebServer, root: Path, directory: Path) -> None:
    def change(handler: Any, path: str, count: int) -> bool:
        if path.endswith("safetensors") and count == 4:
            os.truncate(root / path, 2 * CHUNK_BYTES)
        return False

    web.fault = change
    with pytest.raises(InvalidCheckpoint, match="was changed while it was fetched"):
        fetch(web, directory, RemoteSettings(part_bytes=CHUNK_BYTES, streams=1))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"weight_map": {"a": "../model.safetensors"}}', "no plain name"),
        ('{"weight_map": {"a": "/etc/model.safetensors"}}', "no plain name"),
        ('{"weight_map": {"a": "config.json"}}', "no plain name"),
        ('{"weight_map": {"a": "model-1.safetensors"}}', "does not exist, although the index names it"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("{", "is not readable JSON"),
    ],
)
def test_an_index_that_is_hostile_or_wrong(web: WebServer, root: Path, directory: Path, content: str, match: str) -> None:
    (root / "m" / "model.safetensors.index.json").write_text(content)
    with pytest.raises((InvalidCheckpoint, NotFound), match=match):
        fetch(web, directory)
    assert {path.name for path in directory.parent.iterdir()} == {"root", "to"}


@pytest.mark.slow
def test_the_whole_way_killed_in_between(tmp_path: Path) -> None:
    root = tmp_path / "root"
    model = make_llama_dir(root / "m", hidden=512, heads=8, layers=6, vocab=4000, shards=2)
    node = Node()
    try:
        node.configure(remote=RemoteSettings(part_bytes=CHUNK_BYTES, streams=2))
        with web_server(root) as web:
            source = UrlSource(f"{web.url}/m")
            web.limit_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors")) // 3
            child = node.start(source)
            until(child, node.data, "fetch+*/.*.journal", 3)
            child.send_signal(signal.SIGKILL)
            child.communicate()
            web.limit_bytes = NO_LIMIT
            code, _, done = node.finish(node.start(source))
        assert (code, done.fault) == (0, None)
        assert "of a download that had been broken off" in done.note
        assert node.finish(node.start(PathSource(str(model))))[2].digest == done.digest
        assert list((node.data / "tmp").iterdir()) == []
    finally:
        node.close()


def until(child: subprocess.Popen[bytes], data: Path, pattern: str, lines: int) -> None:
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if any(path.read_bytes().count(b"\n") >= lines for path in (data / "tmp").glob(pattern)):
            return
        time.sleep(0.01)
    raise AssertionError("it was over before it could be killed")
