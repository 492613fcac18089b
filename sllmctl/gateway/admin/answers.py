"""How the admin API reads its requests and writes its answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar, get_args

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from schema.errors import InvalidInput, SllmError
from sllmctl.control.references import missing
from sllmctl.gateway.errors import BodyTooLarge, MethodNotAllowed, NoSuchPath, UnsupportedMediaType, http_status, retry_after
from sllmctl.gateway.openapi import operation_of

__all__ = [
    "Flag",
    "Items",
    "RefusalBody",
    "Routes",
    "broken",
    "decode",
    "error_answer",
    "item_answer",
    "json_answer",
    "known",
    "no_route",
    "read_body",
    "read_choice",
    "read_count",
    "read_flag",
    "read_number",
    "read_query",
    "refuse",
]

V = TypeVar("V")
Flag = Literal["0", "1"]
Routes = dict[tuple[str, str], Callable[[Request], Awaitable[Response]]]
"""Handlers by method and path; a path as Starlette writes it, below the API's prefix."""


class Refusal(msgspec.Struct, frozen=True):
    """``code`` is the error's class; ``param`` names the parameter at fault, where there is one."""

    code: str
    message: str
    param: str | None


class RefusalBody(msgspec.Struct, frozen=True):
    """The body of every refusal of the admin API."""

    error: Refusal


class Items(msgspec.Struct, Generic[V], frozen=True):
    """A list of things."""

    items: Sequence[V]


def read_query(request: Request) -> dict[str, str]:
    """The query's parameters. Raises InvalidInput for one that its `Operation` does not have, or that comes twice."""
    names = [each.name for each in operation_of(request.scope["endpoint"]).query]
    found: dict[str, str] = {}
    for key, value in request.query_params.multi_items():
        if key not in names:
            raise InvalidInput(f"unknown parameter {key!r}", key)
        if key in found:
            raise InvalidInput(f"parameter {key!r} is given twice", key)
        found[key] = value
    return found


def read_number(query: Mapping[str, str], key: str, default: float) -> float:
    """A parameter that is a number from 0 up. Raises InvalidInput."""
    try:
        number = float(query.get(key, default))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise InvalidInput(f"{key}: {query[key]!r} is no number from 0 up", key)
    return number


def read_count(query: Mapping[str, str], key: str, default: int, least: int, most: int) -> int:
    """A parameter that is a whole number, from ``least`` to ``most``. Raises InvalidInput."""
    text = query.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and least <= int(text) <= most):
        raise InvalidInput(f"{key}: {text!r} is no whole number from {least} to {most}", key)
    return int(text)


def read_choice(query: Mapping[str, str], key: str, choices: Any) -> str | None:
    """A parameter that is one of a Literal's; None where it is not given. Raises InvalidInput."""
    text = query.get(key)
    if text is not None and text not in get_args(choices):
        raise InvalidInput(f"{key}: {text!r} is none of {', '.join(get_args(choices))}", key)
    return text


def read_flag(query: Mapping[str, str], key: str) -> bool:
    """A parameter that is 1 for yes; 0, or not given, for no. Raises InvalidInput."""
    if (text := query.get(key, "0")) not in get_args(Flag):
        raise InvalidInput(f"{key}: {text!r} is neither 0 nor 1", key)
    return text == "1"


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The body. Raises BodyTooLarge, and UnsupportedMediaType for one that is not said to be JSON."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit_bytes:
                raise BodyTooLarge(f"the body is longer than {limit_bytes} bytes")
    except ClientDisconnect:
        raise InvalidInput("the body was broken off") from None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body and kind != "application/json":
        raise UnsupportedMediaType(f"content type {kind!r} is not application/json")
    return bytes(body)


def known(kind: str, name: str, found: V | None, names: Iterable[str] = ()) -> V:
    """What was looked for by its name, which is one of ``names``. Raises NotFound for None."""
    if found is None:
        raise missing(kind, name, names)
    return found


def decode(body: bytes, kind: Any) -> Any:
    """A body's struct. Raises InvalidInput."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"the body is wrong: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the body is not valid JSON: {error}") from error


def json_answer(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def item_answer(views: Sequence[object]) -> Response:
    return json_answer(Items(views))


def error_answer(error: SllmError) -> Response:
    param = error.param if isinstance(error, InvalidInput) else None
    body = RefusalBody(Refusal(error.code, error.message, param))
    headers = {}
    if (wait := retry_after(error)) is not None:
        headers["retry-after"] = wait
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allow
    return Response(msgspec.json.encode(body), http_status(error), headers, "application/json")


async def refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, SllmError)
    return error_answer(error)


async def no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        # The error knows the methods of one route; a path may have several.
        here = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        allow = ", ".join(sorted({method for route in here for method in route.methods}))
        return error_answer(MethodNotAllowed(f"{request.method} is not allowed on {request.url.path}; use {allow}", allow))
    return error_answer(NoSuchPath(f"nothing is at {request.url.path}"))


async def broken(_: Request, error: Exception) -> Response:
    """The answer to a defect of ours; Starlette raises it once more after this, so that the server logs it whole."""
    return error_answer(SllmError(f"{type(error).__name__} inside the manager; its log has more"))
