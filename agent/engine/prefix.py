"""Names of prefixes: a chain of digests, one for each full block of a sequence, each over all tokens up to that block's end.

A digest begins with the model, the adapter and the tenant, so that what one may reuse no other ever finds; it is cryptographic
(BLAKE2b, 256 bits), so that nobody can make a prefix that is taken for another's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from hashlib import blake2b
from typing import Final

import msgspec

__all__ = ["BLOCK_TOKENS", "PrefixChain", "prefix_salt"]

BLOCK_TOKENS: Final = 16
"""Tokens whose keys and values one block holds."""
_DIGEST_BYTES: Final = 32


def prefix_salt(model: str, tenant: str, adapter: str = "") -> bytes:
    """Where a chain begins: who may share it, over what weights. ``model`` is the checkpoint's digest."""
    return blake2b(msgspec.msgpack.encode((model, adapter, tenant)), digest_size=_DIGEST_BYTES).digest()


class PrefixChain:
    """The digests of a growing sequence's full blocks, made as they are asked for."""

    __slots__ = ("_digests", "_salt")

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self._digests: list[bytes] = []

    def upto(self, tokens: Items[int], blocks: int) -> list[bytes]:
        """At least the first ``blocks`` digests of ``tokens``, which have as many full blocks and begin as they ever did."""
        digests = self._digests
        done = len(digests)
        if done < blocks:
            last = digests[-1] if digests else self._salt
            ids = array("I", tokens[done * BLOCK_TOKENS : blocks * BLOCK_TOKENS]).tobytes()
            size = len(ids) // (blocks - done)
            for start in range(0, len(ids), size):
                last = blake2b(ids[start : start + size], digest_size=_DIGEST_BYTES, key=last).digest()
                digests.append(last)
        return digests
