"""The view's indexes, counted anew from its records: what was kept incrementally must be the same."""

from __future__ import annotations

from dataclasses import fields, replace

from sllmctl.cluster.ledger import MemoryLedger
from sllmctl.cluster.room import RoomIndex
from sllmctl.cluster.view import ClusterView

__all__ = ["check_indexes"]

_APART = {"memory", "means", "operations", "refused", "line", "nodes", "checkpoints", "_stale", "_free", "_loose"}
"""What is looked at by its parts, counts changes, says what is to be done, or is looked at below."""


def check_indexes(view: ClusterView) -> None:
    fresh = ClusterView()
    for node in view.nodes.values():
        fresh.add_node(replace(node, inventory=None))
        if node.inventory is not None:
            fresh.set_inventory(node.id, node.inventory)
    for checkpoint in view.checkpoints.values():
        fresh.add_checkpoint(checkpoint)
    for publication in view.publications.values():
        fresh.put_publication(publication)
    for key, at in view.pins.items():
        fresh.add_pin(key, at)
    for record in view.placements.values():
        fresh.put_placement(record)
    for model in view.models.values():
        fresh.add_model(model)
    for instance in view.instances.values():
        fresh.add_instance(instance)
    for kept, counted in ((view.memory.free, fresh.memory.free), (view.memory.loose, fresh.memory.loose)):
        for count in (1, 2, 3):
            assert _listed(kept, count) == _listed(counted, count)
    _compare(view, fresh)
    _compare(view.memory, fresh.memory)
    assert list(view.refused) == [name for name in view.refused if view.models[name].refusal]
    assert set(view.refused) == {model.name for model in view.models.values() if model.refusal}
    waiting = [(view.models[name].waiting_since, name) for name in view.refused]
    assert view.line == sorted(entry for entry in waiting if entry[0] is not None)


def _compare(whole: ClusterView | MemoryLedger, anew: ClusterView | MemoryLedger) -> None:
    for one in fields(whole):
        if one.name not in _APART:
            kept, counted = getattr(whole, one.name), getattr(anew, one.name)
            assert _plain(kept) == _plain(counted), f"{one.name} is not what its records say"


def _plain(index: object) -> object:
    """Without what counts nothing; in which order things came does not matter."""
    if not isinstance(index, dict):
        return index
    found = {key: _plain(value) for key, value in index.items()}
    return {key: value for key, value in found.items() if value != 0 and value != {} and value != set()}


def _listed(index: RoomIndex, count: int) -> list[tuple[int, str]]:
    return list(index.nodes(count, -(1 << 62)))
