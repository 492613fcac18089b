"""What of a partition file is done, written down as it is done, so that another process can go on with the file.

A line for each chunk that was written, with its xxh3, and for each tensor that was read to its end, with its sha256. A chunk is
believed only when the file has those bytes; a line only with its own checksum, for a killed machine may leave anything.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Final

__all__ = ["Journal"]

_HEAD: Final = "ingest 1"


class Journal:
    """``chunks`` and ``tensors`` are those of an earlier process that did the same; ``identity`` says what that is.

    Methods may be called from several threads.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.chunks: dict[int, int] = {}
        self.tensors: dict[int, bytes] = {}
        head = _line(f"{_HEAD} {identity}")
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
        self.fresh = lines[:1] != [head]
        whole = 0
        for line in [] if self.fresh else lines:
            if not self._take(line):
                break
            whole += len(line)
        self._head = head
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._descriptor, whole)
        if self.fresh:
            os.write(self._descriptor, head)

    def forget(self) -> None:
        """Begin anew: the file is not what was written down."""
        self.chunks.clear()
        self.tensors.clear()
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, self._head)

    def chunk(self, number: int, xxh3: int) -> None:
        """A chunk was written."""
        os.write(self._descriptor, _line(f"c {number} {xxh3:016x}"))

    def tensor(self, number: int, sha256: bytes) -> None:
        """A tensor was read to its end."""
        os.write(self._descriptor, _line(f"t {number} {sha256.hex()}"))

    def close(self) -> None:
        os.close(self._descriptor)

    def _take(self, line: bytes) -> bool:
        text = line.decode("ascii", "replace")[:-10]
        if line != _line(text):
            return False
        match text.split():
            case ["c", number, xxh3]:
                self.chunks[int(number)] = int(xxh3, 16)
            case ["t", number, sha256]:
                self.tensors[int(number)] = bytes.fromhex(sha256)
        return True


def _line(text: str) -> bytes:
    data = text.encode("ascii", "replace")
    return data + f" {zlib.crc32(data):08x}\n".encode()
