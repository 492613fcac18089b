"""What `sllmctl doctor` looks at in the cluster: versions, copies that must not be used, and instances that do not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sllmctl.cli.findings import Finding
from sllmctl.cli.format import short_digest

if TYPE_CHECKING:
    from schema.admin import CheckpointView, InstanceView, ModelView, NodeView
    from sllmctl.cli.told import Told

__all__ = ["check_cluster", "failed_instances", "node_versions", "placeless_models", "quarantined_copies"]

_NAMED = 5
"""So many are named; the commands that the advice names list all."""


def check_cluster(told: Told) -> Iterator[Finding]:
    """Findings of what a manager knows of its nodes."""
    assert told.status is not None
    yield node_versions(told.status.version, told.nodes)
    yield quarantined_copies(told.checkpoints)
    yield failed_instances(told.instances)
    yield placeless_models(told.models)


def node_versions(manager: str, nodes: Sequence[NodeView]) -> Finding:
    """Processes of nodes that run another version than their manager, as the node stated last."""
    told = [(node.name, who, said) for node in nodes if node.inventory for who, said in node.inventory.software.items()]
    other = [f"{who} on {node} runs {said}" for node, who, said in told if said.rpartition(" ")[2] != manager]
    if not other:
        return Finding("node_versions", "ok", f"what nodes run is version {manager}" if told else "no node said a version")
    advice = "stop the manager without --keep-agent and start it again: agents, stores and workers begin anew with its version"
    return Finding("node_versions", "warn", f"the manager runs version {manager}, but {_some(other)}", advice)


def quarantined_copies(checkpoints: Sequence[CheckpointView]) -> Finding:
    """Copies that are wrong: nothing starts from them, and they take their room all the same."""
    bad = [(each, copy) for each in checkpoints for copy in each.placements if copy.state == "quarantined" or copy.reason]
    if not bad:
        return Finding("quarantine", "ok", "no copy of a checkpoint is in quarantine")
    texts = [
        f"{short_digest(each.digest)} ({', '.join(each.models) or 'no model uses it'}) on {copy.node}:{copy.tier}"
        + (f": {copy.reason}" if copy.reason else "")
        for each, copy in bad
    ]
    advice = (
        "fetch or ingest it again, `sllmctl checkpoint verify` if its files are right again, or `sllmctl checkpoint rm`; "
        "`sllmctl checkpoint ls` lists all"
    )
    return Finding("quarantine", "warn", f"{len(bad)} in quarantine: {_some(texts)}", advice)


def failed_instances(instances: Sequence[InstanceView]) -> Finding:
    """Instances that were tried as often as allowed, or are about to be tried again."""
    bad = [each for each in instances if each.state in ("failed", "backoff")]
    if not bad:
        return Finding("instances", "ok", "no instance has failed")
    texts = [
        f"{each.id} of {each.model} on {each.node} ({each.state})" + (f": {each.fault.message}" if each.fault else "")
        for each in bad
    ]
    advice = "`sllmctl model show` says when it is tried again; mend what it names, then `sllmctl model deploy` tries at once"
    return Finding("instances", "warn", f"{len(bad)} failed: {_some(texts)}", advice)


def placeless_models(models: Sequence[ModelView]) -> Finding:
    """Models that no node could take an instance of when one was last wanted, and that have none now."""
    bad = [each.no_place for each in models if each.no_place and not each.instances]
    if not bad:
        return Finding("places", "ok", "every model whose instance was wanted found a place")
    advice = "`sllmctl explain MODEL` weighs every node"
    return Finding("places", "warn", f"{len(bad)} without a place: {_some(bad)}", advice)


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return "; ".join(texts[:_NAMED]) + more
