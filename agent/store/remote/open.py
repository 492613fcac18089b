"""From a URL to the remote behind it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from agent.store.remote.api import Remote
from agent.store.remote.directory import DirectoryRemote
from agent.store.remote.s3 import S3Remote
from agent.store.remote.web import WebRemote
from schema.errors import InvalidInput
from schema.remote import RemoteSettings, check_remote_url

__all__ = ["open_remote"]


def open_remote(url: str, settings: RemoteSettings) -> Remote:
    """The remote of a URL. Raises InvalidInput for one that no remote here has, or that carries a credential."""
    check_remote_url(url)
    split = urlsplit(url)
    if split.scheme == "file":
        return DirectoryRemote(url, Path(unquote(split.path)))
    if split.scheme == "s3":
        return S3Remote(url, split.netloc, unquote(split.path), settings)
    if split.scheme in ("http", "https"):
        return WebRemote(url, settings)
    raise InvalidInput(f"{url}: no remote is known by {split.scheme}://", "url")
