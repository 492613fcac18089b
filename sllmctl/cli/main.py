"""The `sllmctl` command: its groups and one table of what each command is, so that help imports none of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from schema.version import VERSION
from sllmctl.cli import diagnostics, output
from sllmctl.cli.context import Invocation

__all__ = ["main", "root", "run"]

_EXAMPLES = """\b
Examples:
  sllmctl                                         open the dashboard, starting a manager if none answers
  sllmctl serve                                   start the manager and the node of this machine
  sllmctl model add tiny ./my-model --deploy      ingest a Hugging Face directory and serve it
  sllmctl model ls                                what is deployed, and how busy it is
  sllmctl chat -m tiny "What is a cold start?"    one streamed answer; without a prompt, a conversation
  sllmctl doctor                                  what is wrong with this machine, and what to do
"""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A command: the section of the help it stands in, and its one line there; its object is ``command`` of ``module``."""

    section: str
    help: str
    module: str
    attribute: str = "command"


def _entry(section: str, name: str, line: str, attribute: str = "command") -> _Entry:
    return _Entry(section, line, f"sllmctl.cli.{name}", attribute)


_RUN, _LOOK, _HIDDEN = "Running", "Managing", ""
_COMMANDS = {
    "tui": _entry(_RUN, "tui", "Watch the cluster and work on it: the dashboard."),
    "serve": _entry(_RUN, "serve", "Run the manager, and the node of this machine."),
    "demo": _entry(_RUN, "demo", "See a cold start and a warm request on the bundled model."),
    "chat": _entry(_RUN, "chat", "Talk to a model."),
    "doctor": _entry(_RUN, "doctor", "Check this machine, and say what to do."),
    "completion": _entry(_RUN, "completion", "Print the script for completion by bash, zsh or fish."),
    "version": _entry(_RUN, "version", "Print the version."),
    "apply": _entry(_LOOK, "apply", "Make models as files say.", "apply"),
    "diff": _entry(_LOOK, "apply", "What `apply` would change, field by field.", "diff"),
    "schema": _entry(_LOOK, "schema", "Print the JSON Schema of what `apply` takes."),
    "model": _entry(_LOOK, "model", "Models: add, deploy, scale, stop, remove."),
    "node": _entry(_LOOK, "node", "Nodes: the machines that run instances."),
    "instance": _entry(_LOOK, "instance", "Instances: the running replicas of models."),
    "checkpoint": _entry(_LOOK, "checkpoint", "Checkpoints: weights, and the tiers they lie on."),
    "request": _entry(_LOOK, "request", "Requests: those that run, and the latest that ended."),
    "event": _entry(_LOOK, "event", "Events: what happened, and why."),
    "operation": _entry(_LOOK, "operation", "Operations: what was asked of checkpoints, and how it went."),
    "wait": _entry(_LOOK, "wait", "Wait until things are as they are to be."),
    "explain": _entry(_LOOK, "explain", "Where a model's next instance would go, and why."),
    "bench": _entry(_LOOK, "bench", "Measurements: the planner's estimates, the speed of loads."),
    "simulate": _entry(_LOOK, "simulate", "Simulate clusters: policies side by side, on a virtual clock."),
    **{
        role: _entry(_HIDDEN, "passthrough", f"Run the node's {role} process.", role)
        for role in ("agent", "store", "zygote", "ingest")
    },
}


class _Root(click.Group):
    """Commands by the table above, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            from schema.names import did_you_mean

            near = did_you_mean(args[0], (name for name, entry in _COMMANDS.items() if entry.section))
            raise click.UsageError(f"No such command {args[0]!r}{near or '; `sllmctl -h` shows what there is'}", ctx)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section in (_RUN, _LOOK):
            with formatter.section(section):
                formatter.write_dl([(name, entry.help) for name, entry in _COMMANDS.items() if entry.section == section])


@click.command(
    cls=_Root, invoke_without_command=True, epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--config", "file", type=click.Path(path_type=Path), help="The configuration file (TOML).")
@click.option("--state-dir", type=click.Path(), help="Where the manager keeps its state.")
@click.option("--socket", "admin_socket", type=click.Path(), help="The manager's admin socket.")
@click.version_option(VERSION, prog_name="sllmctl", message="%(prog)s %(version)s")
@click.pass_context
def root(ctx: click.Context, file: Path | None, state_dir: str | None, admin_socket: str | None) -> int | None:
    """Run language models on your machines, from nothing to the first token in seconds.

    Without a command it opens the dashboard, and starts a manager if none answers.
    Settings come from flags, SLLM_* variables and a configuration file, in this order.
    """
    ctx.obj = Invocation({"state_dir": state_dir, "admin_socket": admin_socket}, file)
    if ctx.invoked_subcommand is not None:
        return None
    if sys.stdin.isatty() and sys.stdout.isatty():
        from sllmctl.cli.tui import alone

        return alone(ctx.obj)
    output.write(ctx.get_help())
    return None


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line (without the program's name) and return its exit code."""

    def command() -> object:
        for argument in arguments:
            # Python hides such bytes in the text, and what is sent to the manager could not carry them.
            if not argument.isascii() and argument.encode(errors="replace").decode() != argument:
                raise click.UsageError(f"the argument {argument!r} is not UTF-8 text")
        return root.main(list(arguments), prog_name="sllmctl", standalone_mode=False)

    return diagnostics.guard(command)


def main() -> int:
    """The entry point of the `sllmctl` executable."""
    return run(sys.argv[1:])
