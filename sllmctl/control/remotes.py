"""Where checkpoints were published, and which node publishes or fetches one: checked, written, shown.

A checkpoint that lies on a remote stays known when no node holds it any more, and its last copy on a disk may then go.
"""

from __future__ import annotations

import re
from dataclasses import replace

from schema.errors import Conflict, Fault, InvalidCheckpoint, InvalidInput, NotFound
from schema.remote import check_remote_url
from schema.states import NodeState, Tier
from sllmctl.cluster.records import Checkpoint, Node, Operation, Publication
from sllmctl.control.events import Forget, Operate
from sllmctl.control.references import checkpoint_called
from sllmctl.control.turn import Turn

__all__ = ["address", "called", "doubt", "fetcher", "forget", "note", "others", "publisher"]


def called(turn: Turn, event: Operate) -> Checkpoint:
    """The checkpoint to fetch: a known one, or one that another cluster has published, by its whole digest and its remote."""
    digest = event.reference
    if digest in turn.view.checkpoints or re.fullmatch("[0-9a-f]{64}", digest) is None:
        return checkpoint_called(turn.view, digest)
    if event.url is None and not turn.settings.remote:
        raise NotFound(f"checkpoint {digest[:16]} is not known here; say with --from where it was published")
    return Checkpoint(digest, "", 0, 0, 0, turn.now)


def address(turn: Turn, digest: str, event: Operate) -> tuple[str, str]:
    """The remote that is meant and, of a checkpoint published there, its layout: the one named, for a fetch the one it was
    last published to, else the one of the settings."""
    known = {each.url: each.layout for each in turn.view.publications_of(digest)}
    if event.url is not None:
        url = check_remote_url(event.url)
    elif event.kind == "fetch" and known:
        url = next(iter(known))
    elif turn.settings.remote:
        url = check_remote_url(turn.settings.remote)
    else:
        how = "; say with --from where it was published" if event.kind == "fetch" else ""
        raise InvalidInput(f"no remote is named, and the settings have none (control.remote){how}", "url")
    if event.kind == "publish" and url.startswith(("http://", "https://")):
        raise InvalidInput(f"{url} is an HTTP server, which is only read; publish to a directory or to S3", "url")
    return url, known.get(url, "")


def others(turn: Turn, digest: str, event: Operate, url: str) -> tuple[tuple[str, str], ...]:
    """The remotes, and layouts there, beside ``url`` that a fetch may be tried from, unless it was named one."""
    if event.kind != "fetch" or event.url is not None:
        return ()
    return tuple((each.url, each.layout) for each in turn.view.publications_of(digest) if each.url != url)


def publisher(turn: Turn, checkpoint: Checkpoint, node: Node | None) -> Node:
    """Who publishes: the node named, or the first that is ready and has a sound copy on its disk."""
    view = turn.view
    holders = sorted(view.nodes_with(checkpoint.digest, Tier.DISK))
    ready = [view.nodes[each] for each in holders if view.nodes[each].state is NodeState.READY]
    if node is not None:
        ready = [each for each in ready if each.id == node.id]
    if not ready:
        where = f"node {node.name}" if node is not None else "any node that is ready"
        raise Conflict(f"checkpoint {checkpoint.digest[:16]} has no sound copy on the disk of {where}")
    return ready[0]


def fetcher(turn: Turn, checkpoint: Checkpoint, node: Node | None, tier: Tier | None) -> Node:
    """Who fetches: the node named, or, of those that are ready and lack it, the one with least on its disk."""
    if tier not in (None, Tier.DISK, Tier.DRAM):
        raise InvalidInput(f"a checkpoint can be fetched to {Tier.DISK} or {Tier.DRAM}, not to {tier}", "tier")
    view = turn.view
    if node is not None:
        if node.state is not NodeState.READY:
            raise Conflict(f"node {node.name} is {node.state.value}; `sllmctl event ls --object {node.name}` says why")
        return node
    there = view.nodes_with(checkpoint.digest, Tier.DISK)
    found = [each for each in view.nodes.values() if each.state is NodeState.READY and each.id not in there]
    if not found:
        raise Conflict(f"checkpoint {checkpoint.digest[:16]} is on the disk of every node that is ready")
    on_disk = dict.fromkeys(view.nodes, 0)
    for record in view.placements.values():
        on_disk[record.node] += record.size_bytes if record.tier is Tier.DISK else 0
    return min(found, key=lambda each: (each.cordoned, on_disk[each.id], each.id))


def note(turn: Turn, operation: Operation, layout: str) -> None:
    """A checkpoint was published, or fetched, and so lies there."""
    known = turn.view.publications.get((operation.digest, operation.url))
    if operation.digest not in turn.view.checkpoints or not layout:
        return
    if operation.kind == "publish" or known is None or known.layout != layout or known.doubt:
        turn.put_publication(Publication(operation.digest, operation.url, layout, turn.now))


def doubt(turn: Turn, digest: str, url: str, fault: Fault) -> None:
    """A fetch has failed: what it did not find, or found to be wrong, counts as no copy until it was published or fetched."""
    known = turn.view.publications.get((digest, url))
    if known is None or fault.code not in (InvalidCheckpoint.code, NotFound.code):
        return
    if not known.doubt:
        turn.event("checkpoint", digest, "RemoteDoubted", f"{url}: {fault.message}", level="warning")
    turn.put_publication(replace(known, doubt=fault.message))


def forget(turn: Turn, event: Forget) -> None:
    """It lies there no more. What is on the remote is left as it is. Raises NotFound when it is known to lie on no such."""
    checkpoint = checkpoint_called(turn.view, event.reference)
    url = check_remote_url(event.url) if event.url is not None else None
    found = [each for each in turn.view.publications_of(checkpoint.digest) if url in (None, each.url)]
    if not found:
        raise NotFound(f"checkpoint {checkpoint.digest[:16]} is not known to lie on {url or 'any remote'}")
    for each in found:
        turn.remove_publication(each)
        turn.event("checkpoint", checkpoint.digest, "Forgotten", f"that it lies on {each.url}, as an operator asked")
    turn.forget_unheld(checkpoint.digest)
