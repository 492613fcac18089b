"""What lies on this node's disk: committed checkpoints under ``<root>/<digest>/<layout>/``, opened, judged and removed.

Two marker files beside a manifest say what is known of the bytes: ``verified`` (every checksum was right once) and
``quarantined`` (one was not; its text says which).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.store.durable import replace, sync
from schema.checkpoint import IN_PLACE, LAYOUTS, Manifest, Partition, SourceFile, decode_manifest
from schema.errors import InvalidCheckpoint, NotFound, SllmError

__all__ = [
    "MANIFEST_FILE",
    "CatalogEntry",
    "DamagedCopy",
    "Found",
    "Identity",
    "absolve",
    "changed_source",
    "check_assets",
    "commit",
    "identity",
    "is_sound",
    "is_verified",
    "judge_assets",
    "look",
    "mark",
    "mark_verified",
    "partition_path",
    "quarantine",
    "quarantine_reason",
    "read_entry",
    "release",
    "remove",
    "scan",
    "unmark_verified",
]

MANIFEST_FILE: Final = "manifest.json"
_VERIFIED: Final = "verified"
_QUARANTINED: Final = "quarantined"
_MAX_MANIFEST_BYTES: Final = 256 << 20
Identity = tuple[int, int, int]
_DIGEST = re.compile(r"[0-9a-f]{64}")
_unwritten: dict[Identity, str] = {}
"""Why copies are in quarantine whose disk took no mark: one that fails is often made read-only by the system."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A committed checkpoint: its layout's directory and its checked manifest. ``quarantined`` says why, or is None;
    ``changed`` what of the user's files is not as it was, which is one reason. ``identity`` tells it from what lies there
    later."""

    digest: str
    directory: Path
    manifest: Manifest
    quarantined: str | None = None
    changed: str | None = None
    identity: Identity | None = None


@dataclass(frozen=True, slots=True)
class DamagedCopy:
    """What lies where a checkpoint was and cannot be read as one: ``quarantined`` says why. It takes ``size_bytes`` on disk.

    Nothing is loaded from it. It is verified, removed and replaced like one in quarantine, which it is as long as that lasts.
    """

    digest: str
    directory: Path
    quarantined: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """What lies on the disk, every copy of it: ``copies`` that can be read, sound or in quarantine, the best ones first, and
    ``damaged`` ones, which only are there."""

    copies: tuple[CatalogEntry, ...]
    damaged: tuple[DamagedCopy, ...]

    @property
    def entries(self) -> dict[str, CatalogEntry]:
        """The best copy of each digest of which one can be read."""
        return {copy.digest: copy for copy in reversed(self.copies)}


def look(checkpoints_path: Path) -> Found:
    """All copies of all checkpoints. Sound ones are better than others, copies better than files in their place, and else the
    first by name is.

    What a damaged copy was once known for counts no longer: its bytes are looked at again when it can be read.
    """
    copies: list[CatalogEntry] = []
    damaged: list[DamagedCopy] = []
    for directory in _directories(checkpoints_path):
        copy = identity(directory)
        try:
            copies.append(read_entry(directory))
        except SllmError as error:
            if _is_gone(directory):  # just now
                continue
            _log.warning("the checkpoint in %s is damaged: %s", directory, error)
            mark(unmark_verified, directory, copy)
            reason = str(error)
            with contextlib.suppress(SllmError):
                reason = quarantine_reason(directory) or reason
            damaged.append(DamagedCopy(directory.parent.name, directory, reason, _size(directory)))
    return Found(tuple(sorted(copies, key=_rank)), tuple(damaged))


def scan(checkpoints_path: Path) -> dict[str, CatalogEntry]:
    """The checkpoints that can be read, by digest."""
    return look(checkpoints_path).entries


def _rank(entry: CatalogEntry) -> tuple[bool, bool]:
    return entry.quarantined is not None, entry.manifest.layout == IN_PLACE


def read_entry(directory: Path) -> CatalogEntry:
    """The checkpoint in a layout's directory, ``<digest>/<layout>``.

    Raises InvalidCheckpoint when its manifest is missing, makes no sense or is another checkpoint's, or a file's size is not
    what the manifest says; SllmError when the system fails to read it, which says nothing of the copy. A user's file that is
    no longer what it was puts its checkpoint into quarantine.
    """
    path = directory / MANIFEST_FILE
    which = identity(directory)  # first: whatever replaces it from here on is another
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > _MAX_MANIFEST_BYTES:
        raise InvalidCheckpoint(f"{path} is larger than {_MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = decode_manifest(data)
    except (InvalidCheckpoint, RecursionError) as error:
        raise InvalidCheckpoint(f"{path}: {error}") from error
    if (manifest.digest, manifest.layout) != (directory.parent.name, directory.name):
        raise InvalidCheckpoint(f"{path} is of checkpoint {manifest.digest}, layout {manifest.layout}: it was moved")
    for partition in manifest.partitions:
        if partition.source is None:
            _check_size(directory / partition.file, partition.size_bytes)
    for asset in manifest.assets:
        _check_size(directory / asset.file, asset.size_bytes)
    changed = changed_source(manifest)
    quarantined = changed or quarantine_reason(directory)
    if quarantined is None and which is not None:
        quarantined = _unwritten.get(which)
    return CatalogEntry(manifest.digest, directory, manifest, quarantined, changed, which)


def is_sound(directory: Path) -> bool:
    """True when a checkpoint lies there that may be used. Raises SllmError when that cannot be told now."""
    try:
        return read_entry(directory).quarantined is None
    except InvalidCheckpoint:
        return False


def partition_path(directory: Path, partition: Partition) -> Path:
    """Where a partition's file lies: in its layout's directory, or wherever the user has it."""
    return directory / partition.file if partition.source is None else Path(partition.source.path)


def changed_source(manifest: Manifest) -> str | None:
    """What has become of the user's files since they were added in place; None while all are as they were."""
    for partition in manifest.partitions:
        if partition.source is not None and (what := _change(partition.source, partition.size_bytes)) is not None:
            return f"{partition.source.path} {what} since it was added in place; remove the model and add it again"
    return None


def _change(source: SourceFile, size_bytes: int) -> str | None:
    try:
        status = os.lstat(source.path)
    except OSError as error:
        return f"cannot be read any more ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file any more"
    if status.st_size != size_bytes:
        return f"has changed from {size_bytes} to {status.st_size} bytes"
    if status.st_ino != source.inode:
        return "was replaced by another file"
    return "was written to" if status.st_mtime_ns != source.mtime_ns else None


def check_assets(directory: Path, manifest: Manifest) -> None:
    """Compare the small files, text and list of tensors, with their checksums. Raises InvalidCheckpoint naming the bad one,
    SllmError when one cannot be read."""
    for asset in manifest.assets:
        path = directory / asset.file
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
        except OSError as error:
            raise _unreadable(path, error) from error
        if (size, found) != (asset.size_bytes, asset.sha256):
            raise InvalidCheckpoint(
                f"{path}: its {size} bytes are not what was ingested (sha256 {found}, expected {asset.sha256})"
            )


def judge_assets(directory: Path) -> None:
    """Compare the small files of a copy with their checksums: a wrong one puts it into quarantine. Raises SllmError when one
    cannot be read."""
    entry = read_entry(directory)
    try:
        check_assets(directory, entry.manifest)
    except InvalidCheckpoint as error:
        mark(quarantine, directory, entry.identity, str(error))


def commit(new: Path, target: Path, replaced: Path) -> bool:
    """Make a finished layout durable, then visible at ``target``; False when a sound copy lies there, which is kept.

    Files first, their directory, the rename, and the directories that it happened in. What lay there and was not sound is
    moved to ``replaced`` once the new one lies there, and is the caller's to delete. All must be of one file system. Raises
    OSError.
    """
    for file in new.iterdir():
        sync(file)
    sync(new)
    replaced.parent.mkdir(parents=True, exist_ok=True)
    placed = False
    for last in (False, True):
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_sound(target):
            break
        try:
            if target.exists():
                replace(new, target, replaced)
            else:
                new.rename(target)
            placed = True
            break
        except OSError as error:  # whoever fetches, ingests or removes the same may have been here just now: look again
            if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
    sync(target.parent)
    sync(target.parent.parent)
    return placed


def has_come(target: Path) -> bool:
    """True when a sound copy lies where one was to be committed, by whoever did not live to say so; it is durable then.

    Raises SllmError, OSError when that cannot be told, or made sure of.
    """
    if not is_sound(target):
        return False
    sync(target.parent)
    sync(target.parent.parent)
    return True


def remove(entry: CatalogEntry | DamagedCopy) -> None:
    """Take a checkpoint from the disk for good. It is gone at once: moved to the data directory's ``tmp``, then deleted.

    Of one in place only the manifest and what lies beside it goes; the user's files are not touched.
    """
    root = entry.directory.parent.parent
    trash = root.parent / "tmp" / f"trash-{entry.digest[:16]}-{entry.directory.name}-{secrets.token_hex(4)}"
    trash.parent.mkdir(parents=True, exist_ok=True)
    try:
        entry.directory.rename(trash)
    except FileNotFoundError as error:
        raise NotFound(f"checkpoint {entry.digest} is no longer on this node's disk") from error
    with contextlib.suppress(OSError):  # another layout may lie beside it
        entry.directory.parent.rmdir()
    shutil.rmtree(trash)


def is_verified(directory: Path) -> bool:
    """True when every chunk of this copy was once found right, as far as can be told now."""
    return os.path.exists(directory / _VERIFIED)  # noqa: PTH110 - False, where a Path's raises, on a disk that fails


def mark_verified(directory: Path) -> None:
    """Note that every chunk of this copy was found right, so that later loads need not look again."""
    (directory / _VERIFIED).touch()


def unmark_verified(directory: Path) -> None:
    """Note that this copy could not be read whole: the next load looks at every chunk again."""
    (directory / _VERIFIED).unlink(missing_ok=True)


def release(directory: Path) -> None:
    """Note that every byte of this copy was found right after all: it may be used again."""
    mark_verified(directory)
    (directory / _QUARANTINED).unlink(missing_ok=True)


def mark(write: Callable[..., None], directory: Path, copy: Identity | None, *reason: str) -> bool:
    """Write down what was found of a copy (`release`, `quarantine`, ...); False when another lies in its place by now, or when
    it cannot be written. That costs a second look later; a quarantine then holds as long as this process lives.

    The directory is held, so that what is put in its place between the look and the writing gets no mark that is not its own.
    """
    if write is release and copy is not None:
        _unwritten.pop(copy, None)
    try:
        held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            place = Path(f"/proc/self/fd/{held}")
            if identity(place) != copy:
                return False
            write(place, *reason)
        finally:
            os.close(held)
    except FileNotFoundError:  # nothing lies there any more
        return False
    except OSError as error:
        _log.warning("cannot write a marker in %s: %s", directory, error.strerror)
        if write is quarantine and copy is not None:
            _unwritten[copy] = reason[0]
        return False
    return True


def absolve(directory: Path) -> None:
    """Another process has found this copy right: what this one could not write down against it counts no longer."""
    if (copy := identity(directory)) is not None:
        _unwritten.pop(copy, None)


def identity(directory: Path) -> Identity | None:
    """What tells this copy from another that is put in its place: of its manifest, since markers change the directory. None
    when there is none."""
    try:
        status = (directory / MANIFEST_FILE).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def quarantine(directory: Path, reason: str) -> None:
    """Note that this copy is wrong, and why; it is not loaded until it was verified. Ingesting the model anew replaces it."""
    (directory / _VERIFIED).unlink(missing_ok=True)
    (directory / _QUARANTINED).write_text(reason)


def quarantine_reason(directory: Path) -> str | None:
    """Why this copy must not be used, or None. Raises SllmError when that cannot be told now."""
    try:
        return (directory / _QUARANTINED).read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SllmError(f"cannot read {directory / _QUARANTINED}: {error.strerror}") from error


def _directories(root: Path) -> Iterator[Path]:
    for outer in _children(root):
        if _DIGEST.fullmatch(outer.name):
            try:
                found = _children(outer)
            except OSError as error:  # which hides no other checkpoint, nor what of this one can be reached by its name
                _log.error("cannot look into %s: %s", outer, error.strerror)
                found = [outer / name for name in (*LAYOUTS, IN_PLACE)]
            yield from found


def _children(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as found:
            return sorted(path / child.name for child in found if child.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_gone(directory: Path) -> bool:
    try:
        directory.lstat()
    except OSError as error:
        return error.errno == errno.ENOENT
    return False


def _size(directory: Path) -> int:
    """What the files in a directory take of the disk."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(directory) as found:
        for each in found:
            with contextlib.suppress(OSError):
                status = each.stat(follow_symlinks=False)
                total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return total


def _check_size(path: Path, size_bytes: int) -> None:
    try:
        status = path.lstat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
        raise InvalidCheckpoint(f"{path} is no file of {size_bytes} bytes, as its manifest says ({status.st_size} there)")


def _unreadable(path: Path, error: OSError) -> SllmError:
    """The error of a file that could not be read: of the copy when it is not there or no file, else of the machine's state."""
    kind = InvalidCheckpoint if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR) else SllmError
    return kind(f"cannot read {path}: {error.strerror}")
