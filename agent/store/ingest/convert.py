"""From a Hugging Face directory to a committed checkpoint: judged, streamed, and renamed into place as a whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from agent.store import catalog
from agent.store.durable import disk_errors
from agent.store.index import encode_index, read_index
from agent.store.ingest.files import SourceDirectory
from agent.store.ingest.headers import Sources, SourceTensor, parse_json
from agent.store.ingest.inplace import sum_files
from agent.store.ingest.model import check_runnable, read_facts
from agent.store.ingest.order import execution_key, find_ties
from agent.store.ingest.text import read_text_side, write_assets
from agent.store.ingest.writer import CHUNK_BYTES, same_bytes, write_partition
from agent.store.layers import layer_ends
from agent.store.temporary import kept_directory, temporary_directory
from schema.checkpoint import (
    FORMAT_VERSION,
    IN_PLACE,
    INDEX_FILE,
    LAYOUT,
    AssetEntry,
    Manifest,
    TensorEntry,
    content_digest,
    decode_manifest,
    encode_manifest,
)
from schema.errors import InvalidCheckpoint

__all__ = ["LAYOUT", "convert"]

_MAX_CONFIG_BYTES: Final = 16 << 20
_PARTITION: Final = "partition_0.bin"

Claim = Callable[[int, Path], AbstractContextManager[None]]
"""Has room for so many bytes, of which a directory may hold some already, while it is entered."""


def convert(
    source: Path,
    checkpoints: Path,
    temporary: Path,
    progress: Callable[[int, int], None],
    *,
    claim: Claim | None = None,
    in_place: bool = False,
    resumed: Callable[[int], None] = lambda _: None,
    committing: Callable[[str], None] = lambda _: None,
) -> str:
    """Make a checkpoint of a model directory and return its digest; one that is already there, and sound, is left alone.

    What an ingest of the same directory has left under ``temporary`` when it was broken off is gone on with, if the model's
    files are as they were; ``resumed`` hears, before the first progress, how many bytes need not be read.

    ``temporary`` must lie on the file system of ``checkpoints``. ``progress`` hears (done, total) bytes.
    ``claim`` is entered while the room for the weights is reserved, and may raise. ``committing`` hears the digest when all is
    written and about to be put where it is found. With ``in_place`` the model's own files are the weights of the checkpoint,
    which only refers to them.

    Raises InvalidCheckpoint for a model that is damaged, hostile or cannot be run, OutOfSpace for a full disk; then nothing is
    left.
    """
    directory = SourceDirectory(source)
    key = hashlib.sha256(os.fsencode(directory.path)).hexdigest()[:32]
    if not directory.has("config.json"):
        raise InvalidCheckpoint(f"{source} is no Hugging Face model directory: it has no config.json")
    config = parse_json(directory.read("config.json", _MAX_CONFIG_BYTES), "config.json")
    with (
        disk_errors(f"ingesting {source}", temporary),
        Sources(directory) as sources,
        temporary_directory(temporary, "ingest") if in_place else kept_directory(temporary, "ingest", key) as staging,
    ):
        if in_place and sources.pickled:
            raise InvalidCheckpoint(f"{source} has no safetensors; files of torch.save cannot be loaded in place, only copied")
        facts = read_facts(config, sources.tensors)
        tensors, tied, step = check_runnable(facts, sources.tensors)
        ties = find_ties(tensors, tied, lambda one, other: same_bytes(sources, one, other))
        layout = IN_PLACE if in_place else LAYOUT
        new = staging / layout
        new.mkdir(exist_ok=True)
        _clear(new)
        scratch = staging / "tokenizer"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        text = read_text_side(directory, config, facts.vocab_size, scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        stored = [tensors[name] for name in sorted(tensors, key=execution_key) if name not in ties]
        total = sum(tensor.size_bytes for tensor in stored)
        if in_place:
            partitions, entries, sha256 = sum_files(sources, stored, lambda done: progress(min(done, total), total))
        else:
            written = write_partition(
                new / _PARTITION,
                sources,
                stored,
                lambda done: progress(done, total),
                journal=staging / "journal",
                claim=None if claim is None else claim(total, staging),
                resumed=resumed,
            )
            partitions, entries, sha256 = (written.partition,), written.tensors, written.sha256
        assets = write_assets(text, new)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            digest=content_digest(_named(entries, sha256, ties), facts.config, assets, text.defaults),
            layout=layout,
            architecture=facts.architecture,
            parameters=sum(_elements(tensor) for tensor in stored),
            vocab_size=facts.vocab_size,
            max_context_tokens=facts.max_context_tokens,
            chunk_bytes=CHUNK_BYTES,
            partitions=partitions,
            tensors=(),
            layer_ends=layer_ends(entries, partitions),
            step=step,
            ties=ties,
            kv=facts.kv,
            config=config,
            text=text.defaults,
            assets=(*assets, _write_index(entries, new)),
        )
        data = encode_manifest(manifest)
        read_index(new, decode_manifest(data))  # what cannot be read back must never be committed
        (new / catalog.MANIFEST_FILE).write_bytes(data)
        committing(manifest.digest)
        catalog.commit(new, checkpoints / manifest.digest / layout, staging / "replaced")
        return manifest.digest


def _clear(new: Path) -> None:
    """Leave of an earlier ingest the weights alone, which are held against its journal."""
    for child in new.iterdir():
        if child.name != _PARTITION:
            child.unlink()


def _named(
    tensors: Iterable[TensorEntry], sha256: Mapping[str, bytes], ties: Mapping[str, str]
) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, dtype, shape and hash of every tensor, tied ones under each of their names."""
    entries = {entry.name: (entry.dtype, entry.shape, sha256[entry.name]) for entry in tensors}
    return [(name, *entry) for name, entry in entries.items()] + [(alias, *entries[name]) for alias, name in ties.items()]


def _write_index(tensors: Sequence[TensorEntry], directory: Path) -> AssetEntry:
    data = encode_index(tensors)
    (directory / INDEX_FILE).write_bytes(data)
    return AssetEntry(INDEX_FILE, len(data), hashlib.sha256(data).hexdigest())


def _elements(tensor: SourceTensor) -> int:
    count = 1
    for dimension in tensor.shape:
        count *= dimension
    return count
