"""The one table from errors to HTTP."""

from __future__ import annotations

import msgspec
import pytest

from schema import errors
from schema.errors import InvalidInput, Overloaded, SllmError, Unschedulable
from sllmctl.gateway.errors import UnknownParameter, answer_of, error_body, http_status, retry_after

_CLASSES = [kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type) and issubclass(kind, SllmError)]


@pytest.mark.parametrize("kind", _CLASSES)
def test_every_class_of_the_tree_has_an_answer_of_its_own(kind: type[SllmError]) -> None:
    class Narrower(kind):  # type: ignore[misc, valid-type]
        code = "narrower"

    answer = answer_of(kind("it failed"))
    assert 400 <= answer.status < 600
    assert (answer == answer_of(SllmError("x"))) == (kind is SllmError), "only what is internal is answered as internal"
    assert answer_of(Narrower("it failed")) == answer


def test_a_body_is_in_openais_shape() -> None:
    assert msgspec.json.decode(error_body(UnknownParameter("unknown parameter 'x'", "x"))) == {
        "error": {
            "message": "unknown parameter 'x'",
            "type": "invalid_request_error",
            "param": "x",
            "code": "unknown_parameter",
        }
    }
    assert msgspec.json.decode(error_body(Unschedulable("no room")))["error"]["param"] is None


def test_retry_after_is_whole_seconds_and_never_none() -> None:
    assert [retry_after(Overloaded("full", seconds)) for seconds in (0.0, 0.2, 1.0, 1.1)] == ["1", "1", "1", "2"]
    assert [retry_after(Unschedulable("failed", seconds)) for seconds in (None, 0.0, 42.5)] == [None, "1", "43"]
    assert retry_after(InvalidInput("no")) is None
    assert http_status(Overloaded("full")) == 429
