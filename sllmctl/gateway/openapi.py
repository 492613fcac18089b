"""OpenAPI documents of our HTTP APIs: made of the route table, of what each handler says of itself, and of its message types.

Nothing of a document is written by hand a second time: a handler's `Operation` is also what its requests are read by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import msgspec

from schema.errors import Overloaded, SllmError, Unschedulable
from schema.version import VERSION
from sllmctl.gateway.errors import answer_of_kind

__all__ = ["Operation", "Query", "RouteTable", "document", "operation", "operation_of"]

_REF = "#/components/schemas/{name}"
_JSON, _EVENTS = "application/json", "text/event-stream"

H = TypeVar("H", bound=Callable[..., Any])
RouteTable = Iterable[tuple[str, str, Any]]
"""(method, path, handler); a path as Starlette writes it."""


class Query(NamedTuple):
    """A parameter of the query string."""

    name: str
    type: Any
    text: str


@dataclass(frozen=True, slots=True)
class Operation:
    """What a handler takes and gives. ``answers``: the body's type by status, None for no body; of type ``content``.

    ``events``: the type of each server-sent event's data, where the first answer may come, or always comes, as a stream.
    ``errors``: the kinds it may be refused with beside those that every route of its API has. ``also``: further members of the
    body, by their JSON Schema; with it the body is closed to any other.
    """

    summary: str
    answers: Mapping[int, Any]
    body: Any = None
    body_required: bool = True
    also: Mapping[str, Any] = field(default_factory=dict)
    query: tuple[Query, ...] = ()
    headers: tuple[Query, ...] = ()
    errors: tuple[type[SllmError], ...] = ()
    events: Any = None
    content: str = _JSON


def operation(summary: str, answers: Mapping[int, Any] | Any = None, **more: Any) -> Callable[[H], H]:
    """Say of a handler what it takes and gives; ``answers`` may be the one type that it answers 200 with."""
    said = Operation(summary, answers if isinstance(answers, Mapping) else {200: answers}, **more)

    def say(handler: H) -> H:
        handler.operation = said  # type: ignore[attr-defined]
        return handler

    return say


def operation_of(handler: Any) -> Operation:
    """What a handler has said of itself; every handler of a route must."""
    said = getattr(handler, "operation", None)
    if not isinstance(said, Operation):
        raise TypeError(f"{handler} does not say what it takes and gives: it needs @operation")
    return said


def document(title: str, text: str, routes: RouteTable, *, error: type, always: tuple[type[SllmError], ...]) -> bytes:
    """The document as JSON. ``error`` is the type of every refusal's body, ``always`` the refusals that each route has."""
    table = [(method, path, operation_of(handler)) for method, path, handler in routes]
    schemas = _Schemas([error, *(kind for _, _, said in table for kind in _types(said))])
    paths: dict[str, dict[str, Any]] = {}
    for method, path, said in table:
        plain = re.sub(r":\w+}", "}", path)
        paths.setdefault(plain, {})[method.lower()] = _described(method, plain, said, schemas, error, always)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": title, "version": VERSION, "description": text},
            "paths": paths,
            "components": {"schemas": schemas.components},
        }
    )


class _Schemas:
    """The JSON Schemas of types, those of structs by reference."""

    def __init__(self, kinds: Iterable[Any]) -> None:
        self._by_kind: list[tuple[Any, dict[str, Any]]] = []
        distinct: list[Any] = []
        for kind in kinds:
            if kind not in distinct:
                distinct.append(kind)
        schemas, self.components = msgspec.json.schema_components(distinct, ref_template=_REF)
        self._by_kind = list(zip(distinct, schemas, strict=True))

    def of(self, kind: Any) -> dict[str, Any]:
        return next(schema for each, schema in self._by_kind if each == kind)

    def close(self, kind: Any, also: Mapping[str, Any]) -> None:
        """Add members to a struct's schema, and allow no other."""
        component = self.components[self.of(kind)["$ref"].rpartition("/")[2]]
        component["properties"].update(also)
        component["additionalProperties"] = False


def _types(said: Operation) -> Iterable[Any]:
    given = [kind for kind in (said.body, said.events, *said.answers.values()) if kind is not None]
    return [*given, *(each.type for each in (*said.query, *said.headers))]


def _described(
    method: str, path: str, said: Operation, schemas: _Schemas, error: type, always: tuple[type[SllmError], ...]
) -> dict[str, Any]:
    places = [(name, "path", True, {"type": "string", "minLength": 1}, "") for name in re.findall(r"{(\w+)}", path)]
    places += [(each.name, "query", False, schemas.of(each.type), each.text) for each in said.query]
    places += [(each.name, "header", False, schemas.of(each.type), each.text) for each in said.headers]
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").rstrip("_"),
        "summary": said.summary,
        "responses": {
            **{str(status): _answer(said, kind, schemas) for status, kind in said.answers.items()},
            **_refusals((*always, *said.errors), schemas.of(error), set(said.answers)),
        },
    }
    if places:
        described["parameters"] = [
            {"name": name, "in": where, "required": required, "schema": schema, **({"description": text} if text else {})}
            for name, where, required, schema, text in places
        ]
    if said.body is not None:
        if said.also:
            schemas.close(said.body, said.also)
        described["requestBody"] = {"required": said.body_required, "content": {_JSON: {"schema": schemas.of(said.body)}}}
    return described


def _answer(said: Operation, kind: Any, schemas: _Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if kind is not None:
        content[said.content] = {"schema": schemas.of(kind)}
    if said.events is not None:
        data = schemas.of(said.events)["$ref"].rpartition("/")[2]
        content[_EVENTS] = {"schema": {"type": "string", "description": f"Server-sent events; the data of each is a {data}."}}
    return {"description": said.summary, **({"content": content} if content else {})}


def _refusals(kinds: tuple[type[SllmError], ...], body: dict[str, Any], taken: set[int]) -> dict[str, Any]:
    by_status: dict[int, list[type[SllmError]]] = {}
    for kind in kinds:
        by_status.setdefault(answer_of_kind(kind).status, []).append(kind)
    refusals: dict[str, Any] = {}
    for status, those in sorted(by_status.items()):
        if status in taken:
            continue
        texts = dict.fromkeys((kind.__doc__ or kind.__name__).partition("\n")[0] for kind in those)
        refusals[str(status)] = {"description": " ".join(texts), "content": {_JSON: {"schema": body}}}
        if any(issubclass(kind, Overloaded | Unschedulable) for kind in those):
            refusals[str(status)]["headers"] = {
                "Retry-After": {"description": "Seconds until another try may do.", "schema": {"type": "integer"}}
            }
    return refusals
