"""A remote in an S3-compatible store, ``s3://bucket/prefix``, with boto3 (the extra ``s3``).

boto3 signs; the bytes of a range come over our own `Wire`, into the memory they are meant for. Credentials are found by
boto3's own chain (environment, profile, instance role) on the node.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import datetime
from typing import Any, Final

from agent.store.remote.api import STALE_S, Body, Forbidden, Interrupted, Source, nothing_there
from agent.store.remote.web import read_whole
from agent.store.remote.wire import Wire
from schema.errors import Cancelled, InvalidInput, NotFound, OutOfSpace, SllmError, Unauthorised, Unreachable
from schema.remote import RemoteSettings

__all__ = ["S3Remote"]

_PART_BYTES: Final = 16 << 20
_PARTS: Final = 9_000
"""Below the 10,000 that S3 allows; a larger file has larger parts."""
_UPLOADS: Final = 4
_SIGNED_S: Final = 3600
_FORBIDDEN: Final = ("AccessDenied", "403", "Forbidden")
_DENIED: Final = ("401", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
_MISSING: Final = ("NoSuchKey", "NoSuchBucket", "404", "NotFound")
_FULL: Final = ("QuotaExceeded", "XMinioStorageFull", "EntityTooLarge")
_PASSING: Final = ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "BadDigest", "NoSuchUpload")
_OURS: Final = re.compile(r"[0-9a-f]{64}/[^/]+/[^/]+")
"""What a layout's files are called below a remote's prefix."""
_log = logging.getLogger(__name__)


class S3Remote:
    """A `Remote` over one bucket and a prefix."""

    def __init__(self, url: str, bucket: str, prefix: str, settings: RemoteSettings) -> None:
        self.url = url
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._wire = Wire(settings)
        self._stopped = threading.Event()
        self._swept = False
        self._client = _client(settings, settings.read_s, settings.attempts)
        # A store puts the parts of a large file together before it answers.
        self._patient = _client(settings, settings.part_s, 2)

    def where(self, path: str) -> str:
        return f"s3://{self._bucket}/{self._key(path)}"

    @contextlib.contextmanager
    def open(
        self, path: str, offset: int, length: int, *, total_bytes: int | None = None, deadline: float | None = None
    ) -> Iterator[Body]:
        with self._wire.range(self._signed(path), self.where(path), {}, offset, length, total_bytes, deadline) as body:
            yield body

    def read(self, path: str, limit_bytes: int, part_s: float | None = None) -> bytes:
        return read_whole(self._wire, self._signed(path), self.where(path), {}, limit_bytes, part_s)

    def size(self, path: str) -> int | None:
        try:
            with self._errors(path):
                return int(self._client.head_object(Bucket=self._bucket, Key=self._key(path))["ContentLength"])
        except NotFound:
            return None

    def children(self, path: str) -> list[str]:
        prefix = self._key(path).rstrip("/") + "/"
        names: list[str] = []
        with self._errors(path):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/")
            for page in pages:
                names += [each["Prefix"][len(prefix) :].rstrip("/") for each in page.get("CommonPrefixes", ())]
        return sorted(names)

    def write(self, path: str, size_bytes: int, source: Source, wrote: Callable[[int], None]) -> None:
        key = {"Bucket": self._bucket, "Key": self._key(path)}
        with self._errors(path):
            if size_bytes <= _PART_BYTES:
                data = bytes(source(0, size_bytes))
                self._client.put_object(**key, Body=data, ContentMD5=_md5(data))
                wrote(size_bytes)
                return
            self._sweep()
            upload = {**key, "UploadId": self._client.create_multipart_upload(**key)["UploadId"]}
            try:
                parts = self._upload(upload, size_bytes, source, wrote)
                self._complete(upload, parts)
            except BaseException:
                with contextlib.suppress(Exception):  # what counts is why it failed; a later publish ends the upload
                    self._client.abort_multipart_upload(**upload)
                raise

    def abort(self) -> None:
        self._stopped.set()
        self._wire.stop()

    def close(self) -> None:
        self._wire.close()
        self._client.close()
        self._patient.close()

    def _complete(self, upload: dict[str, str], parts: list[dict[str, Any]]) -> None:
        """Make a file of its parts. One whose answer was lost is there all the same, and its upload is no more."""
        from botocore import exceptions

        lost = exceptions.ClientError, exceptions.HTTPClientError, exceptions.ConnectionError
        try:
            self._patient.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except lost:
            with contextlib.suppress(*lost):
                found = self._client.head_object(Bucket=upload["Bucket"], Key=upload["Key"])["ETag"]
                if found == _etag([part["ETag"] for part in parts]):
                    return
            raise

    def _upload(
        self, upload: dict[str, str], size_bytes: int, source: Source, wrote: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """The parts of a multipart upload, a few at once; so many are in memory."""
        part_bytes = max(_PART_BYTES, -(-size_bytes // _PARTS // _PART_BYTES) * _PART_BYTES)

        def send(number: int) -> dict[str, Any]:
            if self._stopped.is_set():
                raise Cancelled("the transfer was cancelled")
            offset = number * part_bytes
            data = bytes(source(offset, min(part_bytes, size_bytes - offset)))
            answer = self._client.upload_part(**upload, PartNumber=number + 1, Body=data, ContentMD5=_md5(data))
            wrote(len(data))
            return {"PartNumber": number + 1, "ETag": answer["ETag"]}

        parts: list[dict[str, Any]] = []
        with ThreadPoolExecutor(_UPLOADS, thread_name_prefix="upload") as pool:
            pending: set[Future[dict[str, Any]]] = set()
            try:
                for number in range(-(-size_bytes // part_bytes)):
                    if len(pending) >= _UPLOADS:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        parts += [each.result() for each in done]
                    pending.add(pool.submit(send, number))
                parts += [each.result() for each in pending]
            finally:
                for each in pending:
                    each.cancel()
        return sorted(parts, key=lambda part: int(part["PartNumber"]))

    def _sweep(self) -> None:
        """End the uploads of checkpoints below this prefix that were broken off: until then a store keeps, and charges for,
        parts that no listing of files shows. Once per remote; credentials that may not list uploads cost nothing but that."""
        from botocore import exceptions

        if self._swept:
            return
        self._swept = True
        prefix = f"{self._prefix}/" if self._prefix else ""
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix)
            for upload in [each for page in pages for each in page.get("Uploads", ())]:
                which = {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                if _OURS.fullmatch(upload["Key"].removeprefix(prefix)) and self._is_stale(which, upload["Initiated"]):
                    self._client.abort_multipart_upload(**which)
                    _log.info("ended an upload of s3://%s/%s that had been broken off", self._bucket, upload["Key"])
        except (exceptions.ClientError, exceptions.BotoCoreError) as error:
            _log.info("uploads to %s that were broken off stay there: %s", self.url, type(error).__name__)

    def _is_stale(self, upload: dict[str, str], begun: datetime) -> bool:
        pages = self._client.get_paginator("list_parts").paginate(**upload)
        times: list[datetime] = [begun, *(part["LastModified"] for page in pages for part in page.get("Parts", ()))]
        return time.time() - max(times).timestamp() > STALE_S

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _signed(self, path: str) -> str:
        """An address that may be read for a while. It is as good as a credential: never logged, never in a message."""
        with self._errors(path):
            params = {"Bucket": self._bucket, "Key": self._key(path)}
            return str(self._client.generate_presigned_url("get_object", Params=params, ExpiresIn=_SIGNED_S))

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turns boto's errors into ours; of a server's message only its code is told on."""
        from botocore import exceptions

        where = self.where(path)
        if self._stopped.is_set():
            raise Cancelled("the transfer was cancelled")
        try:
            yield
        except exceptions.ClientError as error:
            raise _explain(str(error.response.get("Error", {}).get("Code", "")), _status(error.response), where) from None
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
            raise Unauthorised(
                f"{where}: the node's agent has no credentials for S3; set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in its environment"
            ) from error
        except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
            raise Interrupted(f"{where}: the store does not answer ({type(error).__name__})") from error
        except exceptions.BotoCoreError as error:
            raise SllmError(f"{where}: {type(error).__name__}: {error}") from error


def _etag(parts: list[str]) -> str:
    """What a store calls a file that it made of parts with these tags: the MD5 of their MD5s, and how many they are. Tags that
    are no MD5, as of encrypted parts, make one that no file has."""
    try:
        sums = b"".join(bytes.fromhex(part.strip('"')) for part in parts)
    except ValueError:
        return ""
    return f'"{hashlib.md5(sums, usedforsecurity=False).hexdigest()}-{len(parts)}"'


def _client(settings: RemoteSettings, read_s: float, attempts: int) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise InvalidInput("s3:// needs boto3 on the node; install the extra s3 (pip install 'sllmctl[s3]')", "url") from error
    config = Config(
        signature_version="s3v4",
        connect_timeout=settings.connect_s,
        read_timeout=read_s,
        retries={"mode": "standard", "max_attempts": attempts},
        max_pool_connections=_UPLOADS + 2,
        request_checksum_calculation="when_required",  # stores other than AWS's do not all know the newer ones
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"} if settings.s3_endpoint else {},
    )
    try:
        return boto3.session.Session().client(
            "s3", config=config, endpoint_url=settings.s3_endpoint or None, region_name=settings.s3_region or None
        )
    except (BotoCoreError, ValueError) as error:
        raise InvalidInput(f"the node's settings for S3 are not usable: {error}", "remote") from error


def _md5(data: bytes) -> str:
    """What lets the store refuse bytes that changed on their way; every kind of store knows it."""
    return b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _status(response: dict[str, Any]) -> int:
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _explain(code: str, status: int, where: str) -> SllmError:
    if code in _FULL:
        return OutOfSpace(f"{where}: the store takes no more ({code})")
    if status >= 500 or code in _PASSING:
        return Interrupted(f"{where}: the store answers {code or status}")
    if code == "NoSuchBucket":
        return NotFound(f"{where}: there is no such bucket; make it, or name another remote")
    if code in _MISSING or status == 404:
        return nothing_there(where)
    if code in _FORBIDDEN:
        return Forbidden(
            f"{where}: access is refused ({code}); give the node's agent credentials that may use it and list the bucket, "
            "without which S3 also refuses what is not there"
        )
    if code in _DENIED or status in (401, 403):
        return Unauthorised(f"{where}: access is refused ({code or status}); give the node's agent credentials that may use it")
    return Unreachable(f"{where}: the store answers {code or status}")
