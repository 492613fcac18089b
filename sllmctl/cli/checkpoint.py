"""`sllmctl checkpoint`: weights, and the tiers they lie on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sllmctl.cli.completion import names
from sllmctl.cli.context import Invocation, output_option, pass_invocation, timeout_option, yes_option
from sllmctl.cli.format import age, short_digest, size
from sllmctl.cli.operations import finish_operations
from sllmctl.cli.output import Column, Format, now, show_item
from sllmctl.cli.watch import list_items, watch_option

if TYPE_CHECKING:
    from schema.admin import CheckpointView, CopyView, PlacementView, PublicationView

__all__ = ["command"]

F = TypeVar("F", bound=Callable[..., Any])


@click.group("checkpoint")
def command() -> None:
    """Checkpoints: weights, and the tiers they lie on."""


@command.command("ls")
@output_option
@watch_option
@pass_invocation
def ls(invocation: Invocation, form: Format, watch: bool) -> None:
    """List the checkpoints.

    \b
    Examples:
      sllmctl checkpoint ls -o wide
    """
    from sllmctl import client

    list_items(
        invocation, client.checkpoints(), "checkpoints", form, _columns, lambda checkpoint: checkpoint.digest, watch=watch
    )


@command.command("show")
@click.argument("digest", metavar="DIGEST|MODEL", shell_complete=names("checkpoint"))
@output_option
@pass_invocation
def show(invocation: Invocation, digest: str, form: Format) -> None:
    """Show one checkpoint, by its digest, a beginning of it, or a model's name.

    \b
    Examples:
      sllmctl checkpoint show qwen
      sllmctl checkpoint show 0123456789ab -o json
    """
    from sllmctl import client

    with invocation.admin() as admin:
        item = admin.ask(client.checkpoint(digest))
    show_item(form, item, _fields, lambda checkpoint: checkpoint.digest)


def _wait_options(function: F) -> F:
    return click.option("--no-wait", is_flag=True, help="Return when it has begun.")(timeout_option(function))


def _node_option(function: F) -> F:
    return click.option("--node", metavar="NODE", help="The copy on this node alone.", shell_complete=names("node"))(function)


def _tier_option(*tiers: str) -> Callable[[F], F]:
    return click.option("--tier", type=click.Choice(tiers), help="The copy on this tier alone.")


@command.command("prefetch")
@click.argument("reference", metavar="DIGEST|MODEL", shell_complete=names("checkpoint"))
@click.option("--node", metavar="NODE", help="Bring it into the memory of this node.", shell_complete=names("node"))
@click.option("--tier", type=click.Choice(["dram", "device"]), default="dram", show_default=True, help="Where to bring it.")
@_wait_options
@output_option
@pass_invocation
def prefetch(
    invocation: Invocation, reference: str, node: str | None, tier: str, no_wait: bool, timeout: float | None, form: Format
) -> None:
    """Bring a checkpoint from disk into memory, ahead of the next start.

    Without --node it goes to the node with the most free memory of those that have it on disk. It stays until the memory is
    needed; `sllmctl checkpoint pin --tier dram` keeps it. With --tier device it goes onto the GPU with the most free memory.

    \b
    Examples:
      sllmctl checkpoint prefetch qwen --node gpu1
      sllmctl checkpoint prefetch qwen --tier device
    """
    from schema.states import Tier
    from sllmctl import client

    patience = invocation.patience(timeout)
    with invocation.admin(patience) as admin:
        begun = admin.ask(client.prefetch_checkpoint(reference, node, Tier(tier)))
        finish_operations(admin, form, begun, None if no_wait else patience)


@command.command("verify")
@click.argument("reference", metavar="DIGEST|MODEL", shell_complete=names("checkpoint"))
@_node_option
@_wait_options
@output_option
@pass_invocation
def verify(
    invocation: Invocation, reference: str, node: str | None, no_wait: bool, timeout: float | None, form: Format
) -> None:
    """Compare the copies on disk, and what lies of them in memory, with their checksums.

    A bad copy goes into quarantine: nothing starts from it. One that is sound again comes out of it.

    \b
    Examples:
      sllmctl checkpoint verify qwen
    """
    from sllmctl import client

    patience = invocation.patience(timeout)
    with invocation.admin(patience) as admin:
        begun = admin.ask(client.verify_checkpoint(reference, node))
        finish_operations(admin, form, begun, None if no_wait else patience)


@command.command("pin")
@click.argument("reference", metavar="DIGEST|MODEL", shell_complete=names("checkpoint"))
@_node_option
@_tier_option("dram", "disk")
@output_option
@pass_invocation
def pin(invocation: Invocation, reference: str, node: str | None, tier: str | None, form: Format) -> None:
    """Keep a checkpoint where it lies: it is never put out there to make room, nor removed.

    With --node and --tier it is also kept where it has yet to come, from another tier of that node: the node must have it on
    one. A pin brings nothing; `sllmctl checkpoint prefetch` and `fetch` do.

    \b
    Examples:
      sllmctl checkpoint pin qwen --node gpu1 --tier dram
    """
    _change_pin(invocation, reference, node, tier, form, pinned=True)


@command.command("unpin")
@click.argument("reference", metavar="DIGEST|MODEL", shell_complete=names("checkpoint"))
@_node_option
@_tier_option("dram", "disk")
@output_option
@pass_invocation
def unpin(invocation: Invocation, reference: str, node: str | None, tier: str | None, form: Format) -> None:
    """Keep a checkpoint no longer; it stays until its room is needed.

    \b
    Examples:
      sllmctl checkpoint unpin qwen --node gpu1
    """
    _change_pin(invocation, reference, node, tier, form, pinned=False)


def _change_pin(
    invocation: Invocation, reference: str, node: str | None, tier: str | None, form: Format, *, pinned: bool
) -> None:
    from schema.states import Tier
    from sllmctl import client
    from sllmctl.cli.diagnostics import note

    with invocation.admin() as admin:
        where = Tier(tier) if tier is not None else None
        item = admin.ask(client.pin_checkpoint(reference, node, where, pinned=pinned))
    kept = ", ".join(f"{pin.node}:{pin.tier}" for pin in item.pins)
    note(f"checkpoint {short_digest(item.digest)} is pinned {f'on {kept}' if kept else 'nowhere'}")
    if form != "table":
        show_item(form, item, _fields, lambda checkpoint: checkpoint.digest)


@command.command("publish")
@click.argument("reference", metavar="DIGEST|MODEL", shell_complete=names("checkpoint"))
@click.argument("url", required=False)
@click.option("--node", metavar="NODE", help="Publish the copy of this node.", shell_complete=names("node"))
@_wait_options
@output_option
@pass_invocation
def publish(
    invocation: Invocation,
    reference: str,
    url: str | None,
    node: str | None,
    no_wait: bool,
    timeout: float | None,
    form: Format,
) -> None:
    """Put a checkpoint on a remote: file:///DIRECTORY (a share mounted on the node) or s3://BUCKET/PREFIX.

    Without a URL it goes to the one of the settings (control.remote). Credentials are the node's own. What is there already
    is compared with its checksums, and written anew where it differs; so a publish also tells whether a remote can be trusted.

    \b
    Examples:
      sllmctl checkpoint publish qwen file:///mnt/models
      sllmctl checkpoint publish qwen s3://models/sllmctl
    """
    from sllmctl import client

    patience = invocation.patience(timeout)
    with invocation.admin(patience) as admin:
        begun = admin.ask(client.publish_checkpoint(reference, url, node))
        finish_operations(admin, form, begun, None if no_wait else patience)


@command.command("fetch")
@click.argument("reference", metavar="DIGEST|MODEL", shell_complete=names("checkpoint"))
@click.option("--from", "url", metavar="URL", help="Fetch it from this remote.")
@click.option("--node", metavar="NODE", help="Fetch it to this node.", shell_complete=names("node"))
@click.option("--tier", type=click.Choice(["disk", "dram"]), default="disk", show_default=True, help="dram: memory as well.")
@_wait_options
@output_option
@pass_invocation
def fetch(
    invocation: Invocation,
    reference: str,
    url: str | None,
    node: str | None,
    tier: str,
    no_wait: bool,
    timeout: float | None,
    form: Format,
) -> None:
    """Bring a checkpoint from a remote to a node: file://, http(s):// or s3://.

    Without --from it comes from where it was last published, or from the next of its remotes if that
    fails. One that is not known here is named by its whole digest.

    \b
    Examples:
      sllmctl checkpoint fetch qwen --node gpu2 --tier dram
      sllmctl checkpoint fetch DIGEST --from s3://models/sllmctl
    """
    from schema.states import Tier
    from sllmctl import client

    patience = invocation.patience(timeout)
    with invocation.admin(patience) as admin:
        begun = admin.ask(client.fetch_checkpoint(reference, url, node, Tier(tier)))
        finish_operations(admin, form, begun, None if no_wait else patience)


@command.command("forget")
@click.argument("reference", metavar="DIGEST|MODEL", shell_complete=names("checkpoint"))
@click.argument("url", required=False)
@yes_option
@output_option
@pass_invocation
def forget(invocation: Invocation, reference: str, url: str | None, yes: bool, form: Format) -> None:
    """Forget that a checkpoint lies on a remote, or on any. What is there is left as it is.

    Then `rm` takes it for no copy any more, and no start fetches from there. Asks when it is the last place that is known.

    \b
    Examples:
      sllmctl checkpoint forget qwen s3://models/sllmctl
    """
    from sllmctl import client
    from sllmctl.cli.diagnostics import confirm, note

    if not yes:
        with invocation.admin() as admin:
            found = admin.ask(client.checkpoint(reference))
        if not _sound(found) and (going := _forgotten(found, url)):
            where = ", ".join(going)
            what = f"{found.digest[:16]} ({', '.join(found.models) or 'no model uses it'}, {size(found.image_bytes)})"
            again = f"`sllmctl checkpoint fetch {found.digest} --from {going[0]}`"
            confirm(f"No disk has a sound copy; only {again} brings it back. Forget that checkpoint {what} is on {where}?", yes)
    with invocation.admin() as admin:
        item = admin.ask(client.forget_checkpoint(reference, url))
    left = ", ".join(each.url for each in item.publications)
    note(f"checkpoint {short_digest(item.digest)} is published {f'on {left}' if left else 'nowhere'}")
    if form != "table":
        show_item(form, item, _fields, lambda checkpoint: checkpoint.digest)


@command.command("rm")
@click.argument("reference", metavar="DIGEST|MODEL", shell_complete=names("checkpoint"))
@_node_option
@_tier_option("device", "dram", "disk")
@_wait_options
@yes_option
@output_option
@pass_invocation
def remove(
    invocation: Invocation,
    reference: str,
    node: str | None,
    tier: str | None,
    no_wait: bool,
    timeout: float | None,
    yes: bool,
    form: Format,
) -> None:
    """Take a checkpoint from devices, memory and disk, of a node or of all.

    Refused for what is in use or pinned, and for the last sound copy of what a model needs.

    \b
    Examples:
      sllmctl checkpoint rm qwen --node gpu1 --tier dram
    """
    from schema.states import Tier
    from sllmctl import client
    from sllmctl.cli.diagnostics import confirm

    where = f"{tier or 'devices, memory and disk'} of {f'node {node}' if node is not None else 'every node'}"
    patience = invocation.patience(timeout)
    with invocation.admin(patience) as admin:
        if not yes:
            found = admin.ask(client.checkpoint(reference))
            what = f"{found.digest[:16]} ({', '.join(found.models) or 'no model uses it'}, {size(found.image_bytes)})"
            confirm(f"{_last(found, node, tier)}Remove checkpoint {what} from {where}?", yes)
            patience.restart()
        begun = admin.ask(client.drop_checkpoint(reference, node, Tier(tier) if tier is not None else None))
        finish_operations(admin, form, begun, None if no_wait else patience)


def _sound(found: CheckpointView) -> set[str]:
    """The nodes with a sound copy on their disk."""
    return {each.node for each in found.placements if each.tier == "disk" and each.state == "resident"}


def _forgotten(found: CheckpointView, url: str | None) -> list[str]:
    """The remotes that a `forget` takes away, if none is left then."""
    remotes = [each.url for each in found.publications]
    return remotes if all(url is None or each == url.rstrip("/") for each in remotes) else []


def _last(found: CheckpointView, node: str | None, tier: str | None) -> str:
    """What to know before the last sound copy on a disk goes, "" where it is not that."""
    sound = _sound(found)
    if tier not in (None, "disk") or not sound or sound - ({node} if node is not None else sound):
        return ""
    remotes, digest = [each.url for each in found.publications if not each.doubt], found.digest[:16]
    if not remotes:
        return "This is the last sound copy that is known. "
    return (
        f"This is the last sound copy on a disk; without it the checkpoint is on {', '.join(remotes)} alone. "
        f"`sllmctl checkpoint publish {digest} {remotes[0]}` compares what lies there; if that is gone, "
        f"`sllmctl checkpoint forget {digest} {remotes[0]}`. "
    )


def _columns() -> list[Column[CheckpointView]]:
    moment = now()
    return [
        Column("DIGEST", lambda c: short_digest(c.digest)),
        Column("ARCHITECTURE", lambda c: c.architecture or "-"),
        Column("SIZE", lambda c: size(c.image_bytes) if c.image_bytes else "-", right=True),
        Column("CONTEXT", lambda c: str(c.max_context_tokens or "-"), right=True),
        Column("MODELS", lambda c: ",".join(c.models) or "-"),
        Column("TIERS", _tiers),
        Column("AGE", lambda c: age(moment - c.created_at), right=True),
        Column("KV/TOKEN", lambda c: size(c.kv_token_bytes), wide=True, right=True),
        Column("FULL DIGEST", lambda c: c.digest, wide=True),
    ]


def _fields(checkpoint: CheckpointView) -> list[tuple[str, str]]:
    facts = [
        ("Architecture", checkpoint.architecture),
        ("Size", f"{size(checkpoint.image_bytes)} ({checkpoint.image_bytes} bytes)"),
        ("KV cache", f"{size(checkpoint.kv_token_bytes)} a token"),
        ("Context", f"{checkpoint.max_context_tokens} tokens"),
    ]
    return [
        ("Digest", checkpoint.digest),
        *(facts if checkpoint.architecture else [("Architecture", "not known: no manifest of it can be read")]),
        ("Models", ", ".join(checkpoint.models) or "none"),
        ("Remotes", "\n".join(_publication(each) for each in checkpoint.publications) or "none"),
        ("Pinned", ", ".join(f"{pin.node}:{pin.tier}" for pin in checkpoint.pins) or "nowhere"),
        ("Placements", "\n".join(_placement(p) for p in checkpoint.placements) or "none"),
        ("Age", age(now() - checkpoint.created_at)),
    ]


def _tiers(checkpoint: CheckpointView) -> str:
    pinned = {(pin.node, pin.tier) for pin in checkpoint.pins}
    tiers = [_tier(p, (p.node, p.tier) in pinned) for p in checkpoint.placements]
    return ",".join(dict.fromkeys([*tiers, *(["remote"] if checkpoint.publications else [])])) or "-"


def _tier(placement: PlacementView, pinned: bool) -> str:
    marks = [*([] if placement.state == "resident" else [str(placement.state)]), *(["pinned"] if pinned else [])]
    return f"{placement.node}:{placement.tier}" + (f"({','.join(marks)})" if marks else "")


def _publication(publication: PublicationView) -> str:
    line = f"{publication.url}  {publication.layout}  {age(now() - publication.published_at)} ago"
    return line + (f"  in doubt: {publication.doubt}" if publication.doubt else "")


def _placement(placement: PlacementView) -> str:
    device = f" {placement.device}" if placement.tier == "device" else ""
    line = f"{placement.node}  {placement.tier + device:<8}  {placement.state:<11}  {size(placement.size_bytes)}"
    if placement.users:
        line += f"  {placement.users} users" if placement.users > 1 else "  1 user"
    line += f"  {placement.reason}" if placement.reason else ""
    return "\n".join([line, *(f"{'':<{len(placement.node)}}  {_copy(each)}" for each in placement.copies)])


def _copy(copy: CopyView) -> str:
    known = str(copy.state) if copy.state != "resident" else "verified" if copy.verified else "not verified"
    return f"{copy.layout} ({'in place' if copy.in_place else 'ingested'})  {size(copy.size_bytes)}  {known}"
