"""A decision in words, for events and explanations."""

from __future__ import annotations

from sllmctl.control.records import Model
from sllmctl.control.view import ClusterView
from sllmctl.planner.plans import Candidate, Refusal, Rejection

__all__ = ["plan_reason", "refusal", "wait_reason"]


def plan_reason(view: ClusterView, best: Candidate, count: int, rejected: dict[Rejection, int]) -> str:
    places = "the only place" if count == 1 else f"the best of {count} places"
    peer = view.nodes.get(best.peer)
    weights = f"weights from {peer.name}" if peer is not None else f"weights on {best.source.value}"
    leaving = "".join(f"; {what}" for what in _leaving(best))
    others = f"; rejected: {_counts(rejected)}" if rejected else ""
    return f"on {best.name}, {places}: {weights}, ready in about {best.startup_s:.2f} s{leaving}{others}"


def wait_reason(best: Candidate, wait_s: float) -> str:
    return (
        f"those who wait are served in about {wait_s:.2f} s without another; "
        f"one on {best.name} would be ready in about {best.startup_s:.2f} s and cost others {best.delay_s:.2f} s"
    )


def refusal(model: Model, rejected: dict[Rejection, int]) -> Refusal:
    hopeless = not any(reason.passing for reason in rejected)
    what = f"no node can hold model {model.name!r}" if hopeless else f"no node has room for model {model.name!r} now"
    return Refusal(rejected, hopeless, f"{what}: {_counts(rejected)}" if rejected else f"{what}: there is no node")


def _leaving(best: Candidate) -> list[str]:
    """Who leaves for it, and what that takes."""
    said: list[str] = []
    if best.drops:
        said.append(f"drops idle weights of {_some(len(best.drops), 'checkpoint')} from the device")
    if best.stops:
        said.append(f"stops {_some(len(best.stops), 'idle instance')}")
    if best.drains:
        said.append(f"drains {_some(len(best.drains), 'busy instance')}")
    if best.moves:
        said.append(f"migrates {_some(len(best.moves), 'busy instance')}")
    if best.preempts:
        said.append(f"preempts {_some(len(best.preempts), 'busy instance')}")
    if best.room_s > 0:
        said.append(f"room in about {best.room_s:.2f} s")
    if best.delay_s > 0:
        said.append(f"others pay {best.delay_s:.2f} s")
    return said


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _counts(rejected: dict[Rejection, int]) -> str:
    return ", ".join(f"{count} node{'s' if count > 1 else ''} {reason.value}" for reason, count in sorted(rejected.items()))
