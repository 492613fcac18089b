import hashlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from schema.checkpoint import (
    FORMAT_VERSION,
    INDEX_FILE,
    AssetEntry,
    KvGeometry,
    Manifest,
    Partition,
    TensorEntry,
    TextDefaults,
    content_digest,
    decode_manifest,
    encode_manifest,
)
from schema.errors import InvalidCheckpoint

Plain = dict[str, Any]


def manifest() -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        digest="a" * 64,
        layout="exec1",
        architecture="LlamaForCausalLM",
        parameters=96,
        vocab_size=32,
        max_context_tokens=64,
        chunk_bytes=4096,
        partitions=(Partition("p0.bin", 0, 8192, (1, 2)), Partition("p1.bin", 8192, 4096, (3,))),
        tensors=(
            TensorEntry("a", "F32", (4, 16), 0, 0, 256),
            TensorEntry("b", "BF16", (32,), 0, 256, 64),
            TensorEntry("c", "F32", (0, 7), 1, 0, 0),
            TensorEntry("d", "F32", (), 1, 0, 4),
        ),
        ties={"lm_head": "a"},
        kv=KvGeometry(2, 2, 16, "BF16"),
        config={"hidden_size": 16},
        text=TextDefaults(),
        assets=(),
    )


def changed(change: Callable[[Plain], object]) -> bytes:
    plain: Plain = msgspec.json.decode(encode_manifest(manifest()))
    change(plain)
    return msgspec.json.encode(plain)


def test_a_manifest_is_read_as_it_was_written() -> None:
    assert decode_manifest(encode_manifest(manifest())) == manifest()
    assert manifest().image_bytes == 12288
    assert manifest().kv.token_bytes == 2 * 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.update(format_version=3), "format version 3"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["partitions"][0].update(file="../p0.bin"), "not readable"),
        (lambda m: m["partitions"][0].update(file="p0.bin\n"), "not"),
        (lambda m: m["partitions"][1].update(file="p0.bin"), "repeated"),
        (lambda m: m["partitions"][1].update(start_bytes=4096), "not contiguous"),
        (lambda m: m["partitions"][0].update(size_bytes=8191), "padded"),
        (lambda m: m["partitions"][0].update(chunk_xxh3=[1]), "1 checksums for 2"),
        (lambda m: m["tensors"][1].update(name="a"), "twice"),
        (lambda m: m["tensors"][1].update(offset_bytes=0), "overlap"),
        (lambda m: m["tensors"][1].update(offset_bytes=8192), "beyond"),
        (lambda m: m["tensors"][1].update(offset_bytes=300), "aligned"),
        (lambda m: m["tensors"][1].update(partition=2), "does not exist"),
        (lambda m: m["tensors"][1].update(dtype="F12"), "unknown dtype"),
        (lambda m: m["tensors"][1].update(size_bytes=65), "do not make 65"),
        (lambda m: m["tensors"][1].update(shape=[1 << 50] * 9), "do not make"),
        (lambda m: m["tensors"][1].update(shape=[-32]), "not readable"),
        (lambda m: m.update(ties={"x": "nowhere"}), "tie"),
        (lambda m: m.update(ties={"b": "a"}), "tie"),
        (lambda m: m.update(assets=[{"file": INDEX_FILE, "size_bytes": 1, "sha256": "0" * 64}]), "listed twice"),
        (lambda m: m.update(layer_ends=[4096, 256]), "one after another"),
        (lambda m: m.update(layer_ends=[1 << 40]), "within the image"),
        (lambda m: m["kv"].update(layers=0), "not readable"),
        (lambda m: m["kv"].update(dtype="F12"), "dtype"),
    ],
)
def test_a_hostile_manifest_is_refused(change: Callable[[Plain], object], why: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=why):
        decode_manifest(changed(change))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"format_version": "x"}'])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidCheckpoint):
        decode_manifest(data)


RACE = """
import importlib, sys, threading
sys.setswitchinterval(1e-6)
data = sys.stdin.buffer.read()
for _ in range(60):
    sys.modules.pop("schema.checkpoint", None)
    decode = importlib.import_module("schema.checkpoint").decode_manifest
    gate = threading.Barrier(4)
    threads = [threading.Thread(target=lambda: (gate.wait(), decode(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_threads_may_be_the_first_to_decode_one_together() -> None:
    subprocess.run([sys.executable, "-c", RACE], input=encode_manifest(manifest()), check=True, timeout=60)


def test_what_names_an_image_is_made_once() -> None:
    made = manifest()
    assert made.image_id is made.image_id
    assert msgspec.structs.replace(made, partitions=made.partitions[:1]).image_id != made.image_id
    assert encode_manifest(made) == encode_manifest(manifest())


def test_the_digest_knows_bytes_config_and_text_but_not_order() -> None:
    def digest(*tensors: tuple[str, bytes], config: Plain | None = None, text: str = "", eos: int = 1) -> str:
        entries = [(name, "F32", (1,), hashlib.sha256(data).digest()) for name, data in tensors]
        assets = [AssetEntry("tokenizer.json", 1, "00"), AssetEntry("chat_template.jinja", len(text), text)]
        return content_digest(entries, config or {"layers": 1}, assets, TextDefaults(stop_token_ids=(eos,)))

    base = digest(("a", b"1"), ("b", b"2"))
    assert base == digest(("b", b"2"), ("a", b"1"))
    assert base != digest(("a", b"1"), ("b", b"3"))
    assert base != digest(("a", b"2"), ("b", b"1"))
    assert base != digest(("a", b"1"), ("b", b"2"), config={"layers": 2})
    assert base != digest(("a", b"1"), ("b", b"2"), text="another")
    assert base != digest(("a", b"1"), ("b", b"2"), eos=2)
