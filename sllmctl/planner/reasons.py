"""A decision in words, for events and explanations."""

from __future__ import annotations

from collections.abc import Iterator

from schema.states import TierState
from sllmctl.cluster.plans import Candidate, Refusal, Rejection
from sllmctl.cluster.records import Model
from sllmctl.cluster.view import ClusterView

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


def refusal(view: ClusterView, model: Model, rejected: dict[Rejection, int]) -> Refusal:
    hopeless = not any(reason.passing for reason in rejected)
    what = f"no node can hold model {model.name!r}" if hopeless else f"no node has room for model {model.name!r} now"
    why = _counts(rejected) if rejected else "there is no node"
    return Refusal(rejected, hopeless, "; ".join([f"{what}: {why}", *(_remedies(view, model, rejected) if hopeless else ())]))


def _remedies(view: ClusterView, model: Model, rejected: dict[Rejection, int]) -> Iterator[str]:
    """What an operator can do about what time will not lift."""
    checkpoint = view.checkpoints.get(model.digest or "")
    if checkpoint is None:
        return
    if Rejection.SMALL_ARENA in rejected:
        yield f"raise node.arena_bytes: the weights take {-(-checkpoint.image_bytes >> 20)} MiB"
    if Rejection.SMALL_DEVICE in rejected:
        yield "raise node.device_bytes, or ask for less by engine.kv_bytes and engine.max_context_tokens"
    bad = {record.node for record in view.placements_of(checkpoint.digest).values() if record.state is TierState.QUARANTINED}
    if bad and Rejection.NO_COPY in rejected:
        names = ", ".join(sorted(view.nodes[node].name for node in bad if node in view.nodes))
        yield f"the copy on {names} is in quarantine: `sllmctl checkpoint show {model.name}` says why"


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
    if best.risk_s > 0:
        said.append("an instance of it was just given up there")
    if best.delay_s > 0:
        said.append(f"others pay {best.delay_s:.2f} s")
    return said


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _counts(rejected: dict[Rejection, int]) -> str:
    return ", ".join(f"{count} node{'s' if count > 1 else ''} {reason.value}" for reason, count in sorted(rejected.items()))
