"""Operations on checkpoints: waited for with their progress on stderr, then shown; the first failure is the command's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sllmctl.cli.diagnostics import ProgressLine, note
from sllmctl.cli.format import age, bandwidth, duration, short_digest, size
from sllmctl.cli.output import Column, Format, now, show_items
from sllmctl.cli.phases import progress_text

if TYPE_CHECKING:
    from schema.admin import OperationView
    from sllmctl.cli.waiting import Patience
    from sllmctl.client import AdminClient

__all__ = ["COLUMNS", "fields", "finish_operations"]

_HOLD_TERMINAL_S, _HOLD_LOG_S = 0.3, 5.0
_DOING = {"prefetch": "loading to", "verify": "verifying", "drop": "dropping from", "fetch": "fetching to"}


def finish_operations(admin: AdminClient, form: Format, operations: Sequence[OperationView], patience: Patience | None) -> None:
    """Show the operations, once they have ended; without ``patience`` as they are. Each one's fault is told. The patience is
    ``admin``'s own limit.

    Raises the first of the faults, TimedOut when they go on after the patience has run out.
    """
    from schema.errors import Fault

    try:
        ended = list(operations) if patience is None else _wait(admin, operations, patience)
    except KeyboardInterrupt:
        for operation in operations:
            note(f"{operation.id} ({operation.kind}) goes on; `sllmctl operation cancel {operation.id}` ends it")
        raise
    show_items(form, ended, COLUMNS, lambda operation: operation.id)
    for operation in ended:
        if operation.note:
            note(f"{operation.url or operation.node}: {operation.note}")
    failed = [(operation.node, operation.fault) for operation in ended if operation.fault is not None]
    for node, fault in failed[1:]:
        note(f"{node}: {fault.message}")
    for node, fault in failed[:1]:
        raise Fault(fault.code, f"{node}: {fault.message}" if len(ended) > 1 else fault.message).to_error()


def _wait(admin: AdminClient, operations: Sequence[OperationView], patience: Patience) -> list[OperationView]:
    from schema.errors import TimedOut
    from sllmctl import client

    hold_s = _HOLD_TERMINAL_S if sys.stderr.isatty() else _HOLD_LOG_S
    ended = []
    with ProgressLine() as line:
        for operation in operations:
            while operation.ended_at is None:
                if not patience.left_s:
                    raise TimedOut(
                        f"{operation.id} ({operation.kind}) has not ended after {patience}; it goes on, "
                        f"`sllmctl operation show {operation.id}` says how"
                    )
                line.show(_doing(operation), operation.progress)
                operation = admin.ask(client.wait_operation(operation.id, patience.hold_s(hold_s)))
            ended.append(operation)
    return ended


def fields(operation: OperationView) -> list[tuple[str, str]]:
    """One operation at length."""
    pairs = [
        ("Id", operation.id),
        ("Operation", operation.kind),
        ("Checkpoint", operation.digest),
        ("Node", operation.node),
        ("Tier", str(operation.tier)),
        ("State", _state(operation)),
        ("Size", size(operation.size_bytes)),
        ("Began", f"{age(now() - operation.began_at)} ago"),
    ]
    if operation.ended_at is not None:
        pairs.append(("Took", duration(_took(operation))))
    if operation.progress is not None:
        pairs.append(("Progress", progress_text(operation.progress)))
    pairs += [("Rate", _rate(operation)), ("Url", operation.url or "-")]
    if operation.note:
        pairs.append(("Note", operation.note))
    if operation.fault is not None:
        pairs.append(("Fault", f"{operation.fault.message} ({operation.fault.code})"))
    return pairs


def _doing(operation: OperationView) -> str:
    if operation.kind == "publish":
        return f"publishing to {operation.url} from {operation.node}"
    return f"{_DOING[operation.kind]} {operation.tier} of {operation.node}"


def _state(operation: OperationView) -> str:
    from schema.errors import Cancelled

    if operation.ended_at is None:
        progress = operation.progress
        return f"running {progress.done_bytes / progress.total_bytes:.0%}" if progress and progress.total_bytes else "running"
    if operation.fault is None:
        return "done"
    return "cancelled" if operation.fault.code == Cancelled.code else f"failed ({operation.fault.code})"


def _took(operation: OperationView) -> float:
    return operation.ended_at - operation.began_at if operation.ended_at is not None else 0.0


def _rate(operation: OperationView) -> str:
    if operation.kind == "drop" or operation.fault is not None:
        return "-"
    if operation.ended_at is None:
        return bandwidth(operation.progress.rate_bps) if operation.progress is not None else "-"
    return bandwidth(operation.read_bytes / _took(operation)) if _took(operation) > 0 else "-"


COLUMNS: list[Column[OperationView]] = [
    Column("OPERATION", lambda o: o.kind),
    Column("CHECKPOINT", lambda o: short_digest(o.digest)),
    Column("NODE", lambda o: o.node),
    Column("TIER", lambda o: o.tier),
    Column("STATE", _state),
    Column("SIZE", lambda o: size(o.size_bytes), right=True),
    Column("TOOK", lambda o: duration(_took(o)) if o.ended_at is not None else "-", right=True),
    Column("RATE", _rate, right=True),
    Column("URL", lambda o: o.url or "-", wide=True),
    Column("ID", lambda o: o.id, wide=True),
    Column("FULL DIGEST", lambda o: o.digest, wide=True),
]
