"""What nodes say has happened to what lies in their memory and on their devices, kept as events: few enough to be read.

Everything is logged. Of one kind a node may write a burst of events, and then one now and then; the next that is written says
how many were not.
"""

from __future__ import annotations

from typing import Final

from schema.link import NodeEvent
from sllmctl.cluster.records import Node
from sllmctl.control.effects import Log
from sllmctl.control.spout import Spout
from sllmctl.control.turn import Turn

__all__ = ["tell"]

_AWAY_S: Final = 2.0


def tell(turn: Turn, node: Node, said: NodeEvent) -> None:
    """Write down what a node says has happened."""
    message = f"on node {node.name}: {said.message}" if said.digest else said.message
    if said.for_digest:
        models = ", ".join(turn.view.models_of(said.for_digest))
        message += f" for checkpoint {said.for_digest[:12]}{f' ({models})' if models else ''}"
    if said.ago_s >= _AWAY_S:
        message += f"; it was {said.ago_s:.0f} s ago, while no manager was there"
    spout = turn.core.spouts.setdefault((node.id, said.reason), Spout(turn.now))
    if not spout.opens(turn.now):
        turn.do(Log(said.level, f"node {node.name}: {said.reason}: {said.digest[:12]}: {message}"))
        return
    if spout.withheld:
        message += f"; {spout.withheld} like it before were only logged"
        spout.withheld = 0
    turn.event("checkpoint" if said.digest else "node", said.digest or node.name, said.reason, message, level=said.level)
