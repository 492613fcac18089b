"""What the URL of a remote may be, and how a node speaks to remotes: known to the manager and to the agents."""

from __future__ import annotations

from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from schema.errors import InvalidInput

__all__ = ["SCHEMES", "RemoteSettings", "check_remote_url"]

SCHEMES: Final = ("file", "http", "https", "s3")
_MAX_LENGTH: Final = 1024
_Seconds = Annotated[float, Meta(ge=0)]


class RemoteSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How this node speaks to remotes; credentials come from the environment and files of the agent's user alone.

    ``s3_endpoint`` ("" is AWS's) and ``s3_region``. ``streams``: requests at once in a fetch, each for ``part_bytes``.
    ``connect_s`` and ``read_s``: until a server must accept, and send something. ``part_s``: how long a part may take over one
    connection; the rest of it then comes over another. ``attempts``: tries in a row that brought neither 256 KiB nor what was
    asked for, at most ``longest_delay_s`` apart.
    ``keep_partial_s``: how long what a fetch that broke off has left on the disk is kept for the next.
    """

    s3_endpoint: str = ""
    s3_region: str = ""
    streams: Annotated[int, Meta(ge=1, le=64)] = 8
    part_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 30)] = 32 << 20
    connect_s: Annotated[float, Meta(gt=0)] = 10.0
    read_s: Annotated[float, Meta(gt=0)] = 30.0
    part_s: Annotated[float, Meta(gt=0)] = 300.0
    attempts: Annotated[int, Meta(ge=1, le=100)] = 6
    longest_delay_s: _Seconds = 10.0
    keep_partial_s: _Seconds = 7 * 86400.0


def check_remote_url(url: str) -> str:
    """A URL that names a remote, without a slash at its end.

    Raises InvalidInput for another scheme, for what is missing, and for anything that may hold a credential: that belongs
    into the node's environment, since a URL is stored and shown.
    """
    if len(url) > _MAX_LENGTH or not url.isprintable() or any(each.isspace() for each in url):
        raise InvalidInput(f"the URL of a remote is printable, without spaces, and at most {_MAX_LENGTH} long", "url")
    try:
        split = urlsplit(url)
        _ = split.port if split.scheme != "s3" else None
    except ValueError as error:
        raise InvalidInput(f"the URL of the remote is not valid: {error}", "url") from error
    if "@" in split.netloc or split.query or split.fragment:
        # What stands there is not repeated: it may be a secret.
        raise InvalidInput(
            "the URL of a remote has no user, password, query or fragment; credentials come from the node", "url"
        )
    if split.scheme not in SCHEMES:
        raise InvalidInput(f"{url}: a remote is file:///directory, http(s)://host/path or s3://bucket/prefix", "url")
    if split.scheme == "file" and (split.netloc or not split.path.startswith("/")):
        raise InvalidInput(f"{url}: a directory is given as file:///its/absolute/path", "url")
    if split.scheme != "file" and not split.netloc:
        raise InvalidInput(f"{url} names no {'bucket' if split.scheme == 's3' else 'host'}", "url")
    if ".." in split.path.split("/"):
        raise InvalidInput(f"{url}: a remote's path has no '..'", "url")
    return url.rstrip("/") if split.path.strip("/") else url
