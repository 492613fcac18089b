"""Completion by the shell: the script that turns it on, and the names that live in the cluster as it asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import click
from click.shell_completion import CompletionItem, get_completion_class

from sllmctl.cli.context import Invocation
from sllmctl.cli.output import write

if TYPE_CHECKING:
    from sllmctl.client import AdminClient

__all__ = ["Noun", "command", "living", "names"]

Noun = Literal["model", "node", "instance", "request", "checkpoint", "operation"]
_PATIENCE_S = 1.0
_VARIABLE = "_SLLMCTL_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script by which a shell completes commands, options, and the names of what lives in the cluster.

    \b
    Examples:
      bash:  eval "$(sllmctl completion bash)"       in ~/.bashrc
      zsh:   eval "$(sllmctl completion zsh)"        in ~/.zshrc
      fish:  sllmctl completion fish | source        in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    write(kind(ctx.find_root().command, {}, "sllmctl", _VARIABLE).source().rstrip())


def names(noun: Noun) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Completes an argument by the names of a noun; by none when no manager answers at once."""

    return lambda ctx, _, begin: living(ctx, noun, begin)


def living(ctx: click.Context, noun: Noun, begin: str, prefix: str = "") -> list[CompletionItem]:
    """The names of a noun that begin so and were not given yet, each after ``prefix``."""
    from schema.errors import SllmError

    try:
        found = _asked(ctx, noun)
    except SllmError:
        return []
    given = {name for value in ctx.params.values() if isinstance(value, tuple) for name in value}
    return [
        CompletionItem(prefix + name, help=line)
        for name, line in found
        if name.startswith(begin) and prefix + name not in given
    ]


def _asked(ctx: click.Context, noun: Noun) -> list[tuple[str, str]]:
    """Names, each with a word on it. Callbacks do not run while a shell completes, so the flags are read here."""
    from msgspec.structs import replace

    from sllmctl.client import AdminClient

    flags = ctx.find_root().params
    own = Invocation({key: flags.get(key) for key in ("state_dir", "admin_socket")}, flags.get("file"))
    settings = own.settings()
    patience = replace(settings.client, connect_s=_PATIENCE_S, answer_s=_PATIENCE_S)
    with AdminClient(settings.admin_socket, patience) as admin:
        return _found(admin, noun)


def _found(admin: AdminClient, noun: Noun) -> list[tuple[str, str]]:
    from sllmctl import client

    match noun:
        case "model":
            return [(model.name, model.state.value) for model in admin.ask(client.models())]
        case "node":
            return [(node.name, node.state.value) for node in admin.ask(client.nodes())]
        case "instance":
            return [(one.id, f"{one.model}, {one.state.value}") for one in admin.ask(client.instances())]
        case "request":
            return [(one.id, f"{one.model}, {one.state.value}") for one in admin.ask(client.requests())]
        case "operation":
            return [(one.id, f"{one.kind} {one.digest[:12]}") for one in admin.ask(client.operations())]
        case "checkpoint":
            found = admin.ask(client.checkpoints())
            models = [(name, one.digest[:12]) for one in found for name in one.models]
            return models + [(one.digest[:12], ", ".join(one.models)) for one in found]
