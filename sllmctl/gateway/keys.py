"""Idempotency keys: the header by which a client says that a request is a retry, made a `RetryKey`.

As in the IETF's draft of the header: the same key with another request is refused with status 422.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

from msgspec import Meta

from schema.errors import InvalidInput
from schema.link import RetryKey
from sllmctl.gateway.generate import Job
from sllmctl.gateway.openapi import Query

__all__ = ["IDEMPOTENCY_KEY", "KEY_HEADER", "retry_key"]

KEY_HEADER: Final = b"idempotency-key"
_LONGEST: Final = 255

IDEMPOTENCY_KEY: Final = Query(
    "Idempotency-Key",
    Annotated[str, Meta(min_length=1, max_length=_LONGEST, pattern=r"^[!-~]+$")],
    "Names this request: sent again with the same key and body, it joins the one that runs, or gets the reply that was made.",
)


def retry_key(key: bytes, path: str, body: bytes, job: Job) -> RetryKey:
    """How retries of a job are known: by ``key``, the same body, and the same checkpoint under its model's name.

    Raises InvalidInput for a key that is none.
    """
    if not 0 < len(key) <= _LONGEST or not all(0x21 <= byte <= 0x7E for byte in key):
        raise InvalidInput(f"Idempotency-Key: it must be 1 to {_LONGEST} visible ASCII characters", "Idempotency-Key")
    asked = hashlib.sha256(b"%b\0%b\0" % (path.encode(), job.text.digest.encode()))
    asked.update(body)
    return RetryKey(key=hashlib.sha256(key).hexdigest(), body=asked.hexdigest(), choices=job.choices)
