"""Failed instances that are planned anew before their pause is over, since something has changed that may mend them."""

from __future__ import annotations

from schema.errors import InvalidCheckpoint
from schema.states import InstanceState
from sllmctl.cluster.records import Instance, Node
from sllmctl.control import instances
from sllmctl.control.turn import Turn

__all__ = ["copy_appeared", "deployed", "node_joined"]


def node_joined(turn: Turn, node: Node, away_since: float | None) -> None:
    """A node is there that was not: what failed elsewhere without it, ``away_since`` then or all along, may start on it."""
    how = "joined" if away_since is None else "come back"
    for instance in list(turn.view.instances.values()):
        if instance.node != node.id and (away_since is None or instance.changed_at >= away_since):
            _again(turn, instance, f"node {node.name} has {how}")


def copy_appeared(turn: Turn, digest: str, node: Node) -> None:
    """A sound copy of a checkpoint is on a disk where there was none: what failed by its weights may start from it."""
    for model in turn.view.models_of(digest):
        turn.view.models[model].avoided.pop(node.id, None)
        for instance in list(turn.view.instances_of(model).values()):
            if instance.fault is not None and instance.fault.code == InvalidCheckpoint.code:
                _again(turn, instance, f"a sound copy of its checkpoint is on node {node.name} now")


def deployed(turn: Turn, model: str) -> None:
    """An operator has deployed the model again, and so said that it is to be tried."""
    turn.view.models[model].given_up = 0
    turn.view.models[model].avoided.clear()
    for instance in list(turn.view.instances_of(model).values()):
        _again(turn, instance, f"model {model} was deployed again")


def _again(turn: Turn, instance: Instance, why: str) -> None:
    if instance.state is InstanceState.FAILED:
        instances.stop(turn, instance, "Retried", f"{why}; another takes its place where one is wanted")
