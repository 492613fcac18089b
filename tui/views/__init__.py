"""The views, in the order of their number keys."""

from __future__ import annotations

from typing import Any

from tui.views.base import Scope, View, filtered
from tui.views.checkpoints import Checkpoints
from tui.views.events import Events, Logs
from tui.views.explain import Explain
from tui.views.instances import Instances
from tui.views.models import Models
from tui.views.nodes import Nodes
from tui.views.operations import Operations
from tui.views.requests import Requests

__all__ = ["VIEWS", "Scope", "View", "filtered", "made"]

VIEWS: tuple[type[View[Any]], ...] = (Nodes, Models, Instances, Requests, Checkpoints, Operations, Events, Logs, Explain)


def made() -> dict[str, View[Any]]:
    """One of each, by name."""
    return {kind.name: kind() for kind in VIEWS}
