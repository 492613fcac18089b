"""What `sllmctl doctor` hears from a manager: asked once, and with less patience than a command that wants something of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from schema.admin import CheckpointView, InstanceView, ModelView, NodeView, StatusView
from schema.errors import SllmError

if TYPE_CHECKING:
    from sllmctl.config import Settings

__all__ = ["ANSWER_S", "Told", "ask"]

ANSWER_S = 5.0
"""A manager that takes longer to say how it is would keep others waiting too."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """``status`` is None where it did not answer; ``error`` is why the rest, or part of it, is missing.

    ``local`` is the node of the manager's own machine; ``learned`` are the coefficients of the planner's estimates.
    """

    status: StatusView | None = None
    nodes: tuple[NodeView, ...] = ()
    models: tuple[ModelView, ...] = ()
    checkpoints: tuple[CheckpointView, ...] = ()
    instances: tuple[InstanceView, ...] = ()
    learned: Mapping[str, float] = {}
    local: NodeView | None = None
    error: SllmError | None = None


def ask(settings: Settings) -> Told:
    """Ask the manager of these settings; what it did not answer is left out."""
    from sllmctl import client

    patience = msgspec.structs.replace(settings.client, answer_s=min(settings.client.answer_s, ANSWER_S))
    told = Told()
    try:
        with client.AdminClient(settings.admin_socket, patience) as admin:
            told = Told(status=admin.ask(client.status()))
            nodes = admin.ask(client.nodes())
            return Told(
                status=told.status,
                nodes=nodes,
                models=admin.ask(client.models()),
                checkpoints=admin.ask(client.checkpoints()),
                instances=admin.ask(client.instances()),
                learned=admin.ask(client.estimates()).coefficients,
                local=next((node for node in nodes if node.name == settings.control.local_node), None),
            )
    except SllmError as error:
        return msgspec.structs.replace(told, error=error)
