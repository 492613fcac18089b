"""The manifest of a loading-optimised checkpoint: what it holds, where its bytes lie, how they are checked.

On disk a checkpoint is ``<root>/<digest>/<layout>/``: partition files of raw tensor bytes, ``manifest.json`` (this),
and beside them the text assets (``tokenizer.json``, ``chat_template.jinja``) that ingest has normalised, and the list of
tensors (``tensors.idx``), which only a worker needs. Format version 1 had that list in the manifest, and is still read.

A tensor's address is ``base + partition.start_bytes + tensor.offset_bytes``, where base is wherever the whole image was
put: one range of an arena, or of a device. (After the paper's loading-optimised format, OSDI 2024, section 4.1.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from schema.errors import InvalidCheckpoint
from schema.memory import StepCosts

__all__ = [
    "ALIGN_BYTES",
    "DTYPE_BITS",
    "DTYPE_BYTES",
    "FORMAT_VERSION",
    "INDEX_FILE",
    "IN_PLACE",
    "LAYOUT",
    "LAYOUTS",
    "PAD_BYTES",
    "AssetEntry",
    "KvGeometry",
    "Manifest",
    "Partition",
    "SourceFile",
    "TensorEntry",
    "TextDefaults",
    "content_digest",
    "decode_manifest",
    "encode_manifest",
    "tensor_bytes",
]

FORMAT_VERSION: Final = 2
_READABLE: Final = (1, 2)
INDEX_FILE: Final = "tensors.idx"
"""The asset that lists the tensors of a checkpoint of format version 2, in binary (`agent.store.index`)."""
LAYOUT: Final = "exec2"
"""The layout that ingest writes: one partition, in execution order, fused groups without gaps."""
LAYOUTS: Final = (LAYOUT, "exec1")
"""Those that it writes and has written, the newest first: what is looked for where nobody lists what there is."""
ALIGN_BYTES: Final = 256
"""Tensors start at multiples of this within a partition, as device kernels want them; in a fused group only the first."""
PAD_BYTES: Final = 4096
"""Partition files and their starts in the image are multiples of this, for direct I/O."""
IN_PLACE: Final = "inplace1"
"""The layout whose partitions are the user's own safetensors files, headers included; only their starts are padded."""

DTYPE_BITS: Final[dict[str, int]] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element by dtype, in the names of the safetensors format: all that safetensors 0.8 knows."""
DTYPE_BYTES: Final[dict[str, int]] = {name: bits // 8 for name, bits in DTYPE_BITS.items() if bits % 8 == 0}
"""Bytes per element of the dtypes that have whole ones; of the others, several elements are packed together."""

_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
_Count = Annotated[int, Meta(ge=0, le=1 << 50)]


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: its name in the model's state dict, its safetensors dtype, its shape, and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[_Count, ...]
    partition: _Count
    offset_bytes: _Count
    size_bytes: _Count


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user's file that is loaded where it lies, and what it was like when its checksums were made."""

    path: Annotated[str, Meta(pattern=r"^/[^\0]*$", max_length=4096)]
    mtime_ns: int
    inode: int


class Partition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One file of raw tensor bytes, read as a whole.

    ``size_bytes`` is the file's size, a multiple of PAD_BYTES. ``start_bytes`` is where it begins in the image.
    ``chunk_xxh3`` holds the xxh3-64 of each ``Manifest.chunk_bytes`` of the file in order, the last one short.
    In the layout IN_PLACE the file is ``source``, whatever its size; the image is padded behind it.
    """

    file: _FileName
    start_bytes: _Count
    size_bytes: _Count
    chunk_xxh3: tuple[int, ...]
    source: SourceFile | None = None

    @property
    def padded_bytes(self) -> int:
        """What it takes in the image."""
        return -(-self.size_bytes // PAD_BYTES) * PAD_BYTES


class AssetEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A small file beside the partitions (``tokenizer.json``, ``chat_template.jinja``, INDEX_FILE), with its sha256."""

    file: _FileName
    size_bytes: _Count
    sha256: _Digest


class KvGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the KV cache of one token costs: 2 * layers * kv_heads * head_dim elements of ``dtype``."""

    layers: Annotated[int, Meta(gt=0, le=1 << 16)]
    kv_heads: Annotated[int, Meta(gt=0, le=1 << 16)]
    head_dim: Annotated[int, Meta(gt=0, le=1 << 16)]
    dtype: str

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


class TextDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the gateway needs to know of the text side, beside the assets.

    ``stop_token_ids`` end a reply (the model's end-of-sequence ids). ``has_template`` says that chat is possible.
    The sampling defaults are the model's own generation_config, None where it says nothing.
    ``special_tokens`` are handed to the chat template by their names (``bos_token`` and kin).
    """

    stop_token_ids: tuple[int, ...] = ()
    has_template: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    special_tokens: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """A whole checkpoint. ``tensors`` are in execution order, and empty where the asset INDEX_FILE lists them; tied names
    point at the stored one in ``ties``.

    ``digest`` names the content, whatever the layout; ``layout`` names this way of lying on disk. ``config`` is the
    model's config.json. ``vocab_size`` bounds token ids, ``max_context_tokens`` bounds prompt and
    reply together. ``layer_ends``: up to which byte of the image each layer reaches. ``step``: what an engine's step costs;
    None in manifests that are older.
    """

    format_version: int
    digest: _Digest
    layout: _FileName
    architecture: str
    parameters: _Count
    vocab_size: Annotated[int, Meta(gt=0, le=1 << 31)]
    max_context_tokens: Annotated[int, Meta(gt=0, le=1 << 40)]
    chunk_bytes: Annotated[int, Meta(ge=PAD_BYTES, le=1 << 30, multiple_of=PAD_BYTES)]
    partitions: tuple[Partition, ...]
    tensors: tuple[TensorEntry, ...]
    ties: dict[str, str]
    kv: KvGeometry
    config: dict[str, Any]
    text: TextDefaults
    assets: tuple[AssetEntry, ...]
    layer_ends: tuple[_Count, ...] = ()
    step: StepCosts | None = None

    @property
    def image_bytes(self) -> int:
        """Bytes of the whole image in memory: the partitions one after another."""
        return sum(partition.padded_bytes for partition in self.partitions)

    @cached_property
    def image_id(self) -> str:
        """Which bytes lie where in the image. It tells the images of one digest apart: a copy and the user's own files, or two
        directories of those, have the same tensors at other places."""
        parts = [(partition.start_bytes, partition.size_bytes, partition.chunk_xxh3) for partition in self.partitions]
        return hashlib.sha256(msgspec.msgpack.encode((self.chunk_bytes, parts))).hexdigest()[:32]

    @property
    def index(self) -> AssetEntry | None:
        """The file that lists the tensors; None where ``tensors`` does."""
        return next((asset for asset in self.assets if asset.file == INDEX_FILE), None)

    @property
    def text_assets(self) -> tuple[AssetEntry, ...]:
        """The assets that the gateway needs."""
        return tuple(asset for asset in self.assets if asset.file != INDEX_FILE)


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int | None:
    """What a tensor of this many elements takes; None where elements smaller than a byte do not fill their last one."""
    bytes_, over = divmod(prod(shape) * DTYPE_BITS[dtype], 8)
    return None if over else bytes_


def content_digest(
    tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]],
    config: dict[str, Any],
    assets: Iterable[AssetEntry],
    defaults: TextDefaults,
) -> str:
    """The checkpoint's name: sha256 over each tensor's (name, dtype, shape, sha256 of its bytes) by name, the config, and the
    text side: its files, as they are kept, and defaults.

    Independent of shards, order and layout; a fine-tune differs from its base although their headers agree, and so do the
    same weights with another tokenizer or chat template. Tied tensors enter under every name they have.
    """
    digest = hashlib.sha256(b"sllm-checkpoint-2\0")
    for name, dtype, shape, sha256 in sorted(tensors):
        digest.update(msgspec.msgpack.encode((name, dtype, list(shape), sha256)))
    files = sorted((asset.file, asset.sha256) for asset in assets)
    digest.update(msgspec.json.encode((config, files, defaults), order="deterministic"))
    return digest.hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def decode_manifest(data: bytes) -> Manifest:
    """Read and check a manifest as hostile input.

    Raises InvalidCheckpoint for another format version, unknown fields, extents that overlap, leave their partition
    or do not match dtype and shape, partitions that are unaligned or not contiguous, and ties to nowhere.
    """
    try:
        version = _VERSIONS.decode(data).format_version
        if version not in _READABLE:
            raise InvalidCheckpoint(f"manifest has format version {version}; this build reads 1 to {FORMAT_VERSION}")
        manifest = _MANIFESTS.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidCheckpoint(f"manifest is not readable: {error}") from error
    if manifest.kv.dtype not in DTYPE_BYTES:
        raise InvalidCheckpoint(f"the KV cache has unknown dtype {manifest.kv.dtype!r}")
    _check_partitions(manifest)
    if manifest.index is None:
        _check_tensors(manifest)
    elif manifest.tensors:
        raise InvalidCheckpoint(f"the tensors are listed twice: in the manifest and in {INDEX_FILE}")
    return manifest


class _Version(msgspec.Struct):
    format_version: int


# Made here, on the importing thread: two threads that are the first to decode a type crash the process (msgspec 0.22).
_VERSIONS: Final = msgspec.json.Decoder(_Version)
_MANIFESTS: Final = msgspec.json.Decoder(Manifest)


def _check_partitions(manifest: Manifest) -> None:
    start = 0
    files: set[str] = set()
    for partition in manifest.partitions:
        if partition.file in files or re.fullmatch(_SAFE_FILE, partition.file) is None:
            raise InvalidCheckpoint(f"partition file name {partition.file!r} is repeated or not allowed")
        if (partition.source is not None) != (manifest.layout == IN_PLACE):
            raise InvalidCheckpoint(
                f"partition {partition.file}: files in their place belong to the layout {IN_PLACE}, and only there"
            )
        if (partition.size_bytes % PAD_BYTES and partition.source is None) or partition.start_bytes != start:
            raise InvalidCheckpoint(f"partition {partition.file} is not padded to {PAD_BYTES} bytes or not contiguous")
        chunks = -(-partition.size_bytes // manifest.chunk_bytes)
        if len(partition.chunk_xxh3) != chunks:
            raise InvalidCheckpoint(f"partition {partition.file} has {len(partition.chunk_xxh3)} checksums for {chunks} chunks")
        files.add(partition.file)
        start += partition.padded_bytes
    if any(before > after for before, after in pairwise((*manifest.layer_ends, start))):
        raise InvalidCheckpoint("the manifest's layers do not end one after another within the image")


def _check_tensors(manifest: Manifest) -> None:
    names: set[str] = set()
    extents: list[tuple[int, int, int, str]] = []
    for tensor in manifest.tensors:
        if tensor.name in names:
            raise InvalidCheckpoint(f"tensor {tensor.name!r} is listed twice")
        names.add(tensor.name)
        if tensor.dtype not in DTYPE_BITS:
            raise InvalidCheckpoint(f"tensor {tensor.name!r} has unknown dtype {tensor.dtype!r}")
        if tensor_bytes(tensor.dtype, tensor.shape) != tensor.size_bytes:
            raise InvalidCheckpoint(f"tensor {tensor.name!r}: shape and dtype do not make {tensor.size_bytes} bytes")
        if tensor.partition >= len(manifest.partitions):
            raise InvalidCheckpoint(f"tensor {tensor.name!r} is in partition {tensor.partition}, which does not exist")
        if tensor.offset_bytes + tensor.size_bytes > manifest.partitions[tensor.partition].size_bytes:
            raise InvalidCheckpoint(f"tensor {tensor.name!r} reaches beyond its partition")
        if tensor.offset_bytes % ALIGN_BYTES and manifest.layout != IN_PLACE:
            raise InvalidCheckpoint(f"tensor {tensor.name!r} is not aligned to {ALIGN_BYTES} bytes")
        if tensor.size_bytes:
            extents.append((tensor.partition, tensor.offset_bytes, tensor.size_bytes, tensor.name))
    extents.sort()
    for (part, offset, size, name), (next_part, next_offset, _, next_name) in pairwise(extents):
        if part == next_part and offset + size > next_offset:
            raise InvalidCheckpoint(f"tensors {name!r} and {next_name!r} overlap")
    for alias, name in manifest.ties.items():
        if name not in names or alias in names:
            raise InvalidCheckpoint(f"tie {alias!r} -> {name!r} does not lead from a new name to a stored tensor")


_SAFE_FILE = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
