"""`sllmctl instance`: the running replicas of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sllmctl.cli.completion import names
from sllmctl.cli.context import Invocation, output_option, pass_invocation, yes_option
from sllmctl.cli.format import age, duration, size
from sllmctl.cli.logs import log_options, show_logs
from sllmctl.cli.output import Column, Format, now, show_item
from sllmctl.cli.phases import progress_text, start_text
from sllmctl.cli.watch import list_items, watch_option

if TYPE_CHECKING:
    from schema.admin import InstanceView

__all__ = ["command"]


@click.group("instance")
def command() -> None:
    """Instances: the running replicas of models."""


@command.command("ls")
@output_option
@watch_option
@pass_invocation
def ls(invocation: Invocation, form: Format, watch: bool) -> None:
    """List the instances.

    \b
    Examples:
      sllmctl instance ls -o wide
      sllmctl instance ls --watch
    """
    from sllmctl import client

    list_items(invocation, client.instances(), "instances", form, _columns, lambda instance: instance.id, watch=watch)


@command.command("show")
@click.argument("instance_id", metavar="ID", shell_complete=names("instance"))
@output_option
@pass_invocation
def show(invocation: Invocation, instance_id: str, form: Format) -> None:
    """Show one instance: why it runs where it runs, and where the time of its start went.

    \b
    Examples:
      sllmctl instance show inst_01k9zj8x
    """
    from sllmctl import client

    with invocation.admin() as admin:
        item = admin.ask(client.instance(instance_id))
    show_item(form, item, _fields, lambda instance: instance.id)


@command.command("logs")
@click.argument("instance_id", metavar="ID", shell_complete=names("instance"))
@log_options
@pass_invocation
def logs(invocation: Invocation, /, instance_id: str, **options: Any) -> None:
    """Print what an instance's workers wrote, also when they are dead or the instance is gone.

    \b
    Examples:
      sllmctl instance logs inst_01k9zj8x --since 1h
    """
    show_logs(invocation, "instance", instance_id, None, **options)


@command.command("stop")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=names("instance"))
@yes_option
@pass_invocation
def stop(invocation: Invocation, ids: tuple[str, ...], yes: bool) -> None:
    """Stop instances; what runs on them goes on elsewhere, and a model's scale may bring another.

    \b
    Examples:
      sllmctl instance stop inst_01k9zj8x -y
    """
    from sllmctl import client
    from sllmctl.cli.diagnostics import Refusals, confirm, note

    def ask(instance_id: str) -> None:
        admin.ask(client.stop_instance(instance_id))
        note(f"instance {instance_id} is stopping")

    confirm(f"Stop {', '.join(ids)}?", yes)
    with invocation.admin() as admin, Refusals() as refusals:
        refusals.each(ids, ask)


def _columns() -> list[Column[InstanceView]]:
    moment = now()
    return [
        Column("ID", lambda i: i.id),
        Column("MODEL", lambda i: i.model),
        Column("NODE", lambda i: i.node),
        Column("STATE", _state),
        Column("RUNNING", lambda i: str(i.running), right=True),
        Column("KV", _kv, right=True),
        Column("START", lambda i: duration(i.phases.total_s) if i.phases else "-", right=True),
        Column("AGE", lambda i: age(moment - i.created_at), right=True),
        Column("RESTARTS", lambda i: str(i.restarts), wide=True, right=True),
        Column("DEVICES", lambda i: _devices(i), wide=True),
        Column("PID", lambda i: str(i.pid) if i.pid else "-", wide=True, right=True),
        Column("REASON", lambda i: i.reason, wide=True),
    ]


def _fields(instance: InstanceView) -> list[tuple[str, str]]:
    moment = now()
    fields = [
        ("Id", instance.id),
        ("Model", instance.model),
        ("Checkpoint", instance.digest),
        ("Node", f"{instance.node}, device {_devices(instance)}" + (f", pid {instance.pid}" if instance.pid else "")),
        ("State", f"{instance.state} for {age(moment - instance.changed_at)}"),
        ("Reason", instance.reason or "-"),
        ("Running", f"{instance.running} sequences"),
        ("Memory", _memory(instance)),
        ("KV cache", f"{_kv(instance)} tokens used"),
        ("Life", f"epoch {instance.epoch}, {instance.restarts} restarts"),
        ("Age", age(moment - instance.created_at)),
    ]
    if instance.phases is not None:
        fields.append(("Last start", start_text(instance.phases)))
    if instance.progress is not None:
        fields.append(("Progress", progress_text(instance.progress)))
    if instance.fault is not None:
        fields.append(("Fault", f"{instance.fault.message} ({instance.fault.code})"))
    if instance.retry_at is not None:
        fields.append(("Tried again", f"in {duration(max(0.0, instance.retry_at - moment))}"))
    return fields


def _state(instance: InstanceView) -> str:
    if instance.fault is not None and instance.state in ("failed", "backoff"):
        return f"{instance.state} ({instance.fault.code})"
    return str(instance.state)


def _memory(instance: InstanceView) -> str:
    """What is promised beside the weights, and what of it is not for the KV cache."""
    if not instance.logits_bytes:
        return size(instance.working_bytes)
    steps = f"{size(instance.activation_bytes)} activations, {size(instance.logits_bytes)} logits"
    return f"{size(instance.working_bytes)} beside its weights; of that at most {steps}"


def _kv(instance: InstanceView) -> str:
    return f"{instance.kv_used_tokens}/{instance.kv_capacity_tokens}" if instance.kv_capacity_tokens else "-"


def _devices(instance: InstanceView) -> str:
    return ",".join(str(device) for device in instance.devices)
