"""The list of a checkpoint's tensors in binary (``tensors.idx``), checked as hostile input, all tensors at a time.

Little-endian: a header, then one array after another. Per tensor: dtype (place in `_DTYPES`), rank, partition, offset and size
in bytes; then all dimensions one after another; then the names in UTF-8, separated by NUL. 19,000 tensors are read and checked
in 10 ms, of which a third goes to their names; as JSON they took 20 to 60.
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
_HASH: Final = np.uint64(0x9E3779B97F4A7C15)
_MAX_RANK: Final = 16
_MAX_COUNT: Final = 1 << 50
_FIELDS: Final = (("dtypes", "u1"), ("ranks", "u1"), ("partitions", "<u4"), ("offsets", "<u8"), ("sizes", "<u8"))


@dataclass(frozen=True, slots=True, eq=False)
class TensorIndex:
    """Tensors in execution order: names, where each starts in the image, its bytes, and of which kind it is.

    A kind is a safetensors dtype and a shape. A model has thousands of tensors and a dozen kinds, so that what depends on
    these two is done once for many (`agent.engine.image`). The arrays hold int64.
    """

    names: list[str]
    kinds: list[tuple[str, tuple[int, ...]]]
    kind_of: Any
    starts: Any
    sizes: Any

    def __len__(self) -> int:
        return len(self.names)

    @property
    def dtypes(self) -> list[str]:
        return [self.kinds[kind][0] for kind in self.kind_of.tolist()]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [self.kinds[kind][1] for kind in self.kind_of.tolist()]


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
    begins = [partition.start_bytes for partition in manifest.partitions]
    numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    kind_of = [numbers.setdefault((tensor.dtype, tensor.shape), len(numbers)) for tensor in tensors]
    return TensorIndex(
        [tensor.name for tensor in tensors],
        list(numbers),
        np.array(kind_of, np.int64),
        np.array([begins[tensor.partition] + tensor.offset_bytes for tensor in tensors], np.int64),
        np.array([tensor.size_bytes for tensor in tensors], np.int64),
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
    known = _known(names)
    kinds, kind_of = _kinds(columns, sides, names)
    starts = _starts(columns, manifest, names)
    _check_ties(manifest, known)
    return TensorIndex(names, kinds, kind_of, starts.astype(np.int64), columns["sizes"].astype(np.int64))


def _names(text: bytes, count: int) -> list[str]:
    try:
        names = text.decode().split("\0") if count else []
    except UnicodeDecodeError as error:
        raise InvalidCheckpoint(f"the names of the tensors are no text: {error}") from error
    if len(names) != count or "" in names:
        raise InvalidCheckpoint(f"there are {len(names)} names, or empty ones, for {count} tensors")
    return names


def _known(names: list[str]) -> set[str]:
    """The names as a set. Raises InvalidCheckpoint for one that is there twice."""
    known = set(names)
    if len(known) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidCheckpoint(f"tensor {twice!r} is listed twice")
    return known


def _kinds(columns: dict[str, Any], sides: Any, names: list[str]) -> tuple[list[tuple[str, tuple[int, ...]]], Any]:
    """The kinds, and of which each tensor is. Shapes and dtypes must make the sizes."""
    dtypes, ranks, sizes = columns["dtypes"], columns["ranks"], columns["sizes"]
    _refuse(dtypes >= len(_DTYPES), names, lambda at: f"has a dtype (number {dtypes[at]}) that this build does not know")
    _refuse(ranks > _MAX_RANK, names, lambda at: f"has {ranks[at]} dimensions")
    ends = np.cumsum(ranks, dtype=np.int64)
    if (ends[-1] if len(ends) else 0) != len(sides):
        raise InvalidCheckpoint(f"the tensors have {ends[-1] if len(ends) else 0} dimensions, {len(sides)} are listed")
    if len(sides) and int(sides.max()) > _MAX_COUNT:
        raise InvalidCheckpoint(f"a tensor has a dimension of {int(sides.max())}")
    codes = dtypes.astype(np.uint64)
    kinds: list[tuple[str, tuple[int, ...]]] = []
    kind_of = np.zeros(len(ranks), np.int64)
    wrong = np.zeros(len(ranks), np.bool_)
    for rank in np.unique(ranks).tolist():
        (members,) = np.nonzero(ranks == rank)
        shapes = sides[(ends[members] - rank)[:, None] + np.arange(rank)]
        wrong[members] = _wrong(shapes, dtypes[members], sizes[members])
        rows = np.column_stack([codes[members], shapes])
        different, found = _distinct(rows)
        kind_of[members] = found + len(kinds)
        kinds += [(_DTYPES[code], tuple(shape)) for code, *shape in rows[different].tolist()]
    _refuse(wrong, names, lambda at: f"has a shape and a dtype that do not make {sizes[at]} bytes")
    return kinds, kind_of


def _wrong(shapes: Any, dtypes: Any, sizes: Any) -> Any:
    """Which of the shapes, all of one rank, do not make their sizes."""
    # In floating point first: what is small there is exact in integers, and what would overflow them is refused.
    about, elements = np.ones(len(shapes)), np.ones(len(shapes), np.uint64)
    for side in shapes.T:
        about *= side
        elements *= side
    return (about > _MAX_COUNT) | (elements * _ITEM_BITS[dtypes] != sizes * np.uint64(8))


def _distinct(rows: Any) -> tuple[Any, Any]:
    """Places of the different rows, and for each row which of them it is. By a hash, since sorting rows takes ten times as
    long; should different ones have the same, they are sorted."""
    hashes = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        hashes = (hashes ^ column) * _HASH
        hashes ^= hashes >> np.uint64(29)
    _, places, found = np.unique(hashes, return_index=True, return_inverse=True)
    if not np.array_equal(rows[places][found], rows):
        _, places, found = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return places, found.reshape(-1)


def _starts(columns: dict[str, Any], manifest: Manifest, names: list[str]) -> Any:
    """Where the tensors begin in the image; each within its partition, aligned, and over no other."""
    partitions, offsets, sizes = columns["partitions"], columns["offsets"], columns["sizes"]
    count = len(manifest.partitions)
    _refuse(partitions >= count, names, lambda at: f"is in partition {partitions[at]}, which does not exist")
    _refuse((offsets > _MAX_COUNT) | (sizes > _MAX_COUNT), names, lambda at: f"begins at {offsets[at]}, which is no place")
    limits = np.array([partition.size_bytes for partition in manifest.partitions], np.uint64)
    begins = np.array([partition.start_bytes for partition in manifest.partitions], np.uint64)
    if not len(names):
        return np.zeros(0, np.uint64)
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
    return starts


def _check_ties(manifest: Manifest, known: set[str]) -> None:
    for alias, name in manifest.ties.items():
        if name not in known or alias in known:
            raise InvalidCheckpoint(f"tie {alias!r} -> {name!r} does not lead from a new name to a stored tensor")


def _refuse(wrong: Any, names: list[str], why: Any) -> None:
    (places,) = np.nonzero(wrong)
    if len(places):
        raise InvalidCheckpoint(f"tensor {names[places[0]]!r} {why(places[0])}")
