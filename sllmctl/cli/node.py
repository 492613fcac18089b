"""`sllmctl node`: the machines that run instances."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sllmctl.cli.completion import names
from sllmctl.cli.context import Invocation, output_option, pass_invocation
from sllmctl.cli.format import age, bandwidth, size
from sllmctl.cli.logs import log_options, show_logs
from sllmctl.cli.output import Column, Format, now, show_item
from sllmctl.cli.phases import progress_text
from sllmctl.cli.watch import list_items, watch_option

if TYPE_CHECKING:
    from schema.admin import NodeView

__all__ = ["command"]


@click.group("node")
def command() -> None:
    """Nodes: the machines that run instances."""


@command.command("ls")
@output_option
@watch_option
@pass_invocation
def ls(invocation: Invocation, form: Format, watch: bool) -> None:
    """List the nodes.

    \b
    Examples:
      sllmctl node ls -o wide
      sllmctl node ls --watch
    """
    from sllmctl import client

    list_items(
        invocation, client.nodes(), "nodes", form, _columns, lambda node: node.name, watch=watch, key=lambda node: node.id
    )


@command.command("show")
@click.argument("name", shell_complete=names("node"))
@output_option
@pass_invocation
def show(invocation: Invocation, name: str, form: Format) -> None:
    """Show one node: its devices, its memory, and its bandwidths where they were measured.

    \b
    Examples:
      sllmctl node show gpu1
    """
    from sllmctl import client

    with invocation.admin() as admin:
        item = admin.ask(client.node(name))
    show_item(form, item, _fields, lambda node: node.name)


@command.command("logs")
@click.argument("name", shell_complete=names("node"))
@click.option(
    "--process",
    type=click.Choice(["agent", "store", "zygote", "ingest", "publish"]),
    default="agent",
    show_default=True,
    help="Which of its processes; workers' lines are their instances'.",
)
@log_options
@pass_invocation
def logs(invocation: Invocation, /, name: str, process: str, **options: Any) -> None:
    """Print what the processes of a node wrote.

    \b
    Examples:
      sllmctl node logs gpu1 -f
    """
    show_logs(invocation, "node", name, process, **options)


def _columns() -> list[Column[NodeView]]:
    moment = now()
    return [
        Column("NAME", lambda n: n.name),
        Column("STATE", _state),
        Column("INSTANCES", lambda n: str(n.instances), right=True),
        Column("DEVICES", _devices),
        Column("ARENA", lambda n: _arena(n, short=True), right=True),
        Column("SEEN", lambda n: _seen(n, moment), right=True),
        Column("DISK", lambda n: bandwidth(n.inventory.disk_read_bps) if n.inventory else "-", wide=True, right=True),
        Column("ADDRESS", lambda n: n.address, wide=True),
        Column("ID", lambda n: n.id, wide=True),
    ]


def _fields(node: NodeView) -> list[tuple[str, str]]:
    fields = [
        ("Name", node.name),
        ("Id", node.id),
        ("Address", node.address),
        ("State", _state(node)),
        ("Seen", _seen_at_length(node)),
        ("Instances", str(node.instances)),
    ]
    if (means := node.inventory) is None:
        return [*fields, ("Inventory", "not stated yet")]
    reader = f", filled by {means.arena.reader}" if means.arena.reader else ""
    devices = "\n".join(f"{d.index}  {d.kind}  {d.name}  {size(d.memory_bytes)}" for d in means.devices)
    return [
        *fields,
        ("Host", f"{means.hostname}, {means.cpus} CPUs, {size(means.memory_bytes)} of memory"),
        ("Devices", devices or "none"),
        ("Arena", f"{_arena(node)} used, chunks of {size(means.arena.chunk_bytes)}, {means.arena.pages} pages{reader}"),
        ("Disk", bandwidth(means.disk_read_bps)),
        ("Disk budget", f"{size(means.disk_used_bytes)} used of {size(means.disk_budget_bytes)}"),
        ("Device copy", bandwidth(means.device_copy_bps)),
        ("Numerics", means.numerics or "not known: no zygote has said it yet"),
        ("Loads", "\n".join(f"{load.of or load.id}: {progress_text(load.progress)}" for load in node.loads) or "none"),
    ]


def _state(node: NodeView) -> str:
    return f"{node.state},cordoned" if node.cordoned else str(node.state)


def _seen(node: NodeView, moment: float) -> str:
    """A node whose link is up was heard within its heartbeat; of another it is known when that broke."""
    if node.state == "ready":
        return "now"
    return age(moment - node.seen_at) if node.seen_at else "never"


def _seen_at_length(node: NodeView) -> str:
    seen = _seen(node, now())
    if seen == "now":
        return f"now; linked for {age(now() - node.seen_at)}"
    return f"{seen} ago" if node.seen_at else seen


def _devices(node: NodeView) -> str:
    if node.inventory is None:
        return "-"
    kinds: dict[str, int] = {}
    for device in node.inventory.devices:
        kinds[device.kind] = kinds.get(device.kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"


def _arena(node: NodeView, short: bool = False) -> str:
    if node.inventory is None:
        return "-"
    arena = node.inventory.arena
    return f"{size(arena.used_bytes)}{'/' if short else ' of '}{size(arena.budget_bytes)}"
