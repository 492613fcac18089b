"""What the manager's answers mean: views, lists of views, nothing, or the error that the body names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx
import msgspec

from schema.errors import Fault, InvalidInput, LinkError, Overloaded, SllmError

__all__ = ["decode", "items", "nothing", "problem", "reader"]

T = TypeVar("T")


class _Items(msgspec.Struct, Generic[T], frozen=True):
    items: tuple[T, ...]


class _Problem(msgspec.Struct, frozen=True):
    code: str
    message: str
    param: str | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Problem


def decode(body: bytes, kind: Any) -> Any:
    """A body as a struct of ``kind``. Raises LinkError when it is none."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise LinkError(f"the manager's answer cannot be read ({error}); are manager and command of one version?") from error


def reader(kind: type[T]) -> Callable[[int, bytes], T]:
    """Reads one view."""

    def read(_: int, body: bytes) -> T:
        result: T = decode(body, kind)
        return result

    return read


def items(kind: type[T]) -> Callable[[int, bytes], tuple[T, ...]]:
    """Reads a list of views."""

    def read(_: int, body: bytes) -> tuple[T, ...]:
        found: tuple[T, ...] = decode(body, _Items[kind]).items  # type: ignore[valid-type]
        return found

    return read


def nothing(_: int, __: bytes) -> None:
    """Reads an answer that says no more than that it was done."""
    return


def problem(answer: httpx.Response, path: Path) -> SllmError:
    """The error that an answer of 400 or more names; ``path`` is the socket that gave it."""
    try:
        named = msgspec.json.decode(answer.content, type=_ErrorBody).error
    except msgspec.DecodeError:
        return LinkError(f"{path} answered {answer.status_code} without an error body; is it a manager's admin socket?")
    error = Fault(named.code, named.message).to_error()
    if isinstance(error, InvalidInput):
        error.param = named.param
    elif isinstance(error, Overloaded) and "retry-after" in answer.headers:
        error.retry_after_s = float(answer.headers["retry-after"])
    return error
