"""What people call things: a checkpoint by a beginning of its digest or by a model, a node by its name. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from schema.errors import Conflict, InvalidInput, NotFound
from schema.names import did_you_mean
from schema.states import ModelState, NodeState
from sllmctl.cluster.records import Checkpoint, Node
from sllmctl.cluster.view import ClusterView

__all__ = ["LEAST_DIGITS", "checkpoint_called", "missing", "node_called"]

LEAST_DIGITS = 4
"""So much of a digest at least."""

_DIGITS = re.compile(r"[0-9a-f]{1,64}")


def missing(kind: str, name: str, names: Iterable[str] = ()) -> NotFound:
    """Why a name is refused: nothing of the kind has it. Says the nearest of ``names``, or what shows them all."""
    near = did_you_mean(name, names)
    return NotFound(f"there is no {kind} {name!r}{near or f'; `sllmctl {kind} ls` shows what there is'}")


def checkpoint_called(view: ClusterView, reference: str) -> Checkpoint:
    """The checkpoint of a model of this name, or the one whose digest begins so.

    Raises NotFound; Conflict, naming them, when several are meant, or for a model without a checkpoint; InvalidInput for a
    beginning that is too short.
    """
    digit = _DIGITS.fullmatch(reference) is not None
    found = {digest for digest in view.checkpoints if digest.startswith(reference)} if digit else set()
    model = view.models.get(reference)
    if len(reference) < LEAST_DIGITS and model is None:
        raise InvalidInput(f"{reference!r} is too short for a digest; give {LEAST_DIGITS} digits or more", "digest")
    if model is not None and model.state is ModelState.FAILED and not found:
        why = model.fault.message if model.fault is not None else "unknown"
        raise Conflict(f"model {reference!r} could not be ingested: {why}; add it again")
    if model is not None and model.digest is None and not found:
        raise Conflict(f"model {reference!r} has no checkpoint yet ({model.state.value}); wait until it is ingested")
    if len(reference) < LEAST_DIGITS:
        found = set()
    meant = found | ({model.digest} if model is not None and model.digest is not None else set())
    if len(meant) > 1:
        names = ", ".join(_described(view, digest) for digest in sorted(meant))
        raise Conflict(f"{reference} is ambiguous: it may mean {names}; give more digits")
    if not meant:
        raise missing("checkpoint", reference, view.models)
    return view.checkpoints[meant.pop()]


def node_called(view: ClusterView, name: str) -> Node:
    """The node of this name, or of this id. Raises NotFound."""
    node = view.node_named(name) or view.nodes.get(name)
    if node is None or node.state is NodeState.REMOVED:
        raise missing("node", name, (each.name for each in view.nodes.values() if each.state is not NodeState.REMOVED))
    return node


def _described(view: ClusterView, digest: str) -> str:
    models = ", ".join(view.models_of(digest))
    return digest[:16] + (f" (of {models})" if models else "")
