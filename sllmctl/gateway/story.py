"""A request's story in the manager's log: accepted, queued, placed, loaded, first token, moved, ended; each line with its id.

What a node and its worker did for it is in their logs, under the same id. No line has any text of it.
"""

from __future__ import annotations

import logging
import re

from schema.errors import Fault
from schema.logs import about
from sllmctl.gateway.journal import Attempt, Request

__all__ = ["LOGGER", "accepted", "ended", "first_token", "is_id", "moved", "placed", "queued", "refused"]

LOGGER = "sllmctl.requests"
_log = logging.getLogger(LOGGER)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def is_id(text: str) -> bool:
    """Whether a client may name its request so."""
    return _ID.fullmatch(text) is not None


def accepted(request: Request) -> None:
    if _log.isEnabledFor(logging.INFO):
        fields = about(
            request=request.id,
            model=request.model,
            prompt_tokens=len(request.sequences[0].prompt),
            max_tokens=request.params.max_tokens,
            choices=len(request.sequences),
        )
        _log.info("accepted", extra=fields)


def refused(request_id: str, model: str, code: str) -> None:
    """It ended with an error, before it was accepted or after."""
    _log.info("answered with an error", extra=about(request=request_id, model=model or None, code=code))


def queued(request: Request, ahead: int, *, cold: bool) -> None:
    if _log.isEnabledFor(logging.INFO):
        _log.info("queued", extra=about(request=request.id, model=request.model, waiting=ahead, cold=cold))


def placed(attempt: Attempt) -> None:
    """An attempt was submitted; of the first that waited for a start, what that took."""
    if not _log.isEnabledFor(logging.INFO):
        return
    sequence = attempt.sequence
    request = sequence.request
    if request.start is not None and request.attempts == 1:
        start = request.start
        source = None if start.loaded_from is None else start.loaded_from.value
        fields = about(request=request.id, load_s=start.load_s, loaded_from=source, start_s=start.total_s)
        _log.info("loaded", extra=fields)
    fields = about(
        request=request.id,
        node=attempt.node,
        instance=attempt.instance,
        attempt=attempt.epoch,
        choice=sequence.choice or None,
        resumed_at=attempt.start or None,
        after_s=attempt.began_at - request.received_at,
    )
    _log.info("placed", extra=fields)


def first_token(request: Request) -> None:
    if _log.isEnabledFor(logging.INFO) and request.first_token_at is not None:
        _log.info("first token", extra=about(request=request.id, after_s=request.first_token_at - request.received_at))


def moved(request: Request, fault: Fault) -> None:
    """An attempt was lost, and what it had to do goes on elsewhere."""
    _log.info("lost by its instance", extra=about(request=request.id, instance=request.instance, why=fault.message))


def ended(request: Request) -> None:
    if not _log.isEnabledFor(logging.INFO):
        return
    fault = request.fault
    after_s = None if request.ended_at is None else request.ended_at - request.received_at
    fields = about(
        request=request.id,
        model=request.model,
        outcome=request.state.value,
        code=None if fault is None else fault.code,
        tokens=request.generated,
        attempts=request.attempts,
        after_s=after_s,
    )
    _log.info("ended", extra=fields)
