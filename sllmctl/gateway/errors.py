"""How an error leaves over HTTP: its status, and its body in OpenAI's shape; the one table of both."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from schema.errors import (
    Cancelled,
    Conflict,
    ContextOverflow,
    InvalidCheckpoint,
    InvalidInput,
    LinkError,
    NotFound,
    OutOfSpace,
    Overloaded,
    SllmError,
    TimedOut,
    Unauthorised,
    Unreachable,
    Unschedulable,
)

__all__ = [
    "ALL_KINDS",
    "INTERNAL",
    "STOPPING",
    "Answer",
    "BodyTooLarge",
    "BodyTooSlow",
    "ErrorBody",
    "ErrorDetail",
    "KeyReused",
    "MethodNotAllowed",
    "NoSuchPath",
    "UnknownParameter",
    "UnsupportedMediaType",
    "UnsupportedParameter",
    "WrongHost",
    "answer_of",
    "answer_of_kind",
    "error_body",
    "http_status",
    "retry_after",
]


INTERNAL = "an internal error; the manager's log has the details"
"""What is told of an exception that is none of ours."""
STOPPING = "the manager is stopping; the request was given up"
"""What is told when it could not be waited for any longer."""


class UnsupportedParameter(InvalidInput):
    """A parameter that OpenAI's API knows and this server cannot honour; it is refused rather than dropped."""

    code = "unsupported_parameter"


class UnknownParameter(InvalidInput):
    """A parameter that nobody knows; most likely a slip."""

    code = "unknown_parameter"


class KeyReused(InvalidInput):
    """The request's Idempotency-Key was used before, for something else."""

    code = "idempotency_key_reused"


class BodyTooLarge(InvalidInput):
    """The request's body is longer than this server takes."""

    code = "body_too_large"


class BodyTooSlow(InvalidInput):
    """The request's body did not arrive in time."""

    code = "body_too_slow"


class UnsupportedMediaType(InvalidInput):
    """The request's body is said to be something else than JSON, or to be compressed."""

    code = "unsupported_media_type"


class MethodNotAllowed(InvalidInput):
    """The path exists, but not with this method; ``allow`` says with which."""

    code = "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class WrongHost(Unauthorised):
    """The request is for a host that this server is not; a web page may have sent it."""

    code = "wrong_host"


class NoSuchPath(NotFound):
    """Nothing lives at this path."""

    code = "unknown_path"


class Answer(NamedTuple):
    """HTTP status, and the ``type`` and ``code`` of the error's body."""

    status: int
    type: str
    code: str | None


_REQUEST, _SERVER = "invalid_request_error", "server_error"

_ANSWERS: dict[type[SllmError], Answer] = {
    SllmError: Answer(500, _SERVER, "internal"),
    InvalidInput: Answer(400, _REQUEST, "invalid_value"),
    InvalidCheckpoint: Answer(422, _REQUEST, "invalid_checkpoint"),
    ContextOverflow: Answer(400, _REQUEST, "context_length_exceeded"),
    UnsupportedParameter: Answer(400, _REQUEST, "unsupported_parameter"),
    UnknownParameter: Answer(400, _REQUEST, "unknown_parameter"),
    KeyReused: Answer(422, _REQUEST, "idempotency_key_reused"),
    BodyTooLarge: Answer(413, _REQUEST, "body_too_large"),
    BodyTooSlow: Answer(408, _REQUEST, "body_too_slow"),
    UnsupportedMediaType: Answer(415, _REQUEST, "unsupported_media_type"),
    MethodNotAllowed: Answer(405, _REQUEST, "method_not_allowed"),
    Unauthorised: Answer(401, "authentication_error", "invalid_api_key"),
    WrongHost: Answer(403, "permission_error", "wrong_host"),
    NotFound: Answer(404, _REQUEST, "model_not_found"),
    NoSuchPath: Answer(404, _REQUEST, "unknown_path"),
    Conflict: Answer(409, _REQUEST, "conflict"),
    Overloaded: Answer(429, "rate_limit_error", "overloaded"),
    Unschedulable: Answer(503, _SERVER, "unschedulable"),
    Unreachable: Answer(503, _SERVER, "unreachable"),
    TimedOut: Answer(504, _SERVER, "timed_out"),
    # As nginx has it. Not a status that clients retry by themselves: an operator's cancel must hold.
    Cancelled: Answer(499, _SERVER, "cancelled"),
    OutOfSpace: Answer(507, _SERVER, "out_of_space"),
    LinkError: Answer(502, _SERVER, "link_error"),
}


ALL_KINDS: tuple[type[SllmError], ...] = tuple(_ANSWERS)
"""Every kind of error that has an answer of its own."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """``param`` names the parameter at fault, where there is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every refusal, as OpenAI's clients read it."""

    error: ErrorDetail


def answer_of_kind(kind: type[SllmError]) -> Answer:
    """How errors of a class are answered: as the class itself is, or else as the nearest one above it."""
    for each in kind.__mro__:
        if (answer := _ANSWERS.get(each)) is not None:
            return answer
    raise TypeError(f"{kind.__name__} is no SllmError")


def answer_of(error: SllmError) -> Answer:
    """How this error is answered."""
    return answer_of_kind(type(error))


def http_status(error: SllmError) -> int:
    """The HTTP status of an error, the same for the OpenAI API and the admin API."""
    return answer_of(error).status


def retry_after(error: SllmError) -> str | None:
    """The value of Retry-After in whole seconds, for errors that pass by themselves."""
    wait_s = error.retry_after_s if isinstance(error, Overloaded | Unschedulable) else None
    return None if wait_s is None else str(max(1, math.ceil(wait_s)))


def error_body(error: SllmError) -> bytes:
    """An `ErrorBody` as JSON."""
    answer = answer_of(error)
    param = error.param if isinstance(error, InvalidInput) else None
    return msgspec.json.encode(ErrorBody(ErrorDetail(error.message, answer.type, param, answer.code)))
