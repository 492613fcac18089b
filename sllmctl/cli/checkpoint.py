"""`sllmctl checkpoint`: weights, and the tiers they lie on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sllmctl.cli.context import Invocation, output_option, pass_invocation
from sllmctl.cli.format import age, short_digest, size
from sllmctl.cli.output import Column, Format, now, show_item, show_items

if TYPE_CHECKING:
    from schema.admin import CheckpointView, PlacementView

__all__ = ["command"]


@click.group("checkpoint")
def command() -> None:
    """Checkpoints: weights, and the tiers they lie on."""


@command.command("ls")
@output_option
@pass_invocation
def ls(invocation: Invocation, form: Format) -> None:
    """List the checkpoints."""
    from sllmctl import client

    with invocation.admin() as admin:
        items = admin.ask(client.checkpoints())
    show_items(form, items, _columns(), lambda checkpoint: checkpoint.digest)


@command.command("show")
@click.argument("digest")
@output_option
@pass_invocation
def show(invocation: Invocation, digest: str, form: Format) -> None:
    """Show one checkpoint, by its digest or a beginning of it."""
    from sllmctl import client

    with invocation.admin() as admin:
        item = admin.ask(client.checkpoint(digest))
    show_item(form, item, _fields, lambda checkpoint: checkpoint.digest)


def _columns() -> list[Column[CheckpointView]]:
    moment = now()
    return [
        Column("DIGEST", lambda c: short_digest(c.digest)),
        Column("ARCHITECTURE", lambda c: c.architecture),
        Column("SIZE", lambda c: size(c.image_bytes), right=True),
        Column("CONTEXT", lambda c: str(c.max_context_tokens), right=True),
        Column("MODELS", lambda c: ",".join(c.models) or "-"),
        Column("TIERS", _tiers),
        Column("AGE", lambda c: age(moment - c.created_at), right=True),
        Column("KV/TOKEN", lambda c: size(c.kv_token_bytes), wide=True, right=True),
        Column("FULL DIGEST", lambda c: c.digest, wide=True),
    ]


def _fields(checkpoint: CheckpointView) -> list[tuple[str, str]]:
    return [
        ("Digest", checkpoint.digest),
        ("Architecture", checkpoint.architecture),
        ("Size", f"{size(checkpoint.image_bytes)} ({checkpoint.image_bytes} bytes)"),
        ("KV cache", f"{size(checkpoint.kv_token_bytes)} a token"),
        ("Context", f"{checkpoint.max_context_tokens} tokens"),
        ("Models", ", ".join(checkpoint.models) or "none"),
        ("Placements", "\n".join(_placement(p) for p in checkpoint.placements) or "none"),
        ("Age", age(now() - checkpoint.created_at)),
    ]


def _tiers(checkpoint: CheckpointView) -> str:
    return ",".join(dict.fromkeys(_tier(p) for p in checkpoint.placements)) or "-"


def _tier(placement: PlacementView) -> str:
    return f"{placement.node}:{placement.tier}" + ("" if placement.state == "resident" else f"({placement.state})")


def _placement(placement: PlacementView) -> str:
    device = f" {placement.device}" if placement.tier == "device" else ""
    return f"{placement.node}  {placement.tier + device:<8}  {placement.state:<11}  {size(placement.size_bytes)}"
