"""The list of a checkpoint's tensors in binary (``tensors.idx``), checked as hostile input, all tensors at a time.

Little-endian: a header, then one array after another. Per tensor: dtype (place in `_DTYPES`), rank, partition, offset and size
in bytes; then all dimensions one after another; then the names in UTF-8, separated by NUL. 19,000 tensors are read and checked
in some milliseconds, of which most goes to their names; as JSON they took 20 to 60.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from schema.checkpoint import DTYPE_BITS, IN_PLACE, INDEX_FILE, AssetEntry, Manifest, TensorEntry
from schema.errors import InvalidCheckpoint

__all__ = ["TensorIndex", "encode_index", "index_of", "read_index"]

_MAGIC: Final = b"sllmctl tensors\x01"
_HEADER = struct.Struct("<16sQQQ")  # magic, tensors, dimensions of all of them, bytes of the names
_DTYPES: Final = (
    "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64",
    "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
)  # fmt: skip
"""The order is part of the format; new ones go to the end."""
_ITEM_BITS: Final = np.array([DTYPE_BITS[name] for name in _DTYPES], "<u8")
_ITEM_ALIGN: Final = np.maximum(_ITEM_BITS // np.uint64(8), np.uint64(1))
_MAX_RANK: Final = 16
_MAX_COUNT: Final = 1 << 50
_FIELDS: Final = (("dtypes", "u1"), ("ranks", "u1"), ("partitions", "<u4"), ("offsets", "<u8"), ("sizes", "<u8"))


@dataclass(frozen=True, slots=True)
class TensorIndex:
    """Tensors in execution order: names, safetensors dtypes, shapes, where each starts in the image, and its bytes."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    starts: list[int]
    sizes: list[int]

    def __len__(self) -> int:
        return len(self.names)


def encode_index(tensors: Sequence[TensorEntry]) -> bytes:
    """The bytes of INDEX_FILE. Raises InvalidCheckpoint for a tensor that cannot be told in it."""
    names = [tensor.name.encode() for tensor in tensors]
    for tensor in tensors:
        if "\0" in tensor.name or not tensor.name or len(tensor.shape) > _MAX_RANK or tensor.dtype not in _DTYPES:
            raise InvalidCheckpoint(f"tensor {tensor.name!r} ({tensor.dtype}, {len(tensor.shape)} dimensions) cannot be listed")
    columns: dict[str, list[int]] = {
        "dtypes": [_DTYPES.index(tensor.dtype) for tensor in tensors],
        "ranks": [len(tensor.shape) for tensor in tensors],
        "partitions": [tensor.partition for tensor in tensors],
        "offsets": [tensor.offset_bytes for tensor in tensors],
        "sizes": [tensor.size_bytes for tensor in tensors],
    }
    dimensions = np.array([dimension for tensor in tensors for dimension in tensor.shape], "<u8")
    text = b"\0".join(names)
    parts = [_HEADER.pack(_MAGIC, len(tensors), len(dimensions), len(text))]
    parts += [np.array(columns[name], kind).tobytes() for name, kind in _FIELDS]
    return b"".join([*parts, dimensions.tobytes(), text])


def read_index(directory: Path, manifest: Manifest) -> TensorIndex:
    """The tensors of the checkpoint in ``directory``, whichever form lists them.

    Raises InvalidCheckpoint when the file is missing, not what the manifest says, or makes no sense with it.
    """
    if manifest.index is None:
        return index_of(manifest.tensors, manifest)
    path = directory / INDEX_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {path}: {error.strerror}") from error
    _check_file(path, data, manifest.index)
    try:
        return _decode(data, manifest)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{path}: {error}") from error


def index_of(tensors: Sequence[TensorEntry], manifest: Manifest) -> TensorIndex:
    """The same of tensors that were listed, and checked, in the manifest."""
    starts = [partition.start_bytes for partition in manifest.partitions]
    return TensorIndex(
        [tensor.name for tensor in tensors],
        [tensor.dtype for tensor in tensors],
        [tensor.shape for tensor in tensors],
        [starts[tensor.partition] + tensor.offset_bytes for tensor in tensors],
        [tensor.size_bytes for tensor in tensors],
    )


def _check_file(path: Path, data: bytes, entry: AssetEntry) -> None:
    if len(data) != entry.size_bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise InvalidCheckpoint(f"{path} is not what was ingested; verify the checkpoint, or ingest the model again")


def _decode(data: bytes, manifest: Manifest) -> TensorIndex:
    if len(data) < _HEADER.size:
        raise InvalidCheckpoint("the list of tensors is cut short")
    magic, count, dimensions, text_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise InvalidCheckpoint("this is no list of tensors of a version that this build reads")
    fixed = sum(np.dtype(kind).itemsize for _, kind in _FIELDS)
    if len(data) != _HEADER.size + count * fixed + dimensions * 8 + text_bytes:
        raise InvalidCheckpoint(f"the list of {count} tensors has {len(data)} bytes, which is another number than it takes")
    at = _HEADER.size
    columns: dict[str, Any] = {}
    for name, kind in _FIELDS:
        columns[name] = np.frombuffer(data, kind, count, at)
        at += columns[name].nbytes
    sides = np.frombuffer(data, "<u8", dimensions, at)
    names = _names(data[at + sides.nbytes :], count)
    shapes = _shapes(columns, sides, names)
    starts = _starts(columns, manifest, names)
    _check_ties(manifest, names)
    return TensorIndex(names, [_DTYPES[code] for code in columns["dtypes"].tolist()], shapes, starts, columns["sizes"].tolist())


def _names(text: bytes, count: int) -> list[str]:
    try:
        names = text.decode().split("\0") if count else []
    except UnicodeDecodeError as error:
        raise InvalidCheckpoint(f"the names of the tensors are no text: {error}") from error
    if len(names) != count or "" in names:
        raise InvalidCheckpoint(f"there are {len(names)} names, or empty ones, for {count} tensors")
    if len(set(names)) != count:
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidCheckpoint(f"tensor {twice!r} is listed twice")
    return names


def _shapes(columns: dict[str, Any], sides: Any, names: list[str]) -> list[tuple[int, ...]]:
    """The shapes, which with the dtypes must make the sizes."""
    dtypes, ranks, sizes = columns["dtypes"], columns["ranks"], columns["sizes"]
    _refuse(dtypes >= len(_DTYPES), names, lambda at: f"has a dtype (number {dtypes[at]}) that this build does not know")
    _refuse(ranks > _MAX_RANK, names, lambda at: f"has {ranks[at]} dimensions")
    ends = np.cumsum(ranks, dtype=np.int64)
    if (ends[-1] if len(ends) else 0) != len(sides):
        raise InvalidCheckpoint(f"the tensors have {ends[-1] if len(ends) else 0} dimensions, {len(sides)} are listed")
    if len(sides) and int(sides.max()) > _MAX_COUNT:
        raise InvalidCheckpoint(f"a tensor has a dimension of {int(sides.max())}")
    owner = np.repeat(np.arange(len(ranks)), ranks)
    # In floating point first: what is small there is exact in integers, and what would overflow them is refused.
    about = np.ones(len(ranks))
    np.multiply.at(about, owner, sides.astype(np.float64))
    elements = np.ones(len(ranks), np.uint64)
    np.multiply.at(elements, owner, sides)
    wrong = (about > _MAX_COUNT) | (elements * _ITEM_BITS[dtypes] != sizes * np.uint64(8))
    _refuse(wrong, names, lambda at: f"has a shape and a dtype that do not make {sizes[at]} bytes")
    flat, begin = sides.tolist(), 0
    shapes: list[tuple[int, ...]] = []
    for end in ends.tolist():
        shapes.append(tuple(flat[begin:end]))
        begin = end
    return shapes


def _starts(columns: dict[str, Any], manifest: Manifest, names: list[str]) -> list[int]:
    """Where the tensors begin in the image; each within its partition, aligned, and over no other."""
    partitions, offsets, sizes = columns["partitions"], columns["offsets"], columns["sizes"]
    count = len(manifest.partitions)
    _refuse(partitions >= count, names, lambda at: f"is in partition {partitions[at]}, which does not exist")
    _refuse((offsets > _MAX_COUNT) | (sizes > _MAX_COUNT), names, lambda at: f"begins at {offsets[at]}, which is no place")
    limits = np.array([partition.size_bytes for partition in manifest.partitions], np.uint64)
    begins = np.array([partition.start_bytes for partition in manifest.partitions], np.uint64)
    if not len(names):
        return []
    _refuse(offsets + sizes > limits[partitions], names, lambda at: "reaches beyond its partition")
    loose = np.uint64(1) if manifest.layout == IN_PLACE else _ITEM_ALIGN[columns["dtypes"]]
    _refuse(offsets % loose != 0, names, lambda at: f"begins at {offsets[at]}, not aligned to its elements")
    starts = begins[partitions] + offsets
    (filled,) = np.nonzero(sizes)
    order = filled[np.argsort(starts[filled], kind="stable")]
    ends = starts[order] + sizes[order]
    (over,) = np.nonzero(ends[:-1] > starts[order][1:])
    if len(over):
        one, other = names[order[over[0]]], names[order[over[0] + 1]]
        raise InvalidCheckpoint(f"tensors {one!r} and {other!r} overlap")
    found: list[int] = starts.tolist()
    return found


def _check_ties(manifest: Manifest, names: list[str]) -> None:
    known = set(names)
    for alias, name in manifest.ties.items():
        if name not in known or alias in known:
            raise InvalidCheckpoint(f"tie {alias!r} -> {name!r} does not lead from a new name to a stored tensor")


def _refuse(wrong: Any, names: list[str], why: Any) -> None:
    (places,) = np.nonzero(wrong)
    if len(places):
        raise InvalidCheckpoint(f"tensor {names[places[0]]!r} {why(places[0])}")
